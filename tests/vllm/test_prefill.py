"""Prompts over packed prefixes, in pieces, with an engine's attention played by plain torch: against float64 attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.rotation import rotate
from kvturbo.vllm import prefill
from support import attention_oracle, batch_of, relative_error
from vllm_dense import flash, merge

ROWS, PIECE = 20, 48
SCALE = 128**-0.5


def _spans(sequence: int, row: int, count: int, prefix: int) -> list[SimpleNamespace]:
    """The pieces that `kvturbo.vllm.metadata` makes, by a loop of their own."""
    pieces = []
    for a in range(row, row + count, ROWS):
        b = min(a + ROWS, row + count)
        for start in range(0, prefix, PIECE):
            stop = min(start + PIECE, prefix)
            bounds = torch.tensor([[0, b - a], [0, stop - start]], dtype=torch.int32)
            pieces.append(
                SimpleNamespace(
                    first=a, last=b, sequence=sequence, start=start, stop=stop, bounds=bounds, ends=stop == prefix
                )
            )
    return pieces


def _attend(fmt: KVFormat, prefixes: list[int], counts: list[int], dtype: torch.dtype, soft_cap: float | None) -> Any:
    generator = torch.Generator().manual_seed(1)
    batch = batch_of(fmt, prefixes)
    total = sum(counts)
    q = torch.randn(total, 4, fmt.head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(total, 2, fmt.head_dim, generator=generator).to(dtype) for _ in range(2))
    starts, pieces = [0], []
    for i, (prefix, count) in enumerate(zip(prefixes, counts, strict=True)):
        pieces += _spans(i, starts[-1], count, prefix)
        starts.append(starts[-1] + count)
    rows = SimpleNamespace(
        starts=torch.tensor(starts, dtype=torch.int32),
        longest=max(counts),
        block_table=batch.block_table,
        pieces=pieces,
    )
    shapes = prefill.Shapes(4, 2, fmt.head_dim, dtype)
    workspace = prefill.dense_workspace(shapes, torch.device("cpu"))
    prompts = prefill.Prompts(fmt, SCALE, flash(SCALE, soft_cap), merge, workspace, "reference")
    out = torch.full_like(q, torch.nan)
    lse = prompts.attend(q, k, v, batch.pages, rows, batch.channels, out)
    wanted, sums = _oracle(q, k, v, batch, counts, soft_cap)
    return out, lse, wanted, sums


def _oracle(q: Tensor, k: Tensor, v: Tensor, batch: Any, counts: list[int], soft_cap: float | None) -> Any:
    outs, lses, row = [], [], 0
    for i, count in enumerate(counts):
        rows = slice(row, row + count)
        keys = torch.cat((batch.k[i], k[rows].double()))
        values = torch.cat((batch.v[i], v[rows].double()))
        first = len(batch.k[i])
        out, lse = attention_oracle(q[rows], keys, values, scale=SCALE, first=first, soft_cap=soft_cap)
        outs.append(out)
        lses.append(lse)
        row += count
    return torch.cat(outs), torch.cat(lses).T


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "ROWS_AT_ONCE", ROWS)
    monkeypatch.setattr(prefill, "PIECE_TOKENS", PIECE)


@pytest.mark.parametrize("name", ["k4v4", "k3v2", "k4v4-o16", "lite4", "k8v4"])
@pytest.mark.parametrize(
    "prefixes, counts",
    [([0], [7]), ([48], [20]), ([100], [33]), ([0, 97, 1], [5, 41, 3])],
    ids=["first chunk", "whole pieces", "ragged", "several"],
)
def test_chunks_see_their_prefix_and_themselves(name: str, prefixes: list[int], counts: list[int]) -> None:
    """fp32: what remains are sums in another order (1e-5)."""
    out, lse, wanted, sums = _attend(KVFormat.from_name(name, 128), prefixes, counts, torch.float32, None)
    assert relative_error(out, wanted) < 1e-5
    assert relative_error(lse, sums) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_error_is_that_of_16_bits(dtype: torch.dtype) -> None:
    """Roundings of the turned query, the copies, partial results and their merges: each at most half a unit in the last place."""
    out, _, wanted, _ = _attend(KVFormat.from_name("k4v4", 128), [100, 10], [33, 9], dtype, None)
    assert relative_error(out, wanted) < 4 * torch.finfo(dtype).eps


def test_soft_caps_act_on_both_parts() -> None:
    out, _, wanted, _ = _attend(KVFormat.from_name("k4v4", 128), [100], [33], torch.float32, 0.5)
    assert relative_error(out, wanted) < 1e-5


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_turning_is_the_codec_rotation_and_turning_back_undoes_it(head_dim: int) -> None:
    fmt = KVFormat.from_name("k4v4", head_dim)
    x = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(0))
    turned = prefill.turn(x, fmt, torch.empty_like(x))
    torch.testing.assert_close(turned, rotate(x, fmt.seed), rtol=0, atol=1e-5)
    torch.testing.assert_close(prefill.turn_back(turned, fmt, torch.empty_like(x)), x, rtol=0, atol=1e-5)


def test_turning_in_bf16_does_not_shrink_vectors() -> None:
    """1 / sqrt(128) in bf16 is off by 1e-4; the mean over many vectors must not be."""
    fmt = KVFormat.from_name("k4v4", 128)
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = prefill.turn(x, fmt, torch.empty_like(x))
    ratio = turned.double().norm() / x.double().norm()
    assert abs(float(ratio) - 1) < 2e-5


def test_the_workspace_is_what_it_says() -> None:
    shapes = prefill.Shapes(28, 4, 128, torch.bfloat16)
    tensors = prefill.dense_workspace(shapes, torch.device("cpu"))()
    assert sum(x.numel() * x.element_size() for x in tensors) == shapes.nbytes()
