"""Generation compares what was written, frequent words counts what was planted; both read what they say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.tasks import frequent as frequent_module
from kvturbo.eval.tasks.frequent import FrequentWordsTask
from kvturbo.eval.tasks.generation import GenerationTask
from tiny_model import LAYERS

GENERATION = GenerationTask(texts=2, prefix=150, new=12)
FREQUENT = FrequentWordsTask(length=400, common=3, repeats=8, rare=10, prompts=3)


def test_the_16_bit_cache_writes_what_it_writes(tiny: LoadedModel) -> None:
    record = GENERATION.measure(tiny, 0, [CacheSpec("16bit")])["16bit"]
    assert record["agreed"] == 12


def test_continuations_are_greedy_and_compared_from_the_start(tiny: LoadedModel) -> None:
    """One pass over text and continuation predicts each of its tokens; a cache agrees up to the first one that differs."""
    ids = torch.from_numpy(tiny.text[: GENERATION.prefix].copy())[None]
    ids[0, 0] = tiny.tokenizer.bos_token_id
    written: dict[str, list[int]] = {}
    continue_text = GenerationTask._continue

    def noted(self: Any, loaded: Any, run: Any, last: Any) -> list[int]:
        written[run.spec.name] = continue_text(self, loaded, run, last)
        return written[run.spec.name]

    task = GENERATION
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerationTask, "_continue", noted)
        records = task.measure(tiny, 0, [CacheSpec("k2v2", recent=0, sink=0)])
    with torch.inference_mode():
        logits = tiny.model(torch.cat((ids, torch.tensor([written["16bit"]])), 1)).logits[0, GENERATION.prefix - 1 : -1]
    short = logits.max(-1).values - logits.gather(1, torch.tensor(written["16bit"])[:, None])[:, 0]
    assert short.max() < 0.05 < logits.std()  # 16-bit keys and values turn near ties, no more
    agreed = records["k2v2"]["agreed"]
    assert written["k2v2"][:agreed] == written["16bit"][:agreed]
    assert agreed == 12 or written["k2v2"][agreed] != written["16bit"][agreed]
    assert records["k2v2"]["packed_tokens_read"] == LAYERS * sum(range(149, 161))


def test_agreement_is_summed_over_texts() -> None:
    figures = GENERATION.summarise([{"agreed": 12}, {"agreed": 3}])
    assert figures == {"agreed_tokens": 7.5, "identical": 0.5, "texts": 2}


def test_planted_words_are_counted(tiny: LoadedModel) -> None:
    vocab = tiny.retrieval_vocab
    context, frequent = FREQUENT.sample(tiny.text, vocab, 1)
    assert len(context) == 400 and context[0] == vocab.bos and len(frequent) == 3
    marks = np.flatnonzero(context == vocab.mark)
    words, counts = np.unique(context[marks + 1], return_counts=True)
    assert (context[marks + 2] == vocab.end).all()
    assert dict(zip(words.tolist(), counts.tolist(), strict=True)) == {
        word: 8 if word in frequent else 1 for word in words.tolist()
    }
    assert len(words) == 13
    again, _ = FREQUENT.sample(tiny.text, vocab, 1)
    other, _ = FREQUENT.sample(tiny.text, vocab, 2)
    assert (context == again).all() and not (context == other).all()


def test_the_share_of_words_found_is_right(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _, frequent = FREQUENT.sample(tiny.text, tiny.retrieval_vocab, 0)
    known = sorted(frequent)[:2]

    def told(loaded: Any, run: Any, question: Any) -> torch.Tensor:
        assert question.tolist() == [tiny.retrieval_vocab.copy]
        logits = torch.zeros(1, tiny.retrieval_vocab.size)
        logits[0, known] = 5.0
        logits[0, tiny.retrieval_vocab.end] = 4.0
        return logits

    monkeypatch.setattr(frequent_module, "feed", told)
    assert FREQUENT.measure(tiny, 0, [CacheSpec("16bit")])["16bit"]["found"] == pytest.approx(2 / 3)


def test_frequent_words_reads_its_context_from_the_packed_cache(tiny: LoadedModel) -> None:
    record = FREQUENT.measure(tiny, 0, [CacheSpec("k4v4")])["k4v4"]
    assert record["packed_tokens_read"] == LAYERS * 400 and 0 <= record["found"] <= 1


def test_its_interval_is_over_prompts() -> None:
    figures = FREQUENT.summarise([{"found": 0.75}, {"found": 0.25}, {"found": 0.5}])
    assert figures["accuracy"] == 0.5
    assert figures["high"] - figures["accuracy"] == pytest.approx(1.96 * 0.25 / 3**0.5)


@pytest.mark.parametrize(
    "task, message",
    [
        (GenerationTask(prefix=8190, new=10), "prefix \\+ new must be at most the model's context of 8192, got 8200"),
        (GenerationTask(prefix=8000, new=10), "text must have more than prefix"),
        (FrequentWordsTask(length=8192), "length must be below the model's context of 8192, got 8192"),
        (FrequentWordsTask(length=8000), "text must have more than"),
        (FrequentWordsTask(common=100, repeats=1, rare=200), "common \\+ rare must be at most"),
    ],
)
def test_a_task_that_does_not_fit_says_why(tiny: LoadedModel, task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.check(tiny)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="new must be at least 1, got 0"):
        GenerationTask(new=0)
    with pytest.raises(ValueError, match="length must be at least 253 for its words, got 200"):
        FrequentWordsTask(length=200)
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        replace(FREQUENT, repeats=0)
