"""Scoring reads what it says it reads, from caches that one raw prefill has filled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from kvturbo.config import KVFormat
from kvturbo.eval.baselines.sixteen_bit import from_raw
from kvturbo.eval.caches import CacheSpec, PackedReadsError, check_name
from kvturbo.eval.metrics.kl import kl_divergence
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.scoring import chunks, feed, lock_step, start
from kvturbo.eval.tasks.retrieval import RetrievalTask
from kvturbo.eval.tasks.text import TextTask
from tiny_model import HEAD_DIM, KV_HEADS, LAYERS

SHORT = TextTask(texts=2, prefix=100, scored=30, chunk=8)


class Wrapped:
    """The model, with its forward passes counted and, if asked, its cache swapped for an empty one."""

    def __init__(self, model: Any, bypass: bool = False) -> None:
        self.model, self.bypass, self.lengths = model, bypass, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, ids: torch.Tensor, past_key_values: Any, **options: Any) -> Any:
        self.lengths.append(ids.shape[1])
        swap = self.bypass and not isinstance(past_key_values, DynamicCache)
        return self.model(ids, past_key_values=DynamicCache() if swap else past_key_values, **options)


def mean_kl(records: dict[str, Any], name: str) -> float:
    return float(np.mean(records[name]["values"]["kl"]))


def test_the_16_bit_cache_diverges_nowhere_from_itself(tiny: LoadedModel) -> None:
    record = SHORT.measure(tiny, 0, [CacheSpec("16bit")])["16bit"]
    assert record["values"]["kl"] == [0.0] * SHORT.scored
    assert record["values"]["same_top1"] == [1.0] * SHORT.scored


def test_fewer_bits_diverge_more(tiny: LoadedModel) -> None:
    specs = [CacheSpec(name, recent=0, sink=0) for name in ("k4v4", "k3v3", "k2v2")]
    records = SHORT.measure(tiny, 0, specs)
    assert 0 < mean_kl(records, "k4v4") < mean_kl(records, "k3v3") < mean_kl(records, "k2v2")


def test_one_raw_prefill_then_the_same_chunks_for_every_cache(tiny: LoadedModel) -> None:
    wrapped = Wrapped(tiny.model)
    specs = [CacheSpec("k4v4"), CacheSpec("k2v2")]
    SHORT.measure(replace(tiny, model=wrapped), 0, specs)
    assert wrapped.lengths == [100] + 3 * [8] + 3 * [8] + 3 * [8] + 3 * [6]


@pytest.mark.parametrize("name, windows", [("k4v4", 0), ("k2v2", 132)])
@pytest.mark.parametrize("prefix", [100, 200])
def test_packed_tokens_read_are_those_before_each_chunk(
    tiny: LoadedModel, name: str, windows: int, prefix: int
) -> None:
    record = replace(SHORT, prefix=prefix).measure(tiny, 0, [CacheSpec(name)])[name]
    expected = sum(max(0, prefix + begin - windows) for begin, _ in chunks(SHORT.scored, SHORT.chunk))
    assert record["packed_tokens_read"] == LAYERS * expected


def test_bypassing_the_packed_cache_is_an_error(tiny: LoadedModel) -> None:
    loaded = replace(tiny, model=Wrapped(tiny.model, bypass=True))
    run = start(loaded, tiny.text[:100], [CacheSpec("k4v4")])[0]
    with pytest.raises(PackedReadsError, match=f"read 0 packed tokens .* k4v4 cache, which holds {LAYERS * 100}"):
        feed(loaded, run, tiny.text[100:108])


@pytest.mark.parametrize("task", [SHORT, RetrievalTask("multikey-1k", prompts=1)], ids=["text", "retrieval"])
def test_every_task_notices_a_bypassed_cache(tiny: LoadedModel, task: Any) -> None:
    with pytest.raises(PackedReadsError):
        task.measure(replace(tiny, model=Wrapped(tiny.model, bypass=True)), 0, [CacheSpec("k4v4")])


def test_chunked_16_bit_logits_are_those_of_one_pass(tiny: LoadedModel) -> None:
    ids = tiny.text[:61]
    runs = start(tiny, ids[:40], [CacheSpec("16bit")])
    chunked = torch.cat([logits["16bit"] for _, logits in lock_step(tiny, runs, ids[40:], 7)])
    with torch.inference_mode():
        whole = tiny.model(torch.from_numpy(ids[None, :-1])).logits[0, 40:]
    assert kl_divergence(whole, chunked).max() < 1e-3


def test_targets_are_the_next_tokens(tiny: LoadedModel) -> None:
    ids = tiny.text[:61]
    runs = start(tiny, ids[:40], [CacheSpec("16bit")])
    targets = torch.cat([targets for targets, _ in lock_step(tiny, runs, ids[40:], 7)])
    assert targets.tolist() == ids[41:].tolist()


def test_measured_bytes_are_those_of_the_formats(tiny: LoadedModel) -> None:
    tokens = 320
    runs = start(tiny, tiny.text[:tokens], [CacheSpec("16bit"), CacheSpec("k4v4")])
    stock, packed = (run.nbytes for run in runs)
    assert stock == tokens * LAYERS * KV_HEADS * 4 * HEAD_DIM
    pages = tokens * LAYERS * KV_HEADS * KVFormat.from_name("k4v4", HEAD_DIM).bytes_per_token
    assert pages <= packed <= 1.1 * pages


def test_a_16_bit_copy_leaves_the_raw_cache_alone(tiny: LoadedModel) -> None:
    raw = DynamicCache()
    with torch.inference_mode():
        tiny.model(torch.from_numpy(tiny.text[None, :20]), past_key_values=raw)
        before = raw.layers[0].keys.clone()
        copy = from_raw(raw)
        tiny.model(torch.from_numpy(tiny.text[None, 20:25]), past_key_values=copy)
    assert raw.get_seq_length() == 20 and copy.get_seq_length() == 25
    assert torch.equal(raw.layers[0].keys, before) and copy.layers[0].keys.dtype == torch.bfloat16


def test_passages_start_with_the_models_start_token_and_span_the_text(tiny: LoadedModel) -> None:
    first, last = SHORT._passage(tiny, 0), SHORT._passage(tiny, 1)
    assert first[0] == last[0] == tiny.tokenizer.bos_token_id
    assert last[1:].tolist() == tiny.text[len(tiny.text) - 130 :].tolist()


def test_retrieval_counts_every_question(tiny: LoadedModel) -> None:
    task = RetrievalTask("multikey-1k", prompts=2)
    records = [task.measure(tiny, i, [CacheSpec("k4v4")])["k4v4"] for i in range(2)]
    figures = task.summarise(records)
    assert figures["questions"] == 16 and figures["low"] <= figures["accuracy"] <= figures["high"]
    assert records[0]["packed_tokens_read"] == LAYERS * records[0]["cache_tokens"]


@pytest.mark.parametrize(
    "task, message",
    [
        (TextTask(prefix=8000, scored=500), "at most the model's context of 8192, got 8500"),
        (TextTask(prefix=7000, scored=1000), "more than prefix \\+ scored = 8000 tokens"),
        (RetrievalTask("multikey-8k"), "text must have more than"),
    ],
)
def test_a_task_that_does_not_fit_says_why(tiny: LoadedModel, task: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.check(tiny)


@pytest.mark.parametrize("options", [{"texts": 0}, {"chunk": 0}, {"prefix": -1}, {"scored": 0}])
def test_text_options_must_be_positive(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got"):
        TextTask(**options)


def test_unknown_cache_lists_formats_and_baselines() -> None:
    assert check_name("k3v2-o32") == "k3v2-o32"
    assert check_name("vllm-4bit_nc") == "vllm-4bit_nc"
    with pytest.raises(ValueError, match="unknown format 'fp4'; valid formats: .*16bit.*k4v4, .*turboquant"):
        check_name("fp4")
