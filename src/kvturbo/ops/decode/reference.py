"""Decode in pure torch: one sequence at a time, each side in rotated space where it has one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvturbo.config import SIDES, KVFormat
from kvturbo.layout import PageLayout
from kvturbo.ops.dense import attend, causal_mask, first_seen, merge
from kvturbo.ops.recent import Recent
from kvturbo.quantizer import dequantize, has_rotated_form
from kvturbo.rotation import rotate, unrotate


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    fmt: KVFormat,
    scale: float,
    q_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    outlier_channels: Tensor | None = None,
    recent: Recent | None = None,
    schedule: Any = None,
) -> Tensor:
    """See `kvturbo.ops.decode`; writes into out and returns lse. There is nothing to schedule here."""
    layout = PageLayout.of(fmt, PageLayout.page_size_of(fmt, pages.shape[2]))
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full(q.shape[:2], -torch.inf, dtype=compute, device=q.device)
    if sinks is not None:
        lse.copy_(sinks.expand_as(lse))
    out.zero_()
    lengths = seq_lens.tolist()
    counts = [1] * len(lengths) if q_lens is None else q_lens.tolist()
    starts = [0] * len(lengths) if seq_starts is None else seq_starts.tolist()
    raw = [0] * len(lengths) if recent is None else recent.counts.tolist()
    k_rotated, v_rotated = (form.rotate and has_rotated_form(form) for form in (fmt.k, fmt.v))
    row = 0
    for b, (length, count, seq_start) in enumerate(zip(lengths, counts, starts, strict=True)):
        rows = slice(row, row + count)
        row += count
        if not count or not length:
            continue
        first = length - count
        begin, split = min(length, first_seen(first, window, seq_start)), length - raw[b]
        packed_from = min(begin, split)
        k, v = _read(layout, pages, block_table[b], packed_from, split, (k_rotated, v_rotated), outlier_channels)
        query = _turn(q[rows], fmt.seed, rotate) if k_rotated else q[rows]
        sees = {"first": first, "window": window, "seq_start": seq_start, "device": q.device}
        mask = causal_mask(count, packed_from, split, **sees)
        result, part = attend(query, k, v, scale=scale, mask=mask, soft_cap=soft_cap, sinks=sinks)
        parts = [(_turn(result, fmt.seed, unrotate) if v_rotated else result, part)]
        if recent is not None and raw[b]:
            k, v = (
                recent.rows[int(recent.slots[b])].transpose(0, 2)[torch.arange(split, length) % recent.size].unbind(1)
            )
            mask = causal_mask(count, split, length, **sees)
            parts.append(attend(q[rows], k, v, scale=scale, mask=mask, soft_cap=soft_cap))
        result, lse[rows] = merge(parts)
        out[rows] = result.to(out.dtype)
    return lse


def _turn(x: Tensor, seed: int, how: Any) -> Tensor:
    return how(x, seed).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _read(
    layout: PageLayout,
    pages: Tensor,
    table: Tensor,
    begin: int,
    length: int,
    rotated: tuple[bool, bool],
    outlier_channels: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Keys and values at positions begin..length-1: two [length - begin, heads, d] fp32."""
    first = begin // layout.page_size
    block = pages[table[first : -(-length // layout.page_size)].long()].transpose(0, 1)  # [heads, pages, page_bytes]
    channels = None if outlier_channels is None else outlier_channels[:, None, None, :]
    offset = first * layout.page_size
    sides = []
    for side, turned in zip(SIDES, rotated, strict=True):
        x = dequantize(layout.read(block, side), layout.fmt, side, channels, rotated=turned)
        sides.append(x.flatten(1, 2)[:, begin - offset : length - offset].transpose(0, 1))
    return sides[0], sides[1]
