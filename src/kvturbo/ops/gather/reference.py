"""Gather in pure torch: read whole pages, dequantise, cut."""

from __future__ import annotations

from torch import Tensor

from kvturbo.config import SIDES, KVFormat
from kvturbo.layout import PageLayout
from kvturbo.quantizer import dequantize


def gather(
    pages: Tensor,
    block_table: Tensor,
    start: int,
    stop: int,
    out: tuple[Tensor, Tensor],
    *,
    fmt: KVFormat,
    rotated: bool = False,
    outlier_channels: Tensor | None = None,
) -> None:
    """See `kvturbo.ops.gather`; writes into out."""
    layout = PageLayout.of(fmt, PageLayout.page_size_of(fmt, pages.shape[2]))
    first = start // layout.page_size
    last = -(-stop // layout.page_size)
    block = pages[block_table[:, first:last].long()]  # [B, pages, heads, page_bytes]
    channels = None if outlier_channels is None else outlier_channels[:, None, :]
    for side, target in zip(SIDES, out, strict=True):
        x = dequantize(layout.read(block, side), fmt, side, channels, rotated=rotated)
        x = x.transpose(2, 3).flatten(1, 2)  # [B, tokens, heads, d]
        offset = first * layout.page_size
        target.copy_(x[:, start - offset : stop - offset])
