"""Decode with the newest tokens raw, in rings beside the pages, against a loop in float64; store and decode together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.ops import decode, store
from kvturbo.ops.recent import Recent
from kvturbo.ops.schedule import plan
from kvturbo.ops.sharing import SharedSchedules
from kvturbo.ops.warmup import warmup
from support import (
    BACKENDS_UNDER_TEST,
    Batch,
    batch_of,
    decode_oracle,
    device_of,
    ints,
    relative_bound,
    relative_error,
    same_bits,
)

HEADS = 2
LENGTHS = [21, 0, 3, 150, 8]
CASES = [
    ("k4v4", 64, 8, torch.float32), ("k3v2-o16", 80, 16, torch.float16), ("k4v4", 128, 32, torch.bfloat16),
    ("k2v2-o32", 192, 16, torch.float32),
]  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window-in-the-ring": {"window": 3},
    "window": {"window": 20, "q_lens": [3, 0, 2, 4, 8]},
    "starts": {"seq_starts": [19, 0, 1, 140, 9]},
    "all": {
        "window": 140, "soft_cap": 1.5, "seq_starts": [0, 2, 1, 30, 5], "q_lens": [2, 0, 1, 8, 3],
        "sinks": [0.5, -2.0, 3.0, 0.0],
    },
}  # fmt: skip


def with_rings(batch: Batch, counts: Sequence[int], size: int, dtype: torch.dtype) -> tuple[Recent, Batch]:
    """Rings of other keys and values than the pages have, NaN where nobody is to read, and the batch that they stand for."""
    head_dim, device = batch.fmt.head_dim, batch.pages.device
    rows = torch.full((len(counts) + 2, HEADS, 2, size, head_dim), math.nan, dtype=dtype)
    slots = torch.arange(len(counts), 0, -1, dtype=torch.int32)
    k, v = ([x.clone() for x in side] for side in (batch.k, batch.v))
    for b, count in enumerate(counts):
        for p in range(len(k[b]) - count, len(k[b])):
            ring = rows[slots[b], :, :, p % size]
            ring[:, 0], ring[:, 1] = -0.8 * k[b][p], 1.2 * v[b][p].flip(-1)
            k[b][p], v[b][p] = ring[:, 0].double(), ring[:, 1].double()
        if not count:
            slots[b] = -1
    tensors = (rows, slots, torch.tensor(counts, dtype=torch.int32))
    return Recent(*(x.to(device) for x in tensors)), dataclasses.replace(batch, k=k, v=v)


def queries(rows: int, heads: int, batch: Batch, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, heads, batch.fmt.head_dim, generator=generator).to(batch.pages.device, dtype)


def run(q: Tensor, batch: Batch, backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    for name in ("q_lens", "seq_starts"):
        options[name] = ints(options.get(name), q.device)
    if options.get("sinks") is not None:
        options["sinks"] = options["sinks"].to(q.device)
    out = torch.full(q.shape, math.nan, dtype=torch.float32, device=q.device)
    return decode(
        q, batch.pages, batch.block_table, batch.seq_lens, scale=0.11, out=out, backend=backend, **options,
        **batch.format_options(),
    )  # fmt: skip


def check(q: Tensor, batch: Batch, raw: Batch, recent: Recent, backend: str, **options: Any) -> None:
    out, lse = run(q, batch, backend, recent=recent, **options)
    wanted, wanted_lse = decode_oracle(q.float(), raw, scale=0.11, **options)
    assert relative_error(out, wanted) <= relative_bound(backend)
    assert relative_error(lse, wanted_lse) <= relative_bound(backend)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("name,head_dim,size,dtype", CASES)
@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
def test_the_newest_tokens_are_read_from_rings(
    backend: str, name: str, head_dim: int, size: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    batch = batch_of(KVFormat.from_name(name, head_dim, seed=5), LENGTHS, heads=HEADS, device=device_of(backend))
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"])
    q = queries(sum(options.get("q_lens", [1] * 5)) + (2 if "q_lens" in options else 0), 4, batch, dtype)
    for counts in ([min(size, 21), 0, 1, 5, 0], [min(size, n) for n in LENGTHS]):
        recent, raw = with_rings(batch, counts, size, dtype)
        check(q, batch, raw, recent, backend, **options)


@pytest.mark.parametrize("group", [1, 3, 7, 16])
@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
def test_rings_for_every_group_size(backend: str, group: int) -> None:
    batch = batch_of(KVFormat.from_name("k4v4", 64), [18, 7], heads=HEADS, device=device_of(backend))
    recent, raw = with_rings(batch, [16, 7], 16, torch.float32)
    for q_lens in ([1, 1], [4, 2]) if backend != "cuda" or group <= 8 else ([1, 1],):
        check(queries(sum(q_lens), HEADS * group, batch, torch.float32), batch, raw, recent, backend, q_lens=q_lens)


@pytest.mark.parametrize("backend", [b for b in BACKENDS_UNDER_TEST if b != "cuda"])
def test_no_counts_are_as_no_rings(backend: str) -> None:
    batch = batch_of(KVFormat.from_name("k4v4-o16", 64), LENGTHS, heads=HEADS, device=device_of(backend))
    q = queries(5, 4, batch, torch.float32)
    recent, _ = with_rings(batch, [0] * 5, 16, q.dtype)
    wanted, got = run(q, batch, backend), run(q, batch, backend, recent=recent)
    assert all(relative_error(b, a) <= 1e-6 for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("backend", [b for b in BACKENDS_UNDER_TEST if b != "cuda"])
def test_a_poisoned_token_makes_exactly_the_rows_that_see_it_nan(backend: str, side: int, poison: float) -> None:
    batch = batch_of(KVFormat.from_name("k4v4", 64), [21, 30], heads=HEADS, device=device_of(backend))
    recent, _ = with_rings(batch, [8, 4], 8, torch.float32)
    recent.rows[recent.slots[0], 1, side, 19 % 8, 5] = poison  # the second of three queries stands there
    out, _ = run(queries(5, 4, batch, torch.float32), batch, backend, recent=recent, q_lens=[3, 2])
    nan = torch.zeros(5, 4, dtype=torch.bool)
    nan[1:3, 2:] = True
    assert torch.equal(out.isnan().all(-1).cpu(), nan) and torch.equal(out.isnan().any(-1).cpu(), nan)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("backend", [b for b in BACKENDS_UNDER_TEST if b != "cuda"])
def test_a_poisoned_query_makes_its_own_row_nan(backend: str, soft_cap: float | None) -> None:
    batch = batch_of(KVFormat.from_name("k4v4", 64), [4, 30], heads=HEADS, device=device_of(backend))
    recent, _ = with_rings(batch, [4, 4], 8, torch.float32)  # of the first sequence nothing is read from pages
    q = queries(2, 4, batch, torch.float32)
    q[0, 2, 3] = math.inf
    out, lse = run(q, batch, backend, recent=recent, soft_cap=soft_cap)
    nan = torch.zeros(2, 4, dtype=torch.bool)
    nan[0, 2] = True
    assert torch.equal(out.isnan().all(-1).cpu(), nan) and torch.equal(lse.isnan().cpu(), nan)
    assert torch.equal(out.isfinite().all(-1).cpu(), ~nan)


@pytest.mark.parametrize("backend", [b for b in BACKENDS_UNDER_TEST if b == "triton"])
def test_a_schedule_is_planned_for_the_rings(backend: str) -> None:
    batch = batch_of(KVFormat.from_name("k4v4", 64), [133, 20], heads=HEADS, device=device_of(backend))
    recent, _ = with_rings(batch, [8, 3], 8, torch.float32)
    q, lens = queries(2, 4, batch, torch.float32), batch.seq_lens
    planned = plan(lens, recent_counts=recent.counts)
    assert planned.blocks.tolist() == [0, 1, 2] and plan(lens).blocks.tolist() == [0, 2, 3]
    wanted = run(q, batch, backend, recent=recent)
    for schedule in (planned, SharedSchedules()):
        got = run(q, batch, backend, recent=recent, schedule=schedule)
        assert all(same_bits(a, b) for a, b in zip(wanted, got, strict=True))
    for bad, schedule in (
        (recent, plan(lens)),
        (None, planned),
        (recent._replace(counts=recent.counts.clone()), planned),
    ):
        with pytest.raises(ValueError, match="planned with other recent_counts than those of this call's recent"):
            run(q, batch, backend, recent=bad, schedule=schedule)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("backend", ["auto", *(b for b in BACKENDS_UNDER_TEST if b != "cuda")])
def test_a_compiled_step_with_rings_is_one_graph_and_gives_the_same_bits(backend: str) -> None:
    fmt = KVFormat.from_name("k4v4", 64, seed=3)
    batch = batch_of(fmt, [20, 33], heads=HEADS, device=device_of("reference" if backend == "auto" else backend))
    recent, _ = with_rings(batch, [8, 5], 8, torch.float32)
    device, size = batch.pages.device, recent.size
    q, k, v = (queries(2, heads, batch, torch.float32) for heads in (4, HEADS, HEADS))
    slots = torch.stack([s[-1] for s in batch.slots]).to(device)
    places = recent.slots.long() * size + (batch.seq_lens - 1) % size
    options: dict[str, Any] = {**batch.format_options(), "backend": backend}

    def step(pages: Tensor, rows: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        store(k + 0.5, v * 2, pages, slots, recent_rows=rows, recent_slots=places, **options)
        newest = recent._replace(rows=rows)
        out, lse = decode(q, pages, batch.block_table, batch.seq_lens, scale=0.11, recent=newest, **options)
        return out + 1, lse

    eager, compiled = ((batch.pages.clone(), recent.rows.clone()) for _ in range(2))
    wanted = step(*eager, q, k, v)
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend="aot_eager" if backend != "triton" else "eager")(
        *compiled, q, k, v
    )
    for a, b in (*zip(wanted, got, strict=True), *zip(eager, compiled, strict=True)):
        assert same_bits(a, b)
    assert same_bits(eager[1][recent.slots[0].long(), :, 0, 19 % size], (k + 0.5)[0])
    assert got[0].isfinite().all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS_UNDER_TEST if b == "triton"])
def test_a_warm_up_launches_the_kernels_for_rings(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[str, int]] = []

    def noted(operation: str) -> Any:
        module = import_module(f"kvturbo.ops.{operation}.triton")
        run, name = getattr(module, operation), "recent_rows" if operation == "store" else "recent"

        def call(*args: Any, **options: Any) -> Any:
            rows = getattr(options.get(name), "rows", options.get(name))
            sizes.append((operation, 0 if rows is None else rows.shape[3]))
            return run(*args, **options)

        monkeypatch.setattr(module, operation, call)

    for operation in ("store", "decode"):
        noted(operation)
    warmup(
        KVFormat.from_name("k4v4", 64), num_q_heads=2, num_kv_heads=1, page_size=16, dtype=torch.float32,
        device=device_of(backend), max_q_len=2, backend=backend, ring_size=8,
    )  # fmt: skip
    assert set(sizes) == {("store", 0), ("store", 8), ("decode", 8)}
