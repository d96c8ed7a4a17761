"""Store in pure torch: quantise, then rewrite the slots of the pages that are touched."""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import SIDES, KVFormat
from kvturbo.layout import PageLayout
from kvturbo.quantizer import Packed, quantize


def store(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    outlier_channels: Tensor | None = None,
    recent_rows: Tensor | None = None,
    recent_slots: Tensor | None = None,
    *,
    fmt: KVFormat,
) -> None:
    """See `kvturbo.ops.store`."""
    keep = slot_mapping >= 0
    if not keep.any():
        return
    layout = PageLayout.of(fmt, PageLayout.page_size_of(fmt, pages.shape[2]))
    slots = slot_mapping[keep]
    touched, index = torch.unique(slots // layout.page_size, return_inverse=True)
    block = pages[touched]
    for side, x in zip(SIDES, (k, v), strict=True):
        new = quantize(x[keep], fmt, side, outlier_channels)
        old = layout.read(block, side)
        _put(old, new, index, slots % layout.page_size)
        layout.write(block, side, old)
    pages[touched] = block
    if recent_rows is not None and recent_slots is not None:
        _copy_recent(k, v, recent_rows, torch.where(keep, recent_slots, -1))


def _copy_recent(k: Tensor, v: Tensor, rows: Tensor, slots: Tensor) -> None:
    """Copies tokens [T, heads, d] to their places in rings [rings, heads, 2, R, d]."""
    kept, size = slots >= 0, rows.shape[3]
    ring, place = slots[kept] // size, slots[kept] % size
    for side, x in enumerate((k, v)):
        rows[ring, :, side, place] = x[kept]


def _put(pages: Packed, tokens: Packed, index: Tensor, slot: Tensor) -> None:
    """Puts tokens' fields [n, heads, ...] into pages' [pages, heads, page_size, ...] at (index, :, slot)."""
    for name in ("codes", "scales", "outliers", "outlier_scale", "residual_signs", "residual_norm"):
        field = getattr(tokens, name)
        if field is not None:
            getattr(pages, name)[index, :, slot] = field
