"""Retrieval, asked of servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvturbo.eval.measure import paired
from kvturbo.eval.registry import SERVED_TASKS, Record
from kvturbo.eval.retrieval import Sample, get_setting, score_predictions
from kvturbo.eval.served_model import ServedModel, ServerSpec
from kvturbo.eval.tasks.retrieval import RetrievalTask

_PAIRED = ("lost", "gained", "difference", "difference_low", "difference_high")


@SERVED_TASKS.register("retrieval")
@dataclass(frozen=True)
class ServedRetrieval(RetrievalTask):
    """Exact match of multi-token values, with its 95 % Wilson interval; with a 16-bit server's, the paired difference.

    Each run of scored tokens is generated after the context and everything of the questions before it, right answers in place of
    given ones: greedy tokens match as far as the likeliest tokens of a teacher-forced pass do. The first token of a run comes from
    reading the prompt; each later one reads all before it from the cache, and only those reads are counted.
    """

    alone = False

    def check_served(self, served: ServedModel) -> None:
        if get_setting(self.setting).value_tokens < 2:
            raise ValueError(f"setting {self.setting!r} has values of one token, which reads nothing packed")

    def ask(self, served: ServedModel, spec: ServerSpec, index: int) -> Record:
        sample = self._sample(served, index)
        predicted = np.full(len(sample.questions), -1, dtype=np.int64)
        starts: list[int] = []
        for begin, stop in scored_runs(sample):
            prompt = [*sample.context.tolist(), *sample.questions[:begin].tolist()]
            predicted[begin - 1 : stop - 1] = spec.server.generate(prompt, stop - begin)
            starts += range(len(prompt), len(prompt) + stop - begin - 1)
        return spec.record(starts, {"correct": score_predictions(predicted, sample)})

    def compare(self, pairs: list[tuple[Record, Record]]) -> dict[str, Any]:
        right = [np.concatenate([record["correct"] for record in side]) for side in zip(*pairs, strict=True)]
        figures = paired(right[0], right[1])
        return {name: figures[name] for name in _PAIRED}


def scored_runs(sample: Sample) -> Iterator[tuple[int, int]]:
    """Bounds (begin, stop) in the questions of consecutive scored tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sample.answer_positions, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
