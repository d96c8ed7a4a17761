"""Gather: a dequantised copy of a bounded range of the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.ops import backends, checks
from kvturbo.quantizer import has_rotated_form


def gather(
    pages: Tensor,
    block_table: Tensor,
    start: int,
    stop: int,
    *,
    fmt: KVFormat,
    rotated: bool = False,
    outlier_channels: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Copies positions start..stop-1 of every row of block_table out of the pages.

    Args:
        pages: [num_pages, num_kv_heads, page_bytes] uint8.
        block_table: [B, any] int32, the pages of each sequence in order.
        start, stop: the range of positions, the same for every row.
        fmt: the format.
        rotated: leave keys and values in rotated space (not for `-o` and `tq` formats).
        outlier_channels: [num_kv_heads, fmt.channel_count] int64, as given to store.
        dtype: of the copies when `out` is not given.
        out: two tensors [B, stop - start, num_kv_heads, d] to write into.
        backend: "auto" or one of `kvturbo.ops.backends.BACKENDS`.

    Returns:
        k and v, [B, stop - start, num_kv_heads, d].

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, the range does not fit the block table, the format has
            no rotated form, or the backend is not available.
    """
    page_size = checks.check_pages(pages, fmt)
    checks.check_tensor("block_table", block_table, (None, None), torch.int32, pages)
    if not 0 <= start <= stop <= block_table.shape[1] * page_size:
        limit = block_table.shape[1] * page_size
        raise ValueError(f"range must satisfy 0 <= start <= stop <= {limit}, got start {start}, stop {stop}")
    checks.check_range("block_table", block_table[:, start // page_size : -(-stop // page_size)], 0, pages.shape[0] - 1)
    checks.check_outliers(outlier_channels, fmt, pages)
    if rotated and not (has_rotated_form(fmt.k) and has_rotated_form(fmt.v)):
        raise ValueError(f"format {fmt.name!r} has no rotated form; gather it with rotated=False")
    shape = (block_table.shape[0], stop - start, pages.shape[1], fmt.head_dim)
    if out is None:
        out = (
            torch.empty(shape, dtype=dtype, device=pages.device),
            torch.empty(shape, dtype=dtype, device=pages.device),
        )
    for name, x in zip(("out[0]", "out[1]"), out, strict=True):
        if x.shape != shape or x.dtype not in checks.FLOATS or x.device != pages.device:
            raise ValueError(
                f"{name} must be floating point {list(shape)} on {pages.device}, got {x.dtype} {list(x.shape)}"
            )
    if torch.compiler.is_compiling():
        torch.ops.kvturbo.gather(
            pages, block_table, start, stop, out[0], out[1], fmt.name, fmt.seed, rotated, outlier_channels, backend
        )
        return out
    run = backends.load("gather", backends.choose(backend, "gather", pages.device, fmt))
    run(pages, block_table, start, stop, out, fmt=fmt, rotated=rotated, outlier_channels=outlier_channels)
    return out
