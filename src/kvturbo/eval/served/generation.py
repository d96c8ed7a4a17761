"""Free generation by servers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvturbo.eval.registry import SERVED_TASKS, Record
from kvturbo.eval.scoring import passage
from kvturbo.eval.served_model import ServedModel, ServerSpec
from kvturbo.eval.tasks.generation import GenerationTask, common_beginning


@SERVED_TASKS.register("generation")
@dataclass(frozen=True)
class ServedGeneration(GenerationTask):
    """Greedy continuations of held-out text; with a 16-bit server's, how long they are the same.

    The first new token comes from reading the prompt; each later one reads the prompt and those before it from the cache.
    """

    alone = False

    def check_served(self, served: ServedModel) -> None:
        if self.new < 2:
            raise ValueError(f"new must be at least 2, since the first token reads nothing packed, got {self.new}")

    def ask(self, served: ServedModel, spec: ServerSpec, index: int) -> Record:
        ids = passage(served, index, self.texts, self.prefix).tolist()
        written = spec.server.generate(ids, self.new)
        return spec.record(range(len(ids), len(ids) + self.new - 1), {"written": written})

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        return {"texts": len(records)}

    def compare(self, pairs: list[tuple[Record, Record]]) -> dict[str, Any]:
        agreed = [common_beginning(reference["written"], record["written"]) for reference, record in pairs]
        return super().summarise([{"agreed": count} for count in agreed]) | {"texts": len(pairs)}
