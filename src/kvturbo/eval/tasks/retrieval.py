"""Retrieval from a packed context: the questions follow it as one teacher-forced chunk."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import LoadedModel, PromptSource
from kvturbo.eval.registry import TASKS, Record
from kvturbo.eval.retrieval import Sample, get_setting, samples, score, wilson_interval
from kvturbo.eval.scoring import feed, start


@TASKS.register("retrieval")
@dataclass(frozen=True)
class RetrievalTask:
    """Exact match of multi-token values, with its 95 % Wilson interval.

    Attributes:
        setting: one of `kvturbo.eval.retrieval.SETTINGS`.
        prompts: samples; each asks as many questions as the setting says.
        seed: of the samples.
    """

    setting: str = "multikey-4k"
    prompts: int = 13
    seed: int = 2026

    def __post_init__(self) -> None:
        get_setting(self.setting)
        if self.prompts < 1:
            raise ValueError(f"prompts must be at least 1, got {self.prompts}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    def count(self) -> int:
        return self.prompts

    def check(self, loaded: PromptSource) -> None:
        _ = loaded.retrieval_vocab
        setting = get_setting(self.setting)
        if loaded.context is not None and setting.length > loaded.context:
            raise ValueError(
                f"setting {self.setting!r} has {setting.length} tokens, more than the model's context of {loaded.context}"
            )
        if len(loaded.text) <= setting.text_tokens:
            raise ValueError(f"text must have more than {setting.text_tokens} tokens, got {len(loaded.text)}")

    def measure(self, loaded: LoadedModel, index: int, specs: list[CacheSpec]) -> dict[str, Record]:
        sample = self._sample(loaded, index)
        runs = start(loaded, sample.context, specs)
        return {
            run.spec.name: {"correct": score(feed(loaded, run, sample.questions), sample)} | run.facts() for run in runs
        }

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        correct = [answer for record in records for answer in record["correct"]]
        low, high = wilson_interval(sum(correct), len(correct))
        return {"accuracy": sum(correct) / len(correct), "low": low, "high": high, "questions": len(correct)}

    def _sample(self, loaded: PromptSource, index: int) -> Sample:
        drawn = samples(self.setting, index + 1, loaded.text, loaded.retrieval_vocab, self.seed)
        return next(islice(drawn, index, None))
