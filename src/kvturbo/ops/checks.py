"""What every operation checks of its arguments before a backend sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import KVFormat, check_format
from kvturbo.layout import PageLayout
from kvturbo.quantizer import check_channels

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_Q_LEN = 8


def check_pages(pages: Tensor, fmt: KVFormat) -> int:
    """Raises unless pages are [num_pages, num_kv_heads, page_bytes] uint8 of the format; returns the page size."""
    check_format(fmt)
    if pages.dtype != torch.uint8 or pages.dim() != 3:
        raise ValueError(
            f"pages must be uint8 [num_pages, num_kv_heads, page_bytes], got {pages.dtype} {list(pages.shape)}"
        )
    page_size = PageLayout.page_size_of(fmt, pages.shape[2])
    if pages.shape[1] < 1:
        raise ValueError(f"pages must have at least 1 KV head, got {list(pages.shape)}")
    if pages.stride(2) != 1 or (pages.shape[1] > 1 and pages.stride(1) != pages.shape[2]):
        raise ValueError(f"each page's bytes and a page's heads must be contiguous, got strides {pages.stride()}")
    return page_size


def check_vectors(name: str, x: Tensor, fmt: KVFormat, pages: Tensor) -> None:
    """Raises unless x is [n, heads, head_dim], floating point, on the pages' device."""
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {', '.join(str(d) for d in FLOATS)}, got {x.dtype}")
    if x.dim() != 3 or x.shape[2] != fmt.head_dim:
        raise ValueError(f"{name} must be [tokens, heads, {fmt.head_dim}] for {fmt.name!r}, got {list(x.shape)}")
    if x.device != pages.device:
        raise ValueError(f"{name} must be on the pages' device {pages.device}, got {x.device}")


def check_heads(q: Tensor, pages: Tensor) -> None:
    """Raises unless q's heads are a multiple of the pages' KV heads."""
    if not q.shape[1] or q.shape[1] % pages.shape[1]:
        raise ValueError(f"query heads must be a multiple of the {pages.shape[1]} KV heads, got {q.shape[1]}")


def check_scores(scale: float, window: int | None, soft_cap: float | None, sinks: Tensor | None, q: Tensor) -> None:
    """Raises unless the options of the scores are in range: scale > 0, window >= 1, soft_cap > 0, sinks fp32 [num_q_heads]."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if window is not None and (isinstance(window, float) or window < 1):
        raise ValueError(f"window must be {'a whole number' if window >= 1 else 'at least 1'}, got {window}")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap must be positive, got {soft_cap}")
    if sinks is not None:
        check_tensor("sinks", sinks, (q.shape[1],), torch.float32, q)


def check_starts(seq_starts: Tensor | None, batch: int, pages: Tensor) -> None:
    """Raises unless seq_starts are int32 [batch], not negative, or None."""
    if seq_starts is not None:
        check_tensor("seq_starts", seq_starts, (batch,), torch.int32, pages)
        check_range("seq_starts", seq_starts, 0, 2**31 - 1)


def check_tensor(name: str, x: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype, like: Tensor) -> None:
    """Raises unless x has the dtype, the shape (None: any size) and like's device."""
    fits = x.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, x.shape, strict=True))
    if x.dtype != dtype or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be {dtype} [{wanted}], got {x.dtype} {list(x.shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {x.device}")


def check_range(name: str, x: Tensor, low: int, high: int) -> None:
    """Raises unless low <= x <= high. Only host tensors are looked at: a device tensor would cost a synchronisation."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return
    smallest, largest = int(x.min()), int(x.max())
    if smallest < low or largest > high:
        raise ValueError(f"{name} must be from {low} to {high}, got {smallest if smallest < low else largest}")


def check_outliers(outlier_channels: Tensor | None, fmt: KVFormat, pages: Tensor) -> None:
    """Raises unless outlier_channels are [num_kv_heads, channel_count] int64 where the format needs them."""
    if outlier_channels is None:
        if fmt.outliers:
            raise ValueError(f"format {fmt.name!r} needs outlier_channels [{pages.shape[1]}, {fmt.outliers}], got None")
        return
    check_tensor("outlier_channels", outlier_channels, (pages.shape[1], fmt.channel_count), torch.int64, pages)
    if outlier_channels.device.type == "cpu":
        check_channels(outlier_channels, fmt)


def check_tables(block_table: Tensor, lens: Tensor, name: str, pages: Tensor, page_size: int) -> None:
    """Raises unless block_table is int32 [B, any] with page ids in range and lens int32 [B] that fit in it."""
    check_tensor("block_table", block_table, (None, None), torch.int32, pages)
    check_tensor(name, lens, (block_table.shape[0],), torch.int32, pages)
    check_range(name, lens, 0, block_table.shape[1] * page_size)
    if block_table.device.type != "cpu" or torch.compiler.is_compiling():
        return
    used = torch.arange(block_table.shape[1]) < (lens[:, None] + page_size - 1) // page_size
    check_range("block_table", block_table[used], 0, pages.shape[0] - 1)
