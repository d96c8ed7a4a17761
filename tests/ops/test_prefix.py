"""Prefix attention is dense attention over the dequantised prefix and the raw chunk."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.ops import prefix, prefix_attention
from kvturbo.ops.dense import attend
from support import (
    BACKENDS_UNDER_TEST,
    Batch,
    attention_oracle,
    backend_formats,
    batch_of,
    device_of,
    ints,
    relative_error,
)

PREFIXES = [37, 0, 5, 16]
CHUNKS = [9, 4, 0, 3]


def chunk(batch: Batch, counts: list[int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (sum(counts), 2, batch.fmt.head_dim)
    q = 2 * torch.randn(sum(counts), 4, batch.fmt.head_dim, generator=generator)
    k, v = (torch.randn(shape, generator=generator) for _ in range(2))
    return tuple(x.to(batch.pages.device, dtype) for x in (q, k, v))  # type: ignore[return-value]


def run(
    qkv: tuple[Tensor, Tensor, Tensor], batch: Batch, counts: list[int], backend: str, **options: Any
) -> tuple[Tensor, Tensor]:
    device = batch.pages.device
    options["seq_starts"] = ints(options.get("seq_starts"), device)
    return prefix_attention(
        *qkv, batch.pages, batch.block_table, batch.seq_lens,
        scale=0.11, q_lens=ints(counts, device), backend=backend, **options, **batch.format_options(),
    )  # fmt: skip


def oracle(
    qkv: tuple[Tensor, Tensor, Tensor], batch: Batch, counts: list[int], **options: Any
) -> tuple[Tensor, Tensor]:
    starts = options.pop("seq_starts", None) or [0] * len(counts)
    outs, row = [], 0
    for b, count in enumerate(counts):
        q, k, v = (x[row : row + count].double().cpu() for x in qkv)
        row += count
        keys, values = torch.cat((batch.k[b], k)), torch.cat((batch.v[b], v))
        outs.append(
            attention_oracle(q, keys, values, scale=0.11, first=len(batch.k[b]), seq_start=starts[b], **options)
        )
    return torch.cat([out for out, _ in outs]), torch.cat([lse for _, lse in outs])


def check(batch: Batch, backend: str, bound: float = 1e-5, counts: list[int] = CHUNKS, **options: Any) -> None:
    qkv = chunk(batch, counts)
    out, lse = run(qkv, batch, counts, backend, **options)
    wanted, wanted_lse = oracle(qkv, batch, counts, **options)
    assert out.dtype == qkv[0].dtype and lse.dtype == torch.float32
    assert relative_error(out, wanted) <= bound and relative_error(lse, wanted_lse) <= bound


@pytest.mark.parametrize("backend,fmt", backend_formats("gather", head_dim=64))
def test_prefix_attention_agrees_with_the_oracle_for_every_format(backend: str, fmt: KVFormat) -> None:
    check(batch_of(fmt, PREFIXES, device=device_of(backend)), backend)


@pytest.mark.parametrize("piece", [1, 7, 16, 30])
@pytest.mark.parametrize("name", ["k4v4", "k3v2-o16"])
def test_the_size_of_the_pieces_changes_rounding_only(monkeypatch: pytest.MonkeyPatch, name: str, piece: int) -> None:
    monkeypatch.setattr(prefix, "PIECE_TOKENS", piece)
    sinks = torch.tensor([1.0, 0.0, -1.0, 3.0])
    check(batch_of(KVFormat.from_name(name, 64), [20, 9]), "reference", counts=[3, 2], sinks=sinks, window=25)


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": 12},
    "window-inside-the-chunk": {"window": 2},
    "soft-cap": {"soft_cap": 1.5},
    "sinks": {"sinks": [0.5, -2.0, 30.0, 0.0]},
    "seq-starts": {"seq_starts": [5, 0, 2, 16]},
    "padding-reaches-into-the-chunk": {"seq_starts": [40, 2, 7, 30]},
    "all": {"window": 20, "soft_cap": 2.0, "sinks": [1.0, 0.0, -1.0, 4.0], "seq_starts": [3, 1, 1, 0]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("piece", [8192, 10])
@pytest.mark.parametrize("name", ["k4v4", "k4v4-o16"])
def test_prefix_attention_with_options(
    monkeypatch: pytest.MonkeyPatch, name: str, piece: int, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(prefix, "PIECE_TOKENS", piece)
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"])
    check(batch_of(KVFormat.from_name(name, 64), PREFIXES), "reference", **options)


def test_double_precision_is_limited_by_the_rotation_only() -> None:
    batch = batch_of(KVFormat.from_name("k4v4", 64), PREFIXES)
    qkv = chunk(batch, CHUNKS, torch.float64)
    out, lse = run(qkv, batch, CHUNKS, "reference")
    wanted, wanted_lse = oracle(qkv, batch, CHUNKS)
    assert out.dtype == lse.dtype == torch.float64
    assert relative_error(out, wanted) <= 1e-6 and relative_error(lse, wanted_lse) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
def test_sixteen_bit_chunks(backend: str) -> None:
    batch = batch_of(KVFormat.from_name("k4v4", 64), PREFIXES, device=device_of(backend))
    qkv = chunk(batch, CHUNKS, torch.bfloat16)
    out, lse = run(qkv, batch, CHUNKS, backend)
    wanted, _ = oracle(qkv, batch, CHUNKS)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert relative_error(out, wanted) <= 8e-3  # rotated q, gathered k and v, and out are rounded to bf16


def test_a_prefix_of_nothing_is_attention_over_the_chunk() -> None:
    batch = batch_of(KVFormat.from_name("k4v4", 64), [0, 0])
    qkv = chunk(batch, [6, 2])
    out, _ = run(qkv, batch, [6, 2], "reference")
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(out[:6], attend(*(x[:6] for x in qkv), scale=0.11, mask=mask)[0])


def test_a_given_attention_does_all_the_work() -> None:
    batch = batch_of(KVFormat.from_name("k4v4", 64), [20])
    qkv = chunk(batch, [3])
    seen = []

    def recording(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append((len(k), options["mask"].shape, options["sinks"] is not None, options["scale"]))
        return attend(q, k, v, **options)

    sinks = torch.zeros(4)
    out, _ = run(qkv, batch, [3], "reference", attend=recording, sinks=sinks)
    assert seen == [(3, (3, 3), True, 0.11), (20, (3, 20), False, 0.11)]
    assert torch.equal(out, run(qkv, batch, [3], "reference", sinks=sinks)[0])


@pytest.mark.parametrize("side", ["k", "v"])
def test_poison_reaches_the_rows_that_see_it_and_no_other(side: str) -> None:
    fmt = KVFormat.from_name("k4v4", 64)
    batch = batch_of(fmt, [20, 20])
    batch.put(0, 12, side, math.nan)  # type: ignore[arg-type]
    q, k, v = chunk(batch, [4, 3])
    (k if side == "k" else v)[6, 1, 0] = math.inf  # the last token of the second chunk
    out, _ = run((q, k, v), batch, [4, 3], "reference", window=10)
    dirty = out.isnan().any(-1)
    assert dirty[:2].all() and not dirty[2:6].any()  # queries at 20 and 21 see 12
    assert dirty[6].tolist() == [False, False, True, True]  # KV head 1
