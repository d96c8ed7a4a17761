"""`generate` with a TurboCache: greedy, padded batches, several turns, sampling, beams, assistance, interleaving, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf.models import FAMILIES, fake_cache, feed, prompt, tiny
from kvturbo.hf import TurboCache

NEW = 12
PADDING = 7


def generate(model: Any, cache: Any, ids: Tensor, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    """The new tokens [rows, new]."""
    model.set_attn_implementation("kvturbo" if isinstance(cache, TurboCache) else "sdpa")
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, ids.shape[1] :]


def same_logits(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_fake_quantisation(family: str) -> None:
    model, ids = tiny(family), prompt(2, 21)
    want = generate(model, fake_cache(model.config, "k4v4"), ids)
    assert torch.equal(generate(model, TurboCache(model.config), ids), want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name, windows", [("k4v4", (0, 0)), ("k3v3", (3, 6))])
def test_rows_of_a_padded_batch_equal_the_rows_alone(family: str, name: str, windows: tuple[int, int]) -> None:
    model, sizes = tiny(family), [19, 1, 1, 5, 12, 1, 9]
    model.set_attn_implementation("kvturbo")
    options = dict(zip(("sink", "recent"), windows, strict=True))
    ids = prompt(2, sum(sizes))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    batch = feed(model, TurboCache(model.config, name, **options), ids, sizes, mask)
    alone = feed(model, TurboCache(model.config, name, **options), ids[:1], sizes)
    same_logits(batch[:1], alone)
    short = feed(model, TurboCache(model.config, name, **options), ids[1:, PADDING:], [sizes[0] - PADDING, *sizes[1:]])
    same_logits(batch[1:, PADDING:], short)


def test_generate_with_left_padding_equals_the_rows_alone() -> None:
    model, ids = tiny("qwen3"), prompt(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :13] = 0, 0
    cache = TurboCache(model.config)
    got = generate(model, cache, ids * mask, mask=mask)
    for row, start in enumerate((0, 5, 13)):
        alone = generate(model, TurboCache(model.config), ids[row : row + 1, start:])
        assert torch.equal(got[row : row + 1], alone)
    assert cache.tokens == 3 * 19 + 3 * NEW - 5 - 13 and cache.get_seq_length() == 20 + NEW - 1


@pytest.mark.parametrize("name, windows", [("k4v4", (0, 0)), ("k2v2", (2, 9))])
def test_padding_between_turns_is_left_out(name: str, windows: tuple[int, int]) -> None:
    """Row 0 has no second turn of its own length: its padding lies between tokens."""
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    options = dict(zip(("sink", "recent"), windows, strict=True))
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[0, 15:24] = 0
    sizes = [15, 20, 1, 4]
    batch = feed(model, TurboCache(model.config, name, **options), ids, sizes, mask)
    alone = feed(model, TurboCache(model.config, name, **options), ids[:1][:, mask[0].bool()], [15, 11, 1, 4])
    same_logits(batch[:1][:, mask[0].bool()], alone)


def test_tokens_that_the_mask_hides_at_a_rows_end_are_dropped() -> None:
    """A row that ended early goes on as if what was generated after its end had never been there."""
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    ids = prompt(2, 30)
    cache = TurboCache(model.config)
    feed(model, cache, ids[:, :21], [18, 1, 1, 1])
    mask = torch.ones_like(ids)
    mask[0, 19:21] = 0
    positions = (mask.cumsum(1) - 1)[:, 21:]
    got = model(ids[:, 21:], attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    alone = feed(model, TurboCache(model.config), torch.cat((ids[:1, :19], ids[:1, 21:]), 1), [18, 1, 9])
    same_logits(got[:1], alone[:, 19:])
    assert cache.tokens == 60 - 2


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_a_second_turn_reuses_the_cache(family: str) -> None:
    model, ids = tiny(family), prompt(1, 20)
    results = []
    for cache in (fake_cache(model.config, "k4v4"), TurboCache(model.config)):
        first = torch.cat((ids, generate(model, cache, ids)), 1)
        second = torch.cat((first, prompt(1, 15, seed=1)), 1)
        results.append(generate(model, cache, second))
        assert cache.get_seq_length() == second.shape[1] + NEW - 1
    assert torch.equal(*results)


def test_chunked_prefill_of_generate() -> None:
    model, ids = tiny("llama"), prompt(2, 30)
    results = [
        generate(model, cache, ids, prefill_chunk_size=11)
        for cache in (fake_cache(model.config, "k4v4"), TurboCache(model.config))
    ]
    assert torch.equal(*results)


def test_sampling_draws_the_same_tokens() -> None:
    model, ids = tiny("llama"), prompt(2, 20)
    results = []
    for cache in (fake_cache(model.config, "k4v4"), TurboCache(model.config)):
        torch.manual_seed(5)
        results.append(generate(model, cache, ids, do_sample=True, temperature=0.8, num_return_sequences=2))
    assert torch.equal(*results)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name, windows", [("k4v4", (0, 0)), ("k2v2", (2, 9))])
def test_beam_search_finds_the_same_beams(family: str, name: str, windows: tuple[int, int]) -> None:
    model, ids = tiny(family), prompt(2, 20)
    caches = (
        fake_cache(model.config, name, *windows),
        TurboCache(model.config, name, sink=windows[0], recent=windows[1]),
    )
    results = [generate(model, cache, ids, num_beams=3) for cache in caches]
    assert torch.equal(*results)


@pytest.mark.parametrize("name, windows", [("k4v4", (0, 0)), ("k3v3", (2, 9))])
def test_assisted_generation_rolls_back(name: str, windows: tuple[int, int]) -> None:
    model, assistant, ids = tiny("llama"), tiny("mistral"), prompt(1, 20)
    assistant.set_attn_implementation("sdpa")
    caches = (
        fake_cache(model.config, name, *windows),
        TurboCache(model.config, name, sink=windows[0], recent=windows[1]),
    )
    results = [generate(model, cache, ids, assistant_model=assistant) for cache in caches]
    assert torch.equal(*results)


def test_two_caches_interleaved_do_not_meet() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    ids = [prompt(1, 33, seed=seed) for seed in (3, 4)]
    sizes = [20, 1, 9, 3]
    apart = [feed(model, TurboCache(model.config), x, sizes) for x in ids]
    caches = [TurboCache(model.config), TurboCache(model.config, "k4v4", page_size=32)]
    pieces: list[list[Tensor]] = [[], []]
    start = 0
    for size in sizes:
        for i, cache in enumerate(caches):
            pieces[i].append(feed(model, cache, ids[i][:, start : start + size], [size]))
        start += size
    for got, want in zip(pieces, apart, strict=True):
        torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
def test_copies_of_a_prompts_cache_go_their_own_ways(family: str) -> None:
    model, ids = tiny(family), prompt(1, 30)
    model.set_attn_implementation("kvturbo")
    shared = TurboCache(model.config)
    feed(model, shared, ids[:, :20], [20])
    for seed in (1, 2):
        new = prompt(1, 10, seed)
        want = feed(model, TurboCache(model.config), torch.cat((ids[:, :20], new), 1), [20, 9, 1])[:, 20:]
        model.set_attn_implementation("sdpa")  # a copy follows the model, as the original does
        copied = copy.deepcopy(shared)
        model.set_attn_implementation("kvturbo")
        torch.testing.assert_close(feed(model, copied, new, [9, 1]), want, atol=1e-5, rtol=1e-5)
    assert shared.get_seq_length() == 20


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("name, windows", [("k4v4", (0, 0)), ("k2v2", (2, 9))])
def test_a_saved_cache_goes_on_as_if_nothing_had_happened(
    family: str, name: str, windows: tuple[int, int], tmp_path: Path
) -> None:
    model, ids = tiny(family), prompt(2, 30)
    model.set_attn_implementation("kvturbo")
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = dict(zip(("sink", "recent"), windows, strict=True))
    want = feed(model, TurboCache(model.config, name, **options), ids, [20, 1, 8, 1], mask)
    cache = TurboCache(model.config, name, **options)
    feed(model, cache, ids[:, :21], [20, 1], mask)
    cache.save(tmp_path / "chat.safetensors")
    resumed = TurboCache.load(tmp_path / "chat.safetensors", model.config)
    assert resumed.get_seq_length() == 21 and resumed.bytes_used == cache.bytes_used
    positions = (mask.cumsum(1) - 1)[:, 21:29]
    got = model(ids[:, 21:29], attention_mask=mask[:, :29], position_ids=positions, past_key_values=resumed).logits
    torch.testing.assert_close(got, want[:, 21:29], atol=1e-5, rtol=1e-5)
