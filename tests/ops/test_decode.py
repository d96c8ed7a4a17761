"""Decode against a loop in float64, with every option, and what must never reach its result."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.config import Side
from kvturbo.ops import decode
from support import (
    BACKENDS_UNDER_TEST,
    Batch,
    backend_formats,
    batch_of,
    decode_oracle,
    device_of,
    every_head_dim,
    ints,
    relative_bound,
    relative_error,
    same_bits,
)

LENGTHS = [21, 0, 3, 49]
POISONS = [math.nan, math.inf]


def queries(rows: int, heads: int, fmt: KVFormat, backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(rows, heads, fmt.head_dim, generator=generator)).to(device_of(backend), dtype)


def run(
    q: Tensor, batch: Batch, backend: str, *, out: Tensor | None = None, scale: float = 0.11, **options: Any
) -> tuple[Tensor, Tensor]:
    for name in ("q_lens", "seq_starts"):
        options[name] = ints(options.get(name), q.device)
    return decode(
        q, batch.pages, batch.block_table, batch.seq_lens,
        scale=scale, out=out, backend=backend, **options, **batch.format_options(),
    )  # fmt: skip


def check(q: Tensor, batch: Batch, backend: str, bound: float | None = None, **options: Any) -> None:
    bound = relative_bound(backend) if bound is None else bound
    out, lse = run(q, batch, backend, **options)
    wanted_out, wanted_lse = decode_oracle(q, batch, scale=0.11, **options)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert relative_error(out, wanted_out) <= bound
    assert relative_error(lse, wanted_lse) <= bound


@pytest.mark.parametrize("backend,fmt", backend_formats("decode"))
def test_decode_agrees_with_the_oracle_for_every_format(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, LENGTHS, device=device_of(backend))
    check(queries(4, 4, fmt, backend), batch, backend)


@pytest.mark.parametrize(
    "backend,fmt,page_size", every_head_dim("decode", ["k3v2", "k4v4-o16", "k2v2", "k8v4", "lite4"])
)
def test_decode_for_every_head_dim_and_page_size(backend: str, fmt: KVFormat, page_size: int) -> None:
    batch = batch_of(fmt, [35, 64], page_size=page_size, device=device_of(backend))
    check(queries(2, 4, fmt, backend), batch, backend)


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4"], 64))
def test_decode_for_every_group_size(backend: str, fmt: KVFormat, group: int) -> None:
    batch = batch_of(fmt, [18, 7], device=device_of(backend))
    check(queries(6, 2 * group, fmt, backend), batch, backend, q_lens=[4, 2])


@pytest.mark.parametrize("q_lens", [[1, 1, 1, 1], [8, 0, 3, 5], [0, 0, 0, 0], [2, 8, 0, 7]])
@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v3-o16"], 64))
def test_queries_of_a_sequence_are_causal_and_rows_beyond_them_are_padding(
    backend: str, fmt: KVFormat, q_lens: list[int]
) -> None:
    batch = batch_of(fmt, LENGTHS, device=device_of(backend))
    check(queries(sum(q_lens) + 2, 4, fmt, backend), batch, backend, q_lens=q_lens)


OPTIONS = {
    "window": {"window": 17},
    "window-of-one": {"window": 1},
    "soft-cap": {"soft_cap": 1.5},
    "sinks": {"sinks": [0.5, -2.0, 3.0, 0.0]},
    "seq-starts": {"seq_starts": [5, 0, 2, 32]},
    "padding-only": {"seq_starts": [20, 4, 9, 49]},
    "all": {"window": 20, "soft_cap": 2.0, "sinks": [1.0, 0.0, -1.0, 4.0], "seq_starts": [0, 0, 1, 40]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4", "k3v3-o16"], 64))
def test_decode_with_options(backend: str, fmt: KVFormat, options: dict[str, Any]) -> None:
    batch = batch_of(fmt, LENGTHS, device=device_of(backend))
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"], device=device_of(backend))
    q_lens = [3, 0, 2, 4]
    check(queries(9, 4, fmt, backend), batch, backend, q_lens=q_lens, **options)


@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
@settings(max_examples=8)
@given(data=st.data())
def test_decode_of_any_ragged_batch(backend: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3), label="lengths")
    q_lens = [data.draw(st.integers(0, min(8, length)), label="q_len") for length in lengths]
    starts = [data.draw(st.integers(0, length + 2), label="start") for length in lengths]
    window = data.draw(st.none() | st.integers(1, 45), label="window")
    fmt = KVFormat.from_name("k4v4", 64)
    batch = batch_of(fmt, lengths, device=device_of(backend))
    check(queries(sum(q_lens), 2, fmt, backend), batch, backend, q_lens=q_lens, seq_starts=starts, window=window)


def test_double_precision_is_limited_by_the_rotation_only() -> None:
    for name in ("k4v4", "lite4"):
        fmt = KVFormat.from_name(name, 128)
        batch = batch_of(fmt, LENGTHS)
        check(queries(4, 4, fmt, "reference", torch.float64), batch, "reference", 1e-6)


@pytest.mark.parametrize("dtype,bound", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4"], 128))
def test_sixteen_bit_queries_differ_by_the_rounding_of_the_output(
    backend: str, fmt: KVFormat, dtype: torch.dtype, bound: float
) -> None:
    batch = batch_of(fmt, [33, 12], device=device_of(backend))
    q = queries(2, 4, fmt, backend, dtype)
    out, lse = run(q, batch, backend)
    wanted_out, wanted_lse = decode_oracle(q.float(), batch, scale=0.11)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert relative_error(out, wanted_out) <= bound
    assert relative_error(lse, wanted_lse) <= max(1e-4, relative_bound(backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4"], 64))
def test_out_is_written_in_its_own_dtype(backend: str, fmt: KVFormat, dtype: torch.dtype) -> None:
    batch = batch_of(fmt, LENGTHS, device=device_of(backend))
    q = queries(6, 4, fmt, backend, torch.float16)
    out = torch.full(q.shape, math.nan, dtype=dtype, device=q.device)
    q_lens = [2, 0, 1, 2]
    result, _ = run(q, batch, backend, out=out, q_lens=q_lens)
    assert result is out
    wanted, _ = decode_oracle(q.float(), batch, scale=0.11, q_lens=q_lens)
    assert relative_error(out, wanted) <= (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4-o16"], 64))
def test_decode_is_deterministic_and_leaves_its_inputs_alone(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, LENGTHS, device=device_of(backend))
    q = queries(4, 4, fmt, backend)
    inputs = [q.clone(), batch.pages.clone(), batch.block_table.clone(), batch.seq_lens.clone()]
    first, second = run(q, batch, backend, window=9), run(q, batch, backend, window=9)
    assert same_bits(first[0], second[0]) and same_bits(first[1], second[1])
    for before, after in zip(inputs, (q, batch.pages, batch.block_table, batch.seq_lens), strict=True):
        assert same_bits(before, after)


@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4", "k2v2-o16"], 64))
def test_the_rows_of_a_batch_do_not_depend_on_one_another(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, LENGTHS, device=device_of(backend))
    q = queries(4, 4, fmt, backend)
    out, lse = run(q, batch, backend)
    for b in range(4):
        alone = Batch(
            fmt, batch.channels, batch.pages, batch.block_table[b : b + 1], batch.seq_lens[b : b + 1], [], [], []
        )
        one, one_lse = run(q[b : b + 1], alone, backend)
        assert relative_error(one, out[b : b + 1]) <= relative_bound(backend)
        assert relative_error(one_lse, lse[b : b + 1]) <= relative_bound(backend)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4", "k3v2-o16", "k8v4", "lite4"], 64))
def test_a_poisoned_slot_makes_exactly_the_rows_that_see_it_nan(
    backend: str, fmt: KVFormat, side: Side, poison: float
) -> None:
    batch = batch_of(fmt, [21, 30], device=device_of(backend))
    batch.put(0, 19, side, poison)  # the second of three queries stands there
    q, q_lens = queries(5, 4, fmt, backend), [3, 2]
    out, _ = run(q, batch, backend, q_lens=q_lens)
    assert out.isfinite().all(-1).all(-1).tolist() == [True, False, False, True, True]
    check(q, batch, backend, q_lens=q_lens)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4", "k2v2-o16", "k8v4"], 64))
def test_poison_outside_what_a_row_sees_never_reaches_it(backend: str, fmt: KVFormat, side: Side) -> None:
    clean, dirty = (batch_of(fmt, [40, 26], device=device_of(backend)) for _ in range(2))
    for position in (0, 4, 29):  # before seq_start and outside the window
        dirty.put(0, position, side, math.nan)
    for position in (0, 7):
        dirty.put(1, position, side, math.nan)
    q = queries(3, 4, fmt, backend)
    options: dict[str, Any] = {"q_lens": [2, 1], "seq_starts": [5, 8], "window": 9}
    wanted, got = run(q, clean, backend, **options), run(q, dirty, backend, **options)
    assert wanted[0].isfinite().all()
    assert same_bits(wanted[0], got[0]) and same_bits(wanted[1], got[1])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4", "k4v4-o16", "lite4"], 64))
def test_a_poisoned_query_makes_its_own_row_nan(backend: str, fmt: KVFormat, poison: float) -> None:
    batch = batch_of(fmt, [21, 30], device=device_of(backend))
    q = queries(3, 4, fmt, backend)
    clean, _ = run(q, batch, backend, q_lens=[2, 1], soft_cap=5.0)
    q[1, 2, 3] = poison
    out, lse = run(q, batch, backend, q_lens=[2, 1], soft_cap=5.0)
    assert out[1, 2].isnan().all() and lse[1, 2].isnan()
    out[1, 2] = clean[1, 2]
    assert relative_error(out, clean) <= relative_bound(backend)


@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4"], 64))
def test_huge_logits_do_not_overflow(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, [33], device=device_of(backend))
    q = queries(1, 2, fmt, backend) * 3000
    out, lse = run(q, batch, backend)
    wanted, wanted_lse = decode_oracle(q, batch, scale=0.11)
    assert relative_error(lse, wanted_lse) <= relative_bound(backend)
    assert relative_error(out, wanted) <= 0.05  # one key has all the weight; two could be close


@pytest.mark.parametrize("backend,fmt", backend_formats("decode", ["k4v4"], 64))
def test_an_empty_batch_gives_empty_results(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, [], device=device_of(backend))
    out, lse = run(queries(0, 4, fmt, backend), batch, backend)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend,fmt", backend_formats("decode"))
def test_decode_of_long_ragged_batches(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, [700, 1, 0, 4097], heads=2, device=device_of(backend))
    check(queries(9, 8, fmt, backend), batch, backend, q_lens=[1, 1, 0, 6], window=3000)
