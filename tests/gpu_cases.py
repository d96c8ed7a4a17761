"""What the tests on a GPU share: a cache at real lengths, queries of a given spread, and float64 attention as the oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvturbo import KVFormat, dequantize
from kvturbo.config import SIDES
from kvturbo.layout import PageLayout
from kvturbo.ops import decode
from kvturbo.ops.store.reference import store as reference_store
from support import channels_for, ints

BOUND = {"triton": (1e-3, 0.0), "cuda": (5e-4, 3e-5)}
"""Relative L2 of fp32 decode, of the worst head: a constant, and a share of its largest score, which int8 halves of the query leave
an error of 3e-5 of (docs/kernels.md)."""


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
        return {"fmt": self.fmt, "outlier_channels": self.channels}


def vectors(count: int, heads: int, d: int, generator: torch.Generator) -> Tensor:
    """Normal keys and values, [2, count, heads, d], their scales log-uniform over a factor of 1,000."""
    x = torch.randn(2, count, heads, d, generator=generator, device="cuda")
    return x * 10 ** (3 * torch.rand(2, count, heads, 1, generator=generator, device="cuda") - 1.5)


def cache_of(name: str, head_dim: int, lengths: list[int], page_size: int = 16, heads: int = 2) -> Cache:
    """Sequences in pages in random order; 0xFF (NaN scales) before and after every block, and wherever no token lies."""
    fmt = KVFormat.from_name(name, head_dim, seed=11)
    generator = torch.Generator("cuda").manual_seed(5)
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + 1, generator=generator, device="cuda").int()
    room = torch.full((len(order) + 1, heads + 1, fmt.page_bytes(page_size)), 0xFF, dtype=torch.uint8, device="cuda")
    pages = room[:-1, 1:]
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
              soft_cap: float | None = None, sinks: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One sequence in float64, scale 1: q [n, Hq, d], k and v [L, Hkv, d] -> out [n, Hq, d], lse [n, Hq], size of scores [Hq]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = torch.einsum("nhd,lhd->hnl", q.double(), k)
    s = s if soft_cap is None else soft_cap * torch.tanh(s / soft_cap)
    at, key = first + torch.arange(len(q), device="cuda")[:, None], torch.arange(len(k), device="cuda")[None]
    # Not the scores alone: a small one can be the difference of a large rotated part and a large outlier part.
    norms = q.double().norm(dim=-1).amax(0) * k.norm(dim=-1).amax(0)
    largest = torch.maximum(s.abs().amax((1, 2)), 3 * norms * q.shape[2] ** -0.5)
    seen = (key <= at) & (key >= seq_start) & ((key > at - window) if window is not None else True)
    s = torch.where(seen, s, -math.inf)
    if sinks is not None:
        s = torch.cat((s, sinks.double()[:, None, None].expand(-1, len(q), 1)), -1)
        v = torch.cat((v, torch.zeros_like(v[:1])))
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - torch.where(lse == -math.inf, 0.0, lse).unsqueeze(-1))
    return torch.einsum("hnl,lhd->nhd", p, v), lse.T, largest


def oracle(cache: Cache, q: Tensor, q_lens: list[int] | None = None, seq_starts: list[int] | None = None,
           sinks: Tensor | None = None, recent: Any = None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The whole call in float64: out, lse and the largest score of each head. What rings hold is in the cache's k and v."""
    largest = torch.zeros(q.shape[1], dtype=torch.float64, device="cuda")
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
            out[rows], lse[rows], most = attention(q[rows], k, v, len(k) - n, seq_start=start, sinks=sinks, **options)
            largest = torch.maximum(largest, most)
    return out, lse, largest


def run(cache: Cache, q: Tensor, out: Tensor | None = None, *, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    for name in ("q_lens", "seq_starts"):
        options[name] = ints(options.get(name), "cuda")
    return decode(
        q, cache.pages, cache.block_table, cache.seq_lens, scale=1.0, out=out, backend=backend, **options, **cache.options
    )  # fmt: skip


def check(cache: Cache, q: Tensor, backend: str, **options: Any) -> None:
    """Asserts that a call agrees with `oracle` and writes its output only."""
    room = torch.full((len(q) + 2, *q.shape[1:]), math.nan, device="cuda")
    out, lse = run(cache, q, room[1:-1], backend=backend, **options)
    assert room[0].isnan().all() and room[-1].isnan().all(), "rows beside the output were written"
    wanted_out, wanted_lse, largest = oracle(cache, q, **options)
    constant, share = BOUND[backend]
    bound = constant + share * largest
    error = (out - wanted_out).norm(dim=(0, 2)) / wanted_out.norm(dim=(0, 2)).clamp(min=1e-30)
    assert (error <= bound).all(), f"relative errors {error.tolist()} above {bound.tolist()}"
    finite = wanted_lse.isfinite()
    assert torch.equal(lse[~finite].double(), wanted_lse[~finite])
    difference = torch.where(finite, lse - wanted_lse, 0.0).abs()
    assert (difference <= 2 * bound).all(), f"lse is {difference.max():.1e} off"
