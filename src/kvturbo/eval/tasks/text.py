"""Scores a text in chunks that read a packed prefix, with every registered metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvturbo.eval.caches import REFERENCE, CacheSpec
from kvturbo.eval.model import LoadedModel, PromptSource
from kvturbo.eval.registry import METRICS, TASKS, Record
from kvturbo.eval.scoring import lock_step, passage, start, with_reference


@TASKS.register("text")
@dataclass(frozen=True)
class TextTask:
    """KL divergence to the 16-bit cache, agreement and perplexity on held-out text.

    Attributes:
        texts: passages, evenly spaced over the text.
        prefix: tokens of a passage that are prefilled and packed.
        scored: tokens of a passage that are scored after it.
        chunk: tokens per forward pass of the scored part; 1 is decoding.
    """

    texts: int = 4
    prefix: int = 3072
    scored: int = 1024
    chunk: int = 64

    def __post_init__(self) -> None:
        for name in ("texts", "prefix", "scored", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def count(self) -> int:
        return self.texts

    def check(self, loaded: PromptSource) -> None:
        length = self.prefix + self.scored
        if loaded.context is not None and length > loaded.context:
            raise ValueError(f"prefix + scored must be at most the model's context of {loaded.context}, got {length}")
        if len(loaded.text) <= length:
            raise ValueError(f"text must have more than prefix + scored = {length} tokens, got {len(loaded.text)}")

    def measure(self, loaded: LoadedModel, index: int, specs: list[CacheSpec]) -> dict[str, Record]:
        ids = self._passage(loaded, index)
        runs = start(loaded, ids[: self.prefix], with_reference(specs))
        values: dict[str, dict[str, list[float]]] = {run.spec.name: {} for run in runs}
        for targets, logits in lock_step(loaded, runs, ids[self.prefix :], self.chunk):
            for name, row in logits.items():
                for metric in METRICS.names():
                    numbers = METRICS.get(metric).per_token(logits[REFERENCE], row, targets)
                    values[name].setdefault(metric, []).extend(numbers.tolist())
        return {run.spec.name: run.facts() | {"values": values[run.spec.name]} for run in runs}

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for metric in METRICS.names():
            joined = [value for record in records for value in record["values"][metric]]
            figures |= METRICS.get(metric).summarise(torch.tensor(joined, dtype=torch.float64))
            figures["scored_tokens"] = len(joined)
        return figures

    def _passage(self, loaded: PromptSource, index: int) -> np.ndarray:
        """prefix + scored + 1 tokens, the last one only as a target."""
        return passage(loaded, index, self.texts, self.prefix + self.scored + 1)
