"""The Triton backend on a GPU at real shapes: against float64 attention over the same packed cache, in graphs, and its memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat, dequantize, quantize
from kvturbo.config import HEAD_DIMS, SIDES
from kvturbo.layout import PageLayout
from kvturbo.ops import decode, gather, store
from kvturbo.ops.schedule import plan
from kvturbo.ops.store.reference import store as reference_store
from support import channels_for, ints, relative_error, same_bits

pytestmark = pytest.mark.gpu

LENGTHS = [1000, 0, 1, 15, 33333, 16, 17]
HEADS = 2
BOUND = 1e-3
"""Relative L2 of fp32 decode."""


@dataclass
class Cache:
    """Sequences of many scales on a GPU, and what their pages stand for: k, v [L, heads, d] fp64 per sequence."""

    fmt: KVFormat
    channels: Tensor | None
    pages: Tensor
    block_table: Tensor
    seq_lens: Tensor
    k: list[Tensor]
    v: list[Tensor]

    @property
    def options(self) -> dict[str, Any]:
        return {"fmt": self.fmt, "outlier_channels": self.channels, "backend": "triton"}


def vectors(count: int, heads: int, d: int, generator: torch.Generator) -> Tensor:
    """Normal keys and values, [2, count, heads, d], their scales log-uniform over a factor of 1,000."""
    x = torch.randn(2, count, heads, d, generator=generator, device="cuda")
    return x * 10 ** (3 * torch.rand(2, count, heads, 1, generator=generator, device="cuda") - 1.5)


def cache_of(name: str, head_dim: int, lengths: list[int], page_size: int = 16, heads: int = HEADS) -> Cache:
    fmt = KVFormat.from_name(name, head_dim, seed=11)
    generator = torch.Generator("cuda").manual_seed(5)
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + 1, generator=generator, device="cuda").int()
    pages = torch.full((len(order), heads, fmt.page_bytes(page_size)), 0xFF, dtype=torch.uint8, device="cuda")
    table = torch.full((len(lengths), max(counts)), 2**31 - 1, dtype=torch.int32, device="cuda")
    channels = channels_for(fmt, heads)
    channels = None if channels is None else channels.cuda()
    result = Cache(fmt, channels, pages, table, torch.tensor(lengths, dtype=torch.int32, device="cuda"), [], [])
    used, layout = 0, PageLayout.of(fmt, page_size)
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count] = order[used : used + count]
        used += count
        position = torch.arange(length, device="cuda")
        slots = table[b].long()[position // page_size] * page_size + position % page_size
        k, v = vectors(length, heads, head_dim, generator)
        reference_store(k, v, pages, slots, fmt=fmt, outlier_channels=channels)
        block = pages[table[b, :count].long()].transpose(0, 1)
        for side, x in zip(SIDES, (result.k, result.v), strict=True):
            picked = None if channels is None else channels[:, None, None]
            y = dequantize(layout.read(block, side), fmt, side, picked).flatten(1, 2)[:, :length]
            x.append(y.transpose(0, 1).double())
    return result


def queries(cache: Cache, rows: int, group: int, std: float, dtype: torch.dtype) -> Tensor:
    """Queries whose scores (with scale 1) over the cache's keys have a standard deviation of about `std`."""
    generator = torch.Generator("cuda").manual_seed(8)
    heads = cache.pages.shape[1]
    q = torch.randn(rows, heads * group, cache.fmt.head_dim, generator=generator, device="cuda")
    keys = torch.cat([k.float() for k in cache.k])
    return (q * (std / keys.square().sum(-1).mean().sqrt())).to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, first: int, *, window: int | None = None, seq_start: int = 0,
              soft_cap: float | None = None, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One sequence in float64 with scale 1: q [n, Hq, d], k and v [L, Hkv, d] -> out [n, Hq, d], lse [n, Hq]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("nhd,lhd->hnl", q.double(), k)
    s = s if soft_cap is None else soft_cap * torch.tanh(s / soft_cap)
    at, key = first + torch.arange(len(q), device="cuda")[:, None], torch.arange(len(k), device="cuda")[None]
    seen = (key <= at) & (key >= seq_start) & ((key > at - window) if window is not None else True)
    s = torch.where(seen, s, -math.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.double()[:, None, None].expand(-1, len(q), 1)), -1)
        v = torch.cat((v, torch.zeros_like(v[:1])))
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1))
    return torch.einsum("hnl,lhd->nhd", p, v), lse.T


def oracle(cache: Cache, q: Tensor, q_lens: list[int] | None = None, seq_starts: list[int] | None = None,
           sinks: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.zeros(q.shape, dtype=torch.float64, device="cuda")
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64, device="cuda")
    if sinks is not None:
        lse[:] = sinks
    row = 0
    for b, (k, v) in enumerate(zip(cache.k, cache.v, strict=True)):
        n = 1 if q_lens is None else q_lens[b]
        rows, row = slice(row, row + n), row + n
        if len(k) and n:
            start = 0 if seq_starts is None else seq_starts[b]
            out[rows], lse[rows] = attention(q[rows], k, v, len(k) - n, seq_start=start, sinks=sinks, **options)
    return out, lse


