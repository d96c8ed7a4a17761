"""Frequent words, asked of servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvturbo.eval.registry import SERVED_TASKS, Record
from kvturbo.eval.served_model import ServedModel, ServerSpec
from kvturbo.eval.tasks.frequent import FrequentWordsTask


@SERVED_TASKS.register("frequent")
@dataclass(frozen=True)
class ServedFrequentWords(FrequentWordsTask):
    """Share of the most frequent planted words among the likeliest next tokens.

    The token `<copy>`, which asks for one, is made the only one that may be generated after the context, so that it is decoded: it
    reads the whole context from the cache. What counts are the likeliest tokens after it, before sampling.
    """

    alone = False

    def check_served(self, served: ServedModel) -> None:
        served.check_length(self.length + 2, "a context with two generated tokens")

    def ask(self, served: ServedModel, spec: ServerSpec, index: int) -> Record:
        vocab = served.retrieval_vocab
        context, frequent = self.sample(served.text, vocab, index)
        found = spec.server.after_forced(context.tolist(), vocab.copy, self.common)
        return spec.record([len(context)], {"found": len(frequent & set(found)) / self.common})

    def compare(self, pairs: list[tuple[Record, Record]]) -> dict[str, Any]:
        differences = [record["found"] - reference["found"] for reference, record in pairs]
        return {"difference": sum(differences) / len(differences)}
