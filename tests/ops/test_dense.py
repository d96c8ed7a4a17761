"""Dense attention with its log-sum-exp, and the merge of results over disjoint keys."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvturbo.ops import dense
from kvturbo.ops.dense import attend, attend_flash, causal_mask, merge
from support import attention_oracle, relative_error


def qkv(n: int, m: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(rows, heads, 24, generator=generator) for rows, heads in ((n, 6), (m, 2), (m, 2)))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("scores_at_once", [1, 6 * 30 * 2, 1 << 20])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-6)])
def test_attend_agrees_with_the_oracle_in_pieces_of_any_size(
    monkeypatch: pytest.MonkeyPatch, scores_at_once: int, dtype: torch.dtype, bound: float
) -> None:
    monkeypatch.setattr(dense, "_SCORES_AT_ONCE", scores_at_once)
    q, k, v = qkv(7, 30, dtype)
    sinks = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    mask = causal_mask(7, 0, 30, 23, window=11, seq_start=15)
    out, lse = attend(q, k, v, scale=0.3, mask=mask, soft_cap=1.3, sinks=sinks)
    options = {"window": 11, "seq_start": 15, "soft_cap": 1.3, "sinks": sinks}
    wanted, wanted_lse = attention_oracle(q, k, v, scale=0.3, first=23, **options)
    assert relative_error(out, wanted) <= bound and relative_error(lse, wanted_lse) <= bound


def test_a_row_that_sees_nothing_is_zero_with_minus_infinity_or_the_sink() -> None:
    q, k, v = qkv(2, 5)
    for keys in (5, 0):
        mask = torch.zeros(2, keys, dtype=torch.bool)
        out, lse = attend(q, k[:keys], v[:keys], scale=1.0, mask=mask)
        assert (out == 0).all() and (lse == -math.inf).all()
        out, lse = attend(q, k[:keys], v[:keys], scale=1.0, mask=mask, sinks=torch.arange(6.0))
        assert (out == 0).all() and torch.allclose(lse, torch.arange(6.0).expand(2, 6))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_finite_makes_exactly_the_rows_that_see_it_nan(
    where: str, poison: float, soft_cap: float | None
) -> None:
    q, k, v = qkv(4, 8)
    mask = causal_mask(4, 0, 8, 4)
    clean, _ = attend(q, k, v, scale=0.3, mask=mask, soft_cap=soft_cap)
    if where == "q":
        q[2, 4, 7] = poison  # row 2, query head 4
        dirty = torch.zeros(4, 6, dtype=torch.bool)
        dirty[2, 4] = True
    else:
        {"k": k, "v": v}[where][6, 1, 7] = poison  # key 6 is seen by rows 2 and 3, KV head 1 by query heads 3 to 5
        dirty = torch.zeros(4, 6, dtype=torch.bool)
        dirty[2:, 3:] = True
    out, _ = attend(q, k, v, scale=0.3, mask=mask, soft_cap=soft_cap)
    assert out[dirty].isnan().all()
    assert torch.allclose(out[~dirty], clean[~dirty], rtol=1e-5)


@given(cuts=st.lists(st.integers(0, 40), max_size=4), with_sinks=st.booleans())
def test_merging_attention_over_parts_is_attention_over_the_whole(cuts: list[int], with_sinks: bool) -> None:
    q, k, v = qkv(5, 40, torch.float64)
    sinks = torch.linspace(-2, 2, 6) if with_sinks else None
    bounds = [0, *sorted(cuts), 40]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        mask = causal_mask(5, start, stop, 20, window=18, seq_start=3)
        once = sinks if not parts else None
        parts.append(attend(q, k[start:stop], v[start:stop], scale=0.4, mask=mask, sinks=once))
    out, lse = merge(parts)
    whole, whole_lse = attend(q, k, v, scale=0.4, mask=causal_mask(5, 0, 40, 20, window=18, seq_start=3), sinks=sinks)
    assert relative_error(out, whole) <= 1e-13 and relative_error(lse, whole_lse) <= 1e-13


def test_a_merge_keeps_a_nan_whose_weight_underflows_and_drops_one_that_nobody_sees() -> None:
    ones, nans = torch.ones(1, 1, 3), torch.full((1, 1, 3), math.nan)
    out, _ = merge([(ones, torch.zeros(1, 1)), (nans, torch.full((1, 1), -500.0))])
    assert out.isnan().all()
    out, lse = merge([(ones, torch.zeros(1, 1)), (nans, torch.full((1, 1), -math.inf))])
    assert torch.equal(out, ones) and lse.item() == 0
    out, lse = merge([(ones * 0, torch.full((1, 1), -math.inf))] * 2)
    assert (out == 0).all() and lse.item() == -math.inf


def test_causal_mask_says_who_sees_what() -> None:
    mask = causal_mask(3, 2, 8, 4, window=3, seq_start=3)  # queries at 4, 5, 6; keys at 2..7
    assert mask.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n,m,group,d", [(1, 1, 1, 64), (37, 500, 4, 128), (129, 129, 7, 80), (16, 8192, 2, 256)])
def test_flash_attention_is_dense_attention(n: int, m: int, group: int, d: int, causal: bool) -> None:
    n, m = (max(n, m),) * 2 if causal else (n, m)
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (
        torch.randn(rows, heads, d, generator=generator, device="cuda").bfloat16()
        for rows, heads in ((n, 2 * group), (m, 2), (m, 2))
    )
    mask = torch.ones(n, m, dtype=torch.bool, device="cuda")
    wanted = attend(q, k, v, scale=d**-0.5, mask=mask.tril() if causal else mask)
    got = attend_flash(q, k, v, scale=d**-0.5, causal=causal)
    assert got[0].dtype == got[1].dtype == torch.float32
    assert (got[0] - wanted[0]).norm() <= 8e-3 * wanted[0].norm()
    assert (got[1] - wanted[1]).abs().max() <= 1e-2
