"""Frequent words: which of many planted words occur most often, as RULER's `cwe` and `fwe` ask."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import LoadedModel, PromptSource
from kvturbo.eval.registry import TASKS, Record
from kvturbo.eval.retrieval import RetrievalVocab
from kvturbo.eval.scoring import feed, start


@TASKS.register("frequent")
@dataclass(frozen=True)
class FrequentWordsTask:
    """Share of the most frequent planted words among the likeliest next tokens, with a 95 % interval over prompts.

    Words of one token, each in a record `<mark> word <end>`, are strewn over text: `common` of them `repeats` times, `rare`
    others once. After the context the single token `<copy>` asks for one; the `common` likeliest next tokens should be
    the frequent words. Attention has to add up many places with small weights, where retrieval needs one with a large
    weight. The embedded model was not trained for it (RULER, Hsieh et al., 2024, arXiv 2404.06654).

    Attributes:
        length: tokens of the context.
        common, repeats, rare: see above.
        prompts: samples.
        seed: of the samples.
    """

    length: int = 2048
    common: int = 4
    repeats: int = 16
    rare: int = 20
    prompts: int = 16
    seed: int = 2026

    def __post_init__(self) -> None:
        for name in ("length", "common", "repeats", "rare", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if self.text_tokens < 0:
            raise ValueError(
                f"length must be at least {self.length - self.text_tokens} for its words, got {self.length}"
            )

    @property
    def text_tokens(self) -> int:
        """Tokens of ordinary text in a context."""
        return self.length - 1 - 3 * (self.common * self.repeats + self.rare)

    def count(self) -> int:
        return self.prompts

    def check(self, loaded: PromptSource) -> None:
        vocab = loaded.retrieval_vocab
        if loaded.context is not None and self.length >= loaded.context:
            raise ValueError(f"length must be below the model's context of {loaded.context}, got {self.length}")
        if len(loaded.text) <= self.text_tokens:
            raise ValueError(f"text must have more than {self.text_tokens} tokens, got {len(loaded.text)}")
        if self.common + self.rare > vocab.size - vocab.first_content:
            raise ValueError(f"common + rare must be at most {vocab.size - vocab.first_content}, the ordinary tokens")

    def measure(self, loaded: LoadedModel, index: int, specs: list[CacheSpec]) -> dict[str, Record]:
        context, frequent = self.sample(loaded.text, loaded.retrieval_vocab, index)
        runs = start(loaded, context, specs)
        question = np.array([loaded.retrieval_vocab.copy])
        found = {run.spec.name: feed(loaded, run, question)[0].topk(self.common).indices.tolist() for run in runs}
        return {
            run.spec.name: run.facts() | {"found": len(frequent & set(found[run.spec.name])) / self.common}
            for run in runs
        }

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        found = np.array([record["found"] for record in records])
        margin = 1.96 * found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 1.0
        mean = float(found.mean())
        return {"accuracy": mean, "low": max(0.0, mean - margin), "high": min(1.0, mean + margin), "words": self.common}

    def sample(self, text: np.ndarray, vocab: RetrievalVocab, index: int) -> tuple[np.ndarray, set[int]]:
        """Context [length] int64 and the frequent words; the same for every model with this vocabulary and text."""
        rng = np.random.default_rng([self.seed, index])
        words = vocab.first_content + rng.permutation(vocab.size - vocab.first_content)[: self.common + self.rare]
        planted = np.concatenate([np.repeat(words[: self.common], self.repeats), words[self.common :]])
        rng.shuffle(planted)
        records = np.stack([np.full_like(planted, vocab.mark), planted, np.full_like(planted, vocab.end)], 1)
        offset = int(rng.integers(0, len(text) - self.text_tokens))
        gaps = np.sort(rng.integers(0, self.text_tokens + 1, len(records)))
        body = np.insert(text[offset : offset + self.text_tokens], np.repeat(gaps, 3), records.reshape(-1))
        return np.concatenate([[vocab.bos], body]).astype(np.int64), set(words[: self.common].tolist())
