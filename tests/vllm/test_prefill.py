"""Prompts over packed prefixes, in pieces, with an engine's attention played by plain torch: against float64 attention."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.rotation import rotate
from kvturbo.vllm import pieces, prefill
from kvturbo.vllm.pieces import PrefixPiece, pieces_of
from support import attention_oracle, batch_of, relative_error
from vllm_dense import flash, merge
from vllm_pieces import cut

ROWS, PIECE, PAGE = 20, 48, 16
SCALE = 128**-0.5


def _attend(fmt: KVFormat, prefixes: list[int], counts: list[int], dtype: torch.dtype, soft_cap: float | None) -> Any:
    generator = torch.Generator().manual_seed(1)
    batch = batch_of(fmt, prefixes)
    total = sum(counts)
    q = torch.randn(total, 4, fmt.head_dim, generator=generator).to(dtype)
    k, v = (torch.randn(total, 2, fmt.head_dim, generator=generator).to(dtype) for _ in range(2))
    starts = [0, *accumulate(counts)]
    rows = SimpleNamespace(
        starts=torch.tensor(starts, dtype=torch.int32),
        longest=max(counts),
        pieces=pieces_of(starts, prefixes, batch.block_table, PAGE, PIECE),
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
    cut(monkeypatch.setattr, PIECE, ROWS)


@pytest.mark.parametrize("name", ["k4v4", "k3v2", "k4v4-o16", "lite4", "k8v4"])
@pytest.mark.parametrize(
    "prefixes, counts",
    [
        ([0], [7]),
        ([48], [20]),
        ([100], [33]),
        ([0, 97, 1], [5, 41, 3]),
        ([16, 32], [3, 4]),
        ([32, 0, 16, 9, 96, 16, 32, 7], [9, 2, 5, 12, 30, 6, 1, 3]),
    ],
    ids=["first chunk", "whole pieces", "ragged", "several", "together", "together and apart"],
)
def test_chunks_see_their_prefix_and_themselves(name: str, prefixes: list[int], counts: list[int]) -> None:
    """fp32: what remains are sums in another order (1e-5)."""
    out, lse, wanted, sums = _attend(KVFormat.from_name(name, 128), prefixes, counts, torch.float32, None)
    assert relative_error(out, wanted) < 1e-5
    assert relative_error(lse, sums) < 1e-5


def _planned(prefixes: list[int], counts: list[int]) -> list[PrefixPiece]:
    """Pieces whose tables tell sequence and page: page p of sequence s is 1000 s + p."""
    table = 1000 * torch.arange(len(prefixes))[:, None] + torch.arange(max(prefixes) // PAGE + 1)
    return pieces_of([0, *accumulate(counts)], prefixes, table.int(), PAGE, PIECE)


def test_prefixes_of_neighbours_that_fit_are_attended_together() -> None:
    [piece] = _planned([16, 16, 9], [3, 4, 5])
    assert (piece.first, piece.last, piece.start, piece.stop, piece.ends) == (0, 12, 0, 41, True)
    assert piece.table.tolist() == [[0, 1000, 2000]] and piece.longest == (5, 16)
    assert [bounds.tolist() for bounds in piece.bounds] == [[0, 3, 7, 12], [0, 16, 32, 41]]


def test_a_piece_may_be_full() -> None:
    [piece] = _planned([16, 32], [10, 10])
    assert piece.stop == PIECE and piece.last == ROWS


def test_prefixes_beyond_the_block_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must fit in the block table's 1 pages, got \[1, 2\] pages"):
        pieces_of([0, 1, 2], [16, 32], torch.zeros(2, 1, dtype=torch.int32), PAGE, PIECE)


@pytest.mark.parametrize(
    "prefixes, counts, why",
    [
        ([9, 16], [1, 1], "the first ends within a page"),
        ([32, 32], [1, 1], "too many keys"),
        ([16, 16], [15, 15], "too many rows"),
        ([16, 0, 16], [1, 1, 1], "rows without a prefix in between"),
    ],
)
def test_prefixes_are_not_joined_where(prefixes: list[int], counts: list[int], why: str) -> None:
    assert len(_planned(prefixes, counts)) == 2, why


def test_long_prefixes_stay_alone_so_that_their_keys_can_be_split() -> None:
    table = torch.arange(14).view(2, 7)
    together = pieces_of([0, 1, 2], [PIECE, PIECE], table, PAGE, 3 * PIECE)
    apart = pieces_of([0, 1, 2], [PIECE + 1, PIECE + 1], table, PAGE, 3 * PIECE)
    assert [piece.stop for piece in together] == [2 * PIECE] and [piece.stop for piece in apart] == [PIECE + 1] * 2


@pytest.mark.parametrize("seed", range(40))
def test_every_row_meets_every_key_of_its_prefix_once_and_pieces_fit_the_workspace(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 12)
    prefixes = [rng.choice([0, 16, 32, rng.randint(1, 20), rng.randint(1, 200)]) for _ in range(count)]
    counts = [rng.choice([0, 1, rng.randint(1, 10), rng.randint(1, 70)]) for _ in range(count)]
    starts = [0, *accumulate(counts)]
    met: dict[tuple[int, int, int], int] = {}
    unfinished: tuple[int, int] | None = None
    for piece in _planned(prefixes, counts):
        assert unfinished in (None, (piece.first, piece.last)), "other rows in between"
        last = divmod(int(piece.table[0, (piece.stop - 1) // PAGE]), 1000)
        assert piece.ends == (last[1] * PAGE + (piece.stop - 1) % PAGE + 1 == prefixes[last[0]])
        unfinished = None if piece.ends else (piece.first, piece.last)
        rows, keys = (bounds.tolist() for bounds in piece.bounds)
        assert rows[-1] == piece.last - piece.first <= ROWS and keys[-1] == piece.stop - piece.start <= PIECE
        assert piece.longest == tuple(max(b - a for a, b in pairwise(bounds)) for bounds in (rows, keys))
        for (a, b), (c, d) in zip(pairwise(rows), pairwise(keys), strict=True):
            assert b > a and d > c
            for row in range(piece.first + a, piece.first + b):
                for at in range(piece.start + c, piece.start + d):
                    sequence, page = divmod(int(piece.table[0, at // PAGE]), 1000)
                    assert starts[sequence] <= row < starts[sequence + 1]
                    key = sequence, row, page * PAGE + at % PAGE
                    met[key] = met.get(key, 0) + 1
    assert unfinished is None
    wanted = [
        (i, starts[i] + row, key) for i, rows in enumerate(counts) for row in range(rows) for key in range(prefixes[i])
    ]
    assert sorted(met) == sorted(wanted) and set(met.values()) <= {1}


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


@pytest.mark.parametrize(
    "heads, head_dim, tokens", [(4, 128, 32768), (8, 128, 16384), (5, 96, 34944), (3, 128, 43648), (32, 128, 8192)]
)
def test_copies_of_a_piece_take_64_mib_or_hold_8192_tokens(
    heads: int, head_dim: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert pieces.tokens_at_once(heads, head_dim) == tokens and tokens % 64 == 0
    assert tokens == 8192 or 0 <= (64 << 20) - 4 * tokens * heads * head_dim < 4 * 64 * heads * head_dim


def test_the_workspace_is_what_it_says() -> None:
    shapes = prefill.Shapes(28, 4, 128, torch.bfloat16)
    tensors = prefill.dense_workspace(shapes, torch.device("cpu"))()
    assert sum(x.numel() * x.element_size() for x in tensors) == shapes.nbytes()
