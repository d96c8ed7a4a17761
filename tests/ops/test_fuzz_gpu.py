"""Random calls of decode on a GPU against float64 attention: 64 caches, 36 calls each, NaN in all that may not be read.

Every call is made from the cache's seed and the call's number; a failure names both, so it can be run again alone. Triton compiles
a kernel for every set of options and gets fewer calls.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpu_cases import Cache, cache_of, check, queries
from kvturbo.config import HEAD_DIMS, PAGE_SIZES
from kvturbo.ops.recent import Recent
from support import ints

CACHES, CALLS = {"cuda": 64, "triton": 12}, {"cuda": 36, "triton": 6}
FORMATS = ("k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k2v2", "k8v4", "lite4", "k4v4-o16", "k4v4-o32", "k3v2-o16")
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)

pytestmark = pytest.mark.gpu


def cache_for(rng: random.Random) -> tuple[Cache, int]:
    """A cache of 6 sequences in a random format, head_dim and page size; and a group."""
    head_dim = rng.choice(HEAD_DIMS)
    names = [name for name in FORMATS if head_dim >= 128 or not name.endswith("o32")]
    lengths = [int(2 ** rng.uniform(0, 12)) for _ in range(6)]
    cache = cache_of(rng.choice(names), head_dim, lengths, rng.choice(PAGE_SIZES), heads=rng.randint(1, 3))
    return cache, rng.choice(GROUPS)


def with_rings(cache: Cache, size: int, rng: random.Random, dtype: torch.dtype) -> tuple[Cache, Recent]:
    """A cache any of whose newest tokens have other keys and values in rings, and those; NaN in all that nobody is to read."""
    counts = [rng.randint(0, min(size, len(k))) for k in cache.k]
    shape = len(counts) + 1, cache.pages.shape[1], 2, size, cache.fmt.head_dim
    rows = torch.full(shape, math.nan, dtype=dtype, device="cuda")
    slots = rng.sample(range(len(rows)), len(counts))
    sides: tuple[list[torch.Tensor], list[torch.Tensor]] = [], []
    for b, (count, slot) in enumerate(zip(counts, slots, strict=True)):
        split = len(cache.k[b]) - count
        at = torch.arange(split, split + count, device="cuda") % size
        for side, (packed, factor) in enumerate(((cache.k[b], 0.8), (cache.v[b], 1.2))):
            raw = (packed[split:] * factor).to(dtype)
            rows[slot, :, side, at] = raw.transpose(0, 1)
            sides[side].append(torch.cat((packed[:split], raw.double())))
    named = [slot if count else -1 for slot, count in zip(slots, counts, strict=True)]
    return replace(cache, k=sides[0], v=sides[1]), Recent(rows, ints(named, "cuda"), ints(counts, "cuda"))


def call_of(
    cache: Cache, group: int, rng: random.Random, dtype: torch.dtype, ring: int = 0
) -> tuple[Cache, torch.Tensor, dict[str, Any]]:
    """Any of the sequences in any number, cut to any length, with any options; queries of the dtype."""
    picked = [rng.randrange(len(cache.k)) for _ in range(int(2 ** rng.uniform(0, 6)))]
    lengths = [0 if rng.random() < 0.1 else rng.randint(1, len(cache.k[b])) for b in picked]
    part = replace(
        cache,
        block_table=cache.block_table[picked].contiguous(),
        seq_lens=ints(lengths, "cuda"),
        k=[cache.k[b][:n] for b, n in zip(picked, lengths, strict=True)],
        v=[cache.v[b][:n] for b, n in zip(picked, lengths, strict=True)],
    )
    options: dict[str, Any] = {}
    rows = len(picked)
    if rng.random() < 0.5:
        options["q_lens"] = [rng.randint(0, min(8, n)) for n in lengths]
        rows = sum(options["q_lens"]) + rng.randint(0, 3)
    if rng.random() < 0.3:
        options["window"] = int(2 ** rng.uniform(0, 12))
    if rng.random() < 0.2:
        options["soft_cap"] = rng.uniform(0.5, 30)
    if rng.random() < 0.3:
        options["seq_starts"] = [rng.randint(0, n + 1) if rng.random() < 0.5 else 0 for n in lengths]
    if rng.random() < 0.3:
        options["sinks"] = torch.linspace(-4, 4, cache.pages.shape[1] * group, device="cuda")
    if ring and rng.random() < 0.7:
        part, options["recent"] = with_rings(part, ring, rng, dtype)
    q = queries(cache, rows, group, rng.choice((0.1, 1.0, 8.0)), dtype)
    return part, q.roll(rng.randrange(1000)), options


def shown(options: dict[str, Any]) -> dict[str, Any]:
    """Options without the contents of rings."""
    return options | ({"recent": options["recent"].counts.tolist()} if "recent" in options else {})


@pytest.mark.parametrize(
    "backend,seed", [(backend, seed) for backend, count in CACHES.items() for seed in range(count)]
)
def test_any_call_agrees_with_float64(backend: str, seed: int) -> None:
    cache, group = cache_for(random.Random(seed))
    for number in range(CALLS[backend]):
        dtype = (torch.bfloat16, torch.float16)[seed % 2]  # one per cache: half as many kernels to compile
        part, q, options = call_of(cache, group, random.Random(1000 * seed + number), dtype, (0, 0, 16, 8)[seed % 4])
        try:
            check(part, q, backend, **options)
        except AssertionError as error:
            lengths = part.seq_lens.tolist()
            shape = f"{cache.fmt.name} head_dim {cache.fmt.head_dim} group {group}, lengths {lengths}, {shown(options)}"
            raise AssertionError(f"seed {seed} call {number}: {error}; {shape}") from error
