"""Store: against quantise and layout, and what it must leave alone."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernel_checks import check_recent_copies, mixed_slots
from kvturbo import KVFormat, dequantize, quantize
from kvturbo.config import SIDES
from kvturbo.layout import PageLayout
from kvturbo.ops import store
from support import (
    BACKENDS_UNDER_TEST,
    backend_formats,
    channels_for,
    device_of,
    every_head_dim,
    interpreted,
    same_bits,
    vectors_equal,
)

HEADS = 2
SLOTS = [37, 3, 16, 17, 18, 19, 20, 21, 22, 23, 63, 5]  # a whole octet and parts of others, out of order


def random_pages(fmt: KVFormat, page_size: int = 16, num_pages: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (num_pages, HEADS, fmt.page_bytes(page_size))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def tokens(fmt: KVFormat, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, count, HEADS, fmt.head_dim, generator=generator)
    return k.to(dtype), v.to(dtype)


def stored(backend: str, fmt: KVFormat, k: Tensor, v: Tensor, pages: Tensor, slots: list[int]) -> Tensor:
    """Pages after a store by the backend, on the host; `pages` itself is left alone."""
    device = device_of(backend)
    pages, channels = pages.to(device, copy=True), channels_for(fmt, HEADS)
    channels = None if channels is None else channels.to(device)
    mapping = torch.tensor(slots, dtype=torch.int64, device=device)
    store(k.to(device), v.to(device), pages, mapping, fmt=fmt, outlier_channels=channels, backend=backend)
    return pages.cpu()


def check_store(backend: str, fmt: KVFormat, page_size: int, dtype: torch.dtype = torch.float32) -> None:
    before = random_pages(fmt, page_size)
    k, v = tokens(fmt, len(SLOTS), dtype=dtype)
    after = stored(backend, fmt, k, v, before, SLOTS)
    layout = PageLayout.of(fmt, page_size)
    page, slot = torch.tensor(SLOTS) // page_size, torch.tensor(SLOTS) % page_size
    owned = torch.zeros(4, HEADS, page_size, dtype=torch.bool)
    owned[page, :, slot] = True
    for side, x in zip(SIDES, (k, v), strict=True):
        old, new, want = layout.read(before, side), layout.read(after, side), layout.read(before, side)
        packed = quantize(x, fmt, side, channels_for(fmt, HEADS))
        for name in vars(packed):
            if getattr(packed, name) is not None:
                getattr(want, name)[page, :, slot] = getattr(packed, name)
        assert vectors_equal(new, old)[~owned].all(), f"a {side} of another slot changed"
        equal = vectors_equal(new, want)[owned]
        assert equal.all() if backend == "reference" else equal.float().mean() >= 0.99


@pytest.mark.parametrize("backend,fmt", backend_formats("store"))
def test_store_writes_the_quantised_vectors_and_nothing_else(backend: str, fmt: KVFormat) -> None:
    check_store(backend, fmt, 16)


@pytest.mark.parametrize("backend,fmt,page_size", every_head_dim("store", ["k4v4-o16", "k3v2", "k8v4"]))
def test_store_for_every_head_dim_and_page_size(backend: str, fmt: KVFormat, page_size: int) -> None:
    check_store(backend, fmt, page_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend,fmt", backend_formats("store", ["k4v3"], 64))
def test_store_takes_every_float(backend: str, fmt: KVFormat, dtype: torch.dtype) -> None:
    check_store(backend, fmt, 16, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend,fmt", backend_formats("store"))
def test_store_of_many_tokens_agrees_with_quantise(backend: str, fmt: KVFormat) -> None:
    slots = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[:3000].tolist()
    k, v = tokens(fmt, len(slots))
    after = stored(backend, fmt, k, v, random_pages(fmt, 16, 256), slots)
    page, slot = torch.tensor(slots) // 16, torch.tensor(slots) % 16
    for side, x in zip(SIDES, (k, v), strict=True):
        got, want = PageLayout.of(fmt, 16).read(after, side), quantize(x, fmt, side, channels_for(fmt, HEADS))
        for name in vars(got):
            if getattr(got, name) is not None:
                setattr(got, name, getattr(got, name)[page, :, slot])
        assert vectors_equal(got, want).float().mean() >= 0.999


@pytest.mark.parametrize("backend,fmt", backend_formats("store", ["k4v4", "k3v2-o16"], 64))
def test_slot_minus_one_is_skipped(backend: str, fmt: KVFormat) -> None:
    k, v = tokens(fmt, 4)
    pages = random_pages(fmt)
    all_but = stored(backend, fmt, k[[0, 2]], v[[0, 2]], pages, [9, 40])
    assert same_bits(stored(backend, fmt, k, v, pages, [9, -1, 40, -1]), all_but)
    assert same_bits(stored(backend, fmt, k, v, pages, [-1] * 4), pages)


RINGS = [("k4v4-o16", 128, 16, torch.bfloat16), ("k3v2", 80, 32, torch.float16), ("k8v4", 192, 64, torch.float32)]


@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
@pytest.mark.parametrize("name,head_dim,page_size,dtype", RINGS)
def test_tokens_are_copied_into_rings(
    backend: str, name: str, head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    fmt, slots = KVFormat.from_name(name, head_dim, seed=5), mixed_slots(page_size)
    k, v = tokens(fmt, len(slots), dtype=dtype)
    run = functools.partial(store, backend=backend)
    check_recent_copies(run, fmt, page_size, slots, k, v, device_of(backend))


@pytest.mark.parametrize("backend,fmt", backend_formats("store", ["k4v4"], 64))
def test_no_tokens_change_nothing(backend: str, fmt: KVFormat) -> None:
    pages = random_pages(fmt)
    assert same_bits(stored(backend, fmt, *tokens(fmt, 0), pages, []), pages)


@pytest.mark.parametrize("backend,fmt", backend_formats("store", ["k4v4", "k3v3", "k2v2", "k8v4", "k4v2-o16"], 64))
def test_rewriting_a_slot_leaves_no_trace_of_what_was_there(backend: str, fmt: KVFormat) -> None:
    first, second = tokens(fmt, 5, seed=1), tokens(fmt, 5, seed=2)
    pages, slots = random_pages(fmt), [4, 5, 6, 30, 31]
    twice = stored(backend, fmt, *second, stored(backend, fmt, *first, pages, slots), slots)
    assert same_bits(twice, stored(backend, fmt, *second, pages, slots))


IN_PARTS = backend_formats("store", ["k4v4", "k3v2", "k2v2-o16", "k8v4"], 80)


@pytest.mark.parametrize("backend,fmt", [p for p in IN_PARTS if not interpreted(str(p.values[0]))])
@given(order=st.permutations(range(11)), cuts=st.sets(st.integers(1, 10)))
def test_tokens_stored_in_any_order_and_split_give_the_same_bytes(
    backend: str, fmt: KVFormat, order: list[int], cuts: set[int]
) -> None:
    check_parts(backend, fmt, order, cuts)


@pytest.mark.parametrize("backend,fmt", IN_PARTS)
def test_tokens_stored_one_by_one_give_the_same_bytes(backend: str, fmt: KVFormat) -> None:
    check_parts(backend, fmt, [7, 3, 10, 0, 5, 1, 9, 2, 8, 4, 6], set(range(1, 11)))


def check_parts(backend: str, fmt: KVFormat, order: list[int], cuts: set[int]) -> None:
    k, v = tokens(fmt, 11)
    slots = [*range(13, 24)]  # the end of one octet, a whole one
    pages = random_pages(fmt)
    at_once = stored(backend, fmt, k, v, pages, slots)
    bounds = [0, *sorted(cuts), 11]
    for start, stop in itertools.pairwise(bounds):
        part = order[start:stop]
        pages = stored(backend, fmt, k[part], v[part], pages, [slots[i] for i in part])
    assert same_bits(pages, at_once)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend,fmt", backend_formats("store", ["k4v4", "k2v2", "k8v4", "k3v3-o16", "lite4"], 64))
def test_a_vector_that_is_not_finite_becomes_nan_and_touches_no_other(
    backend: str, fmt: KVFormat, poison: float
) -> None:
    k, v = tokens(fmt, 8)
    pages, slots = random_pages(fmt), list(range(8, 16))
    clean = stored(backend, fmt, k, v, pages, slots)
    k[3, 1, 5] = v[6, 0, 63] = poison
    layout, channels = PageLayout.of(fmt, 16), channels_for(fmt, HEADS)
    assert channels is None or 5 not in channels[1], "this test is about the rotated part"
    dirty = stored(backend, fmt, k, v, pages, slots)
    for side, head, token in (("k", 1, 3), ("v", 0, 6)):
        old, new = layout.read(clean, side), layout.read(dirty, side)
        same = vectors_equal(old, new)
        same[0, head, 8 + token] = True
        assert same.all()
        x = dequantize(new, fmt, side, None if channels is None else channels[:, None, :])[0, head, 8 + token]
        untouched = channels[head] if channels is not None and side == "k" else torch.empty(0, dtype=torch.int64)
        rest = torch.ones(64, dtype=torch.bool).index_fill(0, untouched, False)
        assert x[rest].isnan().all()


@pytest.mark.parametrize("backend,fmt", backend_formats("store", ["k4v4-o16"], 64))
def test_store_is_deterministic(backend: str, fmt: KVFormat) -> None:
    k, v = tokens(fmt, 40)
    slots = random.Random(0).sample(range(64), 40)
    results = [stored(backend, fmt, k, v, random_pages(fmt), slots) for _ in range(3)]
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])
