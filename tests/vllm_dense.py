"""Stands in for vLLM's flash attention and merge: the same contract in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvturbo.ops import dense


def flash(scale: float, soft_cap: float | None = None) -> Callable[..., Tensor]:
    """`kvturbo.vllm.prefill.Flash` with a scale."""
    return partial(_flash, scale=scale, soft_cap=soft_cap)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    causal: bool,
    out: Tensor,
    **options: Any,
) -> Tensor:
    for bounds in starts:  # what vLLM's wants
        assert bounds.dtype == torch.int32 and bounds.is_contiguous()
    lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
    rows, keys = (bounds.tolist() for bounds in starts)
    assert max(b - a for a, b in pairwise(rows)) == longest[0]
    assert max(b - a for a, b in pairwise(keys)) == longest[1]
    for i in range(len(rows) - 1):
        a, b, c, d = rows[i], rows[i + 1], keys[i], keys[i + 1]
        mask = torch.ones(b - a, d - c, dtype=torch.bool)
        if causal:
            mask = dense.causal_mask(b - a, 0, d - c, d - c - (b - a))
        result, sums = dense.attend(q[a:b], k[c:d], v[c:d], mask=mask, **options)
        out[a:b] = result.to(out.dtype)
        lse[:, a:b] = sums.T
    return lse


def merge(out: Tensor, first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, lse: Tensor) -> None:
    """`kvturbo.vllm.prefill.Merge`; like vLLM's kernel it may not read what it writes."""
    addresses = {x.data_ptr() for x in (first, first_lse, second, second_lse)}
    assert not addresses & {out.data_ptr(), lse.data_ptr()}
    result, sums = dense.merge([(first.float(), first_lse.T), (second.float(), second_lse.T)])
    out.copy_(result.to(out.dtype))
    lse.copy_(sums.T)