def run(cache: Cache, q: Tensor, out: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    for name in ("q_lens", "seq_starts"):
        options[name] = ints(options.get(name), "cuda")
    return decode(
        q, cache.pages, cache.block_table, cache.seq_lens, scale=1.0, out=out, **options, **cache.options
    )  # fmt: skip


def check(cache: Cache, q: Tensor, **options: Any) -> None:
    out, lse = run(cache, q, torch.full(q.shape, math.nan, device="cuda"), **options)
    wanted_out, wanted_lse = oracle(cache, q, **options)
    finite = wanted_lse.isfinite()
    for h in range(q.shape[1]):  # head by head: no head may hide behind another
        assert relative_error(out[:, h], wanted_out[:, h]) <= BOUND
    assert torch.equal(lse[~finite].double(), wanted_lse[~finite])
    assert (lse - wanted_lse)[finite].abs().max() <= 2e-3


def check_all(cache: Cache, group: int) -> None:
    for std in (1.0, 8.0):
        for dtype in (torch.bfloat16, torch.float16):
            check(cache, queries(cache, len(cache.k), group, std, dtype))


@pytest.fixture(scope="module")
def plain() -> Cache:
    return cache_of("k4v4", 128, LENGTHS)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_decode_for_every_group(plain: Cache, group: int) -> None:
    check_all(plain, group)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_for_every_head_dim(head_dim: int) -> None:
    check_all(cache_of("k4v4", head_dim, LENGTHS, 32), 4)


FORMATS = ["k4v3", "k4v2", "k3v3", "k3v2", "k2v2", "k8v4", "lite4", "k4v4-o16", "k3v2-o32"]


@pytest.mark.parametrize("name", FORMATS)
def test_decode_for_every_format(name: str) -> None:
    check_all(cache_of(name, 128, LENGTHS, 64), 7)


@pytest.mark.parametrize(
    "name,head_dim", [("k3v3-o16", 80), ("k8v4", 112), ("k2v2-o16", 64), ("k4v2-o32", 192), ("k3v2", 96)]
)
def test_decode_of_formats_in_other_head_dims(name: str, head_dim: int) -> None:
    check_all(cache_of(name, head_dim, LENGTHS), 8)


@pytest.mark.parametrize("group", [4, 7])
@pytest.mark.parametrize("q_lens", [[2, 0, 1, 2, 2, 1, 2], [8, 0, 1, 3, 5, 8, 2]])
def test_several_queries_per_sequence_and_padding_rows(plain: Cache, q_lens: list[int], group: int) -> None:
    check(plain, queries(plain, sum(q_lens) + 3, group, 4.0, torch.bfloat16), q_lens=q_lens)


OPTIONS: list[dict[str, Any]] = [
    {"window": 1}, {"window": 300}, {"soft_cap": 3.0}, {"seq_starts": [900, 5, 0, 15, 129, 0, 3]},
    {"window": 5000, "soft_cap": 2.0, "seq_starts": [10, 0, 0, 3, 30000, 1, 2], "q_lens": [3, 0, 1, 2, 4, 1, 2]},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_decode_with_options(plain: Cache, options: dict[str, Any], has_sinks: bool) -> None:
    group = 4
    sinks = torch.linspace(-3, 5, HEADS * group, device="cuda") if has_sinks else None
    rows = sum(options.get("q_lens", [1] * len(LENGTHS)))
    check(plain, queries(plain, rows, group, 2.0, torch.bfloat16), sinks=sinks, **options)


def test_a_batch_of_many_short_sequences() -> None:
    lengths = [(37 * i) % 400 for i in range(300)]
    cache = cache_of("k4v4", 64, lengths)
    check(cache, queries(cache, 300, 4, 1.0, torch.bfloat16))


def test_decode_is_bitwise_deterministic(plain: Cache) -> None:
    q = queries(plain, len(LENGTHS), 4, 1.0, torch.bfloat16)
    first = run(plain, q)
    for _ in range(5):
        assert all(same_bits(a, b) for a, b in zip(first, run(plain, q), strict=True))


def test_a_graph_replays_with_other_lengths_and_tokens() -> None:
    """Store and decode captured once; replayed after lengths, slots, tokens and queries have changed in place."""
    cache = cache_of("k4v4", 128, [5000, 700, 0, 129])
    group, generator = 4, torch.Generator("cuda").manual_seed(2)
    q = queries(cache, 4, group, 1.0, torch.bfloat16)
    k, v = vectors(4, HEADS, 128, generator).bfloat16()
    seq_lens = torch.tensor([4000, 1, 0, 128], dtype=torch.int32, device="cuda")
    slots = torch.full((4,), -1, dtype=torch.int64, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        store(k, v, cache.pages, slots, **cache.options)
        schedule = plan(seq_lens)
        return decode(
            q, cache.pages, cache.block_table, seq_lens, scale=1.0, schedule=schedule, **cache.options
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for lengths in ([4000, 1, 0, 128], [4999, 650, 0, 17], [17, 0, 0, 129], [5000, 700, 0, 1]):
        seq_lens.copy_(torch.tensor(lengths))
        last = (seq_lens.long() - 1).clamp(min=0)
        at = cache.block_table.gather(1, (last // 16)[:, None])[:, 0].long() * 16 + last % 16
        slots.copy_(torch.where(seq_lens > 0, at, -1))
        k.copy_(vectors(4, HEADS, 128, generator)[0])
        q.copy_(queries(cache, 4, group, 1.0, torch.bfloat16).roll(lengths[0], 0))
        graph.replay()
        replayed = out.clone(), lse.clone()
        eager = step()
        assert all(same_bits(a, b) for a, b in zip(replayed, eager, strict=True))
        got = dequantize(quantize(k[:1], cache.fmt, "k"), cache.fmt, "k")
        stored, _ = gather(
            cache.pages, cache.block_table[:1], lengths[0] - 1, lengths[0], dtype=torch.float32, **cache.options
        )  # fmt: skip
        assert relative_error(stored[0], got) <= 1e-2
    graph.reset()


def test_memory_beside_the_results_is_bounded_whatever_the_lengths(plain: Cache) -> None:
    kernels = import_module("kvturbo.ops.decode.triton")
    q = queries(plain, len(LENGTHS), 4, 1.0, torch.bfloat16)
    out = torch.empty_like(q)
    run(plain, q, out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(plain, q, out)
    workers = kernels.num_workers(q.device, HEADS, 3)
    limit = kernels.workspace_bytes(len(q), workers, len(LENGTHS), HEADS * 4, 128) + 64 * 1024
    assert torch.cuda.max_memory_allocated() - before <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "name,head_dim", [("k4v4", 128), ("k3v2-o16", 80), ("k8v4", 256), ("k3v3", 112), ("k2v2-o32", 192)]
)
def test_store_of_many_scales_agrees_with_the_codec(name: str, head_dim: int, dtype: torch.dtype) -> None:
    """Codes equal for at least 99.9 % of vectors; where a rounding decided otherwise, the distortion is the same."""
    fmt, count = KVFormat.from_name(name, head_dim, seed=4), 20000
    generator = torch.Generator("cuda").manual_seed(1)
    k, v = vectors(count, HEADS, head_dim, generator).to(dtype)
    channels = channels_for(fmt, HEADS)
    channels = None if channels is None else channels.cuda()
    slots = torch.randperm(count + 16, generator=generator, device="cuda")[:count]
    slots[: count // 2] = torch.arange(count // 2, device="cuda")
    slots[count // 2 :] = slots[count // 2 :].sort().values + count  # distinct from the first half
    pages = torch.zeros(-(-int(slots.max() + 1) // 16), HEADS, fmt.page_bytes(16), dtype=torch.uint8, device="cuda")
    store(k, v, pages, slots, fmt=fmt, outlier_channels=channels, backend="triton")
    layout = PageLayout.of(fmt, 16)
    for side, x in zip(SIDES, (k, v), strict=True):
        packed, wanted = layout.read(pages, side), quantize(x, fmt, side, channels)
        codes, scales = packed.codes[slots // 16, :, slots % 16], packed.scales[slots // 16, :, slots % 16]
        equal = (codes == wanted.codes).all(-1)
        assert equal.float().mean() >= 0.999
        ulps = scales.view(torch.int16).int() - wanted.scales.view(torch.int16).int()
        assert ulps[equal].abs().max() <= 1
        every = dequantize(packed, fmt, side, None if channels is None else channels[:, None])
        got, best = every[slots // 16, :, slots % 16], dequantize(wanted, fmt, side, channels)
        distortions = [(y.double() - x.double()).square().sum(-1) for y in (got, best)]
        assert ((distortions[0] - distortions[1]).abs() <= 1e-2 * distortions[1]).all()
        assert abs(distortions[0].sum() / distortions[1].sum() - 1) <= 1e-4


def test_warm_kernels_do_not_compile_again(plain: Cache) -> None:
    """After a warm-up, other batch sizes, lengths and tables launch what is there."""
    kernels = import_module("kvturbo.ops.decode.triton")
    kernels.warmup(plain.fmt, num_q_heads=8, num_kv_heads=HEADS, page_size=16, dtype=torch.bfloat16, device="cuda")
    stored = import_module("kvturbo.ops.store.triton")
    stored.warmup(plain.fmt, num_kv_heads=HEADS, page_size=16, dtype=torch.bfloat16, device="cuda")
    compiled = [kernels._rotate_queries, kernels._attend, kernels._merge, stored._store]

    def variants() -> int:
        return sum(len(cache[0]) for kernel in compiled for cache in kernel.device_caches.values())

    before = variants()
    for lengths in ([3], [700, 1], [16, 17, 1000, 5, 0], [1] * 200):
        cache = cache_of("k4v4", 128, lengths)
        q = queries(cache, len(lengths), 4, 1.0, torch.bfloat16)
        run(cache, q)
        k, v = vectors(len(lengths), HEADS, 128, torch.Generator("cuda")).bfloat16()
        store(k, v, cache.pages, torch.full((len(lengths),), -1, device="cuda"), **cache.options)
    assert variants() == before
