"""What a TurboCache takes: compared with the storages that are alive, not with a formula."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf.models import feed, prompt, tiny
from kvturbo import KVFormat, OutOfPagesError
from kvturbo.hf import TurboCache


def live() -> dict[int, tuple[int, bool]]:
    """Storages of all tensors alive: address -> bytes, and whether they hold floating point numbers."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is Tensor]
    return {x.untyped_storage().data_ptr(): (x.untyped_storage().nbytes(), x.is_floating_point()) for x in tensors}


def prefill(model: Any, cache: Any, tokens: int, rows: int = 2, mask: Tensor | None = None) -> None:
    feed(model, cache, prompt(rows, tokens), [tokens - 1, 1], mask)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
@pytest.mark.parametrize("name, windows", [("k4v4", (0, 0)), ("k2v2", (4, 32))])
@pytest.mark.parametrize("padded", [False, True])
def test_nbytes_is_what_is_allocated_and_nothing_else_stays(
    family: str, name: str, windows: tuple[int, int], padded: bool
) -> None:
    model = tiny(family)
    model.set_attn_implementation("kvturbo")
    mask = torch.ones(2, 200, dtype=torch.int64)
    mask[0, :9] = 0 if padded else 1
    options = dict(zip(("sink", "recent"), windows, strict=True))
    prefill(model, TurboCache(model.config, name, **options), 200, mask=mask)  # fills the caches of constants
    before = live()
    cache = TurboCache(model.config, name, **options)
    prefill(model, cache, 200, mask=mask)
    new = {address: x for address, x in live().items() if address not in before and x[0]}
    small = 8 * sum("window_tensor" in name for layer in cache.layers for name in vars(layer))
    assert abs(sum(nbytes for nbytes, _ in new.values()) - cache.nbytes()) <= small
    if family == "llama":
        window_bytes = sum(windows) * 2 * 2 * 2 * 2 * 64 * 2  # rows, layers, sides, heads, head_dim, 16 bits
        assert sum(nbytes for nbytes, floating in new.values() if floating) == window_bytes


def test_bytes_per_token_are_the_formats() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, "k4v3")
    prefill(model, cache, 64)
    per_token = KVFormat.from_name("k4v3", 64).bytes_per_token * 2 * 2  # KV heads, layers
    assert cache.tokens == 128 and cache.packed_tokens == 256
    assert cache.bytes_per_token == per_token
    assert cache.sixteen_bit_nbytes() == 128 * 2 * 2 * 2 * 64 * 2
    assert cache.nbytes() < 0.4 * cache.sixteen_bit_nbytes()


def test_windows_count_as_bytes() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, "k4v4", sink=4, recent=12)
    prefill(model, cache, 48)
    packed, window = KVFormat.from_name("k4v4", 64).bytes_per_token, 2 * 64 * 2
    assert cache.packed_tokens == 2 * 2 * 32
    assert cache.bytes_used == 2 * 2 * 2 * (32 * packed + 16 * window)  # rows, layers, KV heads


def test_pages_grow_by_little() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, "k4v4", page_size=16)
    feed(model, cache, prompt(2, 100), [100])
    pages = cache.store.groups[0].pages
    assert pages.num_pages == 2 * 7
    for seed in range(60):
        feed(model, cache, prompt(2, 1, seed), [1])
        used = pages.num_pages - pages.num_free_pages
        assert used == 2 * -(-(101 + seed) // 16) and pages.num_pages <= 1.125 * used + 1


def test_forks_share_pages_and_give_them_back() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, "k4v4")
    prefill(model, cache, 64)
    alone = cache.bytes_used
    cache.batch_repeat_interleave(3)
    assert cache.bytes_used == alone and cache.tokens == 6 * 64
    cache.batch_select_indices(torch.tensor([True, False, False, True, False, False]))
    assert cache.bytes_used == alone and cache.tokens == 2 * 64


def test_reset_gives_the_pages_back() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, "k2v2")
    prefill(model, cache, 40)
    cache.reset()
    assert cache.nbytes() == 0 and cache.get_seq_length() == 0
    want = feed(model, TurboCache(model.config, "k2v2"), prompt(1, 20), [12, 8])
    torch.testing.assert_close(feed(model, cache, prompt(1, 20), [12, 8]), want)


@pytest.mark.parametrize("format", ["k4v4", ["k4v4", "k2v2"], ["k2v2", "k4v4"]])
def test_max_tokens_fixes_the_size_and_overflow_changes_nothing(format: Any) -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, format, max_tokens=48, page_size=16)
    assert cache.get_max_length() == 48
    feed(model, cache, prompt(2, 40), [40])
    before = cache.nbytes(), cache.tokens, cache.packed_tokens
    pages = [x.clone() for group in cache.store.groups for x in group.pages.pages]
    with pytest.raises(OutOfPagesError, match="missing") as error:
        feed(model, cache, prompt(2, 30, seed=1), [30])
    assert error.value.missing == 4
    assert (cache.nbytes() <= before[0]) and (cache.tokens, cache.packed_tokens) == before[1:]
    assert all(
        torch.equal(x, y) for x, y in zip(pages, (x for g in cache.store.groups for x in g.pages.pages), strict=True)
    )
    got = feed(model, cache, prompt(2, 8, seed=2), [8])
    other = TurboCache(model.config, format)
    feed(model, other, prompt(2, 40), [40])
    torch.testing.assert_close(got, feed(model, other, prompt(2, 8, seed=2), [8]))


def test_overflow_of_an_empty_cache_leaves_it_empty() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, "k4v4", max_tokens=16, page_size=16)
    with pytest.raises(OutOfPagesError, match="2 needed, 1 of 1 free, 1 missing"):
        feed(model, cache, prompt(1, 20), [20])
    assert cache.tokens == 0 and cache.nbytes() == 0
    feed(model, cache, prompt(3, 16), [16])
    assert cache.tokens == 48


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_next"])
def test_from_cache_packs_what_a_prefill_would_and_leaves_the_source(family: str) -> None:
    model, ids = tiny(family), prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    raw = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    feed(model, raw, ids, [40], mask)
    kept = copy.deepcopy(raw)
    model.set_attn_implementation("kvturbo")
    for name in ("k4v4", "k2v2"):
        packed = TurboCache.from_cache(model.config, raw, name, attention_mask=mask)
        direct = TurboCache(model.config, name)
        feed(model, direct, ids, [40], mask)
        assert packed.tokens == 69 and packed.bytes_used == direct.bytes_used
        longer = torch.cat((mask, torch.ones(2, 9, dtype=torch.int64)), 1)
        new = {"input_ids": prompt(2, 9, seed=3), "attention_mask": longer}
        new["position_ids"] = (longer.cumsum(1) - 1)[:, 40:]
        got, want = (model(**new, past_key_values=cache).logits for cache in (packed, direct))
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    for now, then in zip(raw.layers, kept.layers, strict=True):
        for name, value in vars(then).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(now, name), value)


def test_packed_tokens_read_counts_what_was_there_before() -> None:
    model = tiny("gemma3")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, "k4v4")
    feed(model, cache, prompt(2, 40), [20, 10, 9, 1])
    assert cache.packed_tokens_read == 2 * (20 + 30 + 39)
