"""The store kernel on a GPU, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import (
    check_not_finite,
    check_pages,
    check_recent_copies,
    check_store,
    mixed_slots,
    random_pages,
    vectors,
)
from kvturbo import KVFormat
from kvturbo.config import HEAD_DIMS, PAGE_SIZES
from kvturbo.ops.store import cuda as store
from kvturbo.ops.store.reference import store as reference_store
from support import channels_for

pytestmark = pytest.mark.gpu
NAMES = ("k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k2v2", "k8v4", "lite4", "k4v4-o16", "k3v3-o16", "k2v2-o32")
DEVICE = torch.device("cuda", 0)


@pytest.fixture(params=[1, 8], ids=["single tokens", "octets"])
def span(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(store, "_MOST_SINGLE", 10**9 if request.param == 1 else 0)
    return request.param


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_codes_are_the_references(span: int, head_dim: int, name: str) -> None:
    if name == "k2v2-o32" and head_dim < 128:
        pytest.skip("no such format")
    page_size = PAGE_SIZES[HEAD_DIMS.index(head_dim) % 3]
    fmt = KVFormat.from_name(name, head_dim, seed=1)
    slots = mixed_slots(page_size)
    check_store(store.store, fmt, page_size, slots, *vectors(fmt, len(slots), 3), DEVICE)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(
    "name,head_dim", [("k4v4", 128), ("k3v3", 128), ("k2v2", 128), ("lite4", 80), ("k4v4-o16", 80)]
)
def test_codes_of_a_long_prefill_are_the_references(span: int, name: str, head_dim: int, page_size: int) -> None:
    fmt = KVFormat.from_name(name, head_dim)
    slots = torch.randperm(40)[:32].repeat_interleave(page_size) * page_size + torch.arange(page_size).repeat(32)
    check_store(store.store, fmt, page_size, slots[3:-2], *vectors(fmt, len(slots) - 5, 4), DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name,head_dim,page_size", [("k4v4", 128, 32), ("k3v3-o16", 80, 16), ("k8v4", 192, 64)])
def test_tokens_are_copied_into_rings(span: int, name: str, head_dim: int, page_size: int, dtype: torch.dtype) -> None:
    fmt, slots = KVFormat.from_name(name, head_dim, seed=1), mixed_slots(page_size)
    k, v = (x.to(dtype) for x in vectors(fmt, len(slots), 3))
    check_recent_copies(store.store, fmt, page_size, slots, k, v, DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_and_rows_of_a_larger_tensor(span: int, dtype: torch.dtype) -> None:
    fmt = KVFormat.from_name("k4v3", 128)
    slots = mixed_slots(16)
    k, v = vectors(fmt, len(slots), 3)
    qkv = torch.cat((torch.full_like(k, torch.nan), k, v), dim=1).to(dtype)  # as a model's projection gives them

    def store_views(k: torch.Tensor, v: torch.Tensor, *args: object, **kwargs: object) -> None:
        whole = qkv.to(DEVICE)
        store.store(whole[:, 3:6], whole[:, 6:], *args, **kwargs)

    check_store(store_views, fmt, 16, slots, qkv[:, 3:6], qkv[:, 6:], DEVICE)


@pytest.mark.parametrize("name", ["k4v4", "k3v2", "k8v4", "lite4", "k4v4-o16"])
def test_what_is_not_finite_stays_in_its_vector(span: int, name: str) -> None:
    check_not_finite(store.store, KVFormat.from_name(name, 128), 16, 16, DEVICE)


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2"])
@pytest.mark.parametrize("head_dim", [80, 128])
def test_owners_of_one_word_do_not_disturb_each_other(
    head_dim: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens of 64 pages in random order, each by its own warp: the same bytes every time, and those of octets but for ties."""
    fmt, generator = KVFormat.from_name(name, head_dim), torch.Generator().manual_seed(9)
    k, v = vectors(fmt, 1024, 2)
    before = random_pages(fmt, 16, 65, 2)
    slots = torch.randperm(1024, generator=generator)
    results = []
    for most_single in (10**9, 0, 10**9):
        monkeypatch.setattr(store, "_MOST_SINGLE", most_single)
        pages = before.to(DEVICE)
        order = torch.randperm(1024, generator=generator) if most_single else slots.argsort()
        store.store(k[order].to(DEVICE), v[order].to(DEVICE), pages, slots[order].to(DEVICE), fmt=fmt)
        results.append(pages.cpu())
    assert torch.equal(results[0], results[2])
    check_pages(fmt, 16, slots, before, results[1], results[0], {"k": k, "v": v}, None)


def test_skipped_tokens_write_nothing(span: int) -> None:
    fmt = KVFormat.from_name("k4v4", 128)
    k, v = (x.to(DEVICE) for x in vectors(fmt, 64, 2))
    pages = random_pages(fmt, 16, 4, 2).to(DEVICE)
    before = pages.clone()
    store.store(k, v, pages, torch.full((64,), -1, device=DEVICE), fmt=fmt)
    store.store(k[:0], v[:0], pages, torch.empty(0, dtype=torch.int64, device=DEVICE), fmt=fmt)
    assert torch.equal(pages, before)


def test_pages_of_an_interleaved_pool(span: int) -> None:
    """Pages whose stride is larger than their heads: one layer of a pool that holds several."""
    fmt = KVFormat.from_name("k3v3-o16", 112)
    channels = channels_for(fmt, 2)
    assert channels is not None
    pool = random_pages(fmt, 16, 12, 2).view(4, 3, 2, -1)
    slots = torch.arange(5, 60)
    k, v = vectors(fmt, len(slots), 2)
    wanted = pool.clone()
    reference_store(k, v, wanted[:, 1], slots, fmt=fmt, outlier_channels=channels)
    got = pool.to(DEVICE)
    store.store(k.to(DEVICE), v.to(DEVICE), got[:, 1], slots.to(DEVICE), fmt=fmt, outlier_channels=channels.to(DEVICE))
    assert torch.equal(got.cpu()[:, ::2], pool[:, ::2]), "another layer's pages"
    assert (got.cpu() != wanted).float().mean() < 1e-3


def test_a_captured_graph_stores_the_next_tokens() -> None:
    fmt = KVFormat.from_name("k4v4", 128)
    store.warmup(fmt, num_kv_heads=2, page_size=16, dtype=torch.float32, device=DEVICE)
    k, v = (x.to(DEVICE) for x in vectors(fmt, 8, 2))
    pages = random_pages(fmt, 16, 4, 2).to(DEVICE)
    slots = torch.arange(8, device=DEVICE)
    eager = pages.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        store.store(k, v, pages, slots, fmt=fmt)
    slots += 20
    graph.replay()
    store.store(k, v, eager, slots, fmt=fmt)
    assert torch.equal(pages, eager)
