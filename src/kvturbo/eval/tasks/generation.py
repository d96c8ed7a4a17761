"""Free generation: how long a packed cache writes the same text as the 16-bit one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import LoadedModel, PromptSource
from kvturbo.eval.registry import TASKS, Record
from kvturbo.eval.scoring import Run, feed, passage, start, with_reference


@TASKS.register("generation")
@dataclass(frozen=True)
class GenerationTask:
    """Greedy continuations of held-out text, compared token by token with those of the 16-bit cache.

    After the first token that differs the two read different texts, so the length of the common beginning is what counts.
    Errors add up here as they do in use: every token is packed and read back by those after it.

    Attributes:
        texts: passages, evenly spaced over the text.
        prefix: tokens of a passage that are read before.
        new: tokens that are generated.
    """

    texts: int = 4
    prefix: int = 2048
    new: int = 64

    def __post_init__(self) -> None:
        for name in ("texts", "prefix", "new"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def count(self) -> int:
        return self.texts

    def check(self, loaded: PromptSource) -> None:
        length = self.prefix + self.new
        if loaded.context is not None and length > loaded.context:
            raise ValueError(f"prefix + new must be at most the model's context of {loaded.context}, got {length}")
        if len(loaded.text) <= self.prefix:
            raise ValueError(f"text must have more than prefix = {self.prefix} tokens, got {len(loaded.text)}")

    def measure(self, loaded: LoadedModel, index: int, specs: list[CacheSpec]) -> dict[str, Record]:
        ids = passage(loaded, index, self.texts, self.prefix)
        runs = start(loaded, ids[:-1], with_reference(specs))
        written = {run.spec.name: self._continue(loaded, run, ids[-1:]) for run in runs}
        reference = written[runs[0].spec.name]
        return {
            run.spec.name: run.facts() | {"agreed": common_beginning(reference, written[run.spec.name])} for run in runs
        }

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        agreed = [record["agreed"] for record in records]
        return {
            "agreed_tokens": sum(agreed) / len(agreed),
            "identical": sum(count == self.new for count in agreed) / len(agreed),
            "texts": len(agreed),
        }

    def _continue(self, loaded: LoadedModel, run: Run, last: np.ndarray) -> list[int]:
        written: list[int] = []
        for _ in range(self.new):
            last = feed(loaded, run, last)[-1:].argmax(-1).cpu().numpy()
            written.append(int(last[0]))
        return written


def common_beginning(a: list[int], b: list[int]) -> int:
    """Tokens until two continuations of one length differ."""
    differing = torch.tensor(a) != torch.tensor(b)
    return int(differing.nonzero()[0]) if bool(differing.any()) else len(a)
