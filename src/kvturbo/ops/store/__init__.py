"""Store: quantise new keys and values into their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.ops import backends, checks


def store(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    *,
    fmt: KVFormat,
    outlier_channels: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Quantises keys and values and writes them into their slots; every other slot keeps its bits.

    Args:
        k, v: [T, num_kv_heads, d], fp16, bf16, fp32 or fp64, keys after RoPE.
        pages: [num_pages, num_kv_heads, page_bytes] uint8, changed in place.
        slot_mapping: [T] int64, page * page_size + slot; -1 skips the token. No slot twice.
        fmt: the format.
        outlier_channels: [num_kv_heads, fmt.channel_count] int64, needed by the `-o` formats.
        backend: "auto" or one of `kvturbo.ops.backends.BACKENDS`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, a slot is out of range (seen on the CPU
            only: no synchronisation on a GPU), or the backend is not available.
    """
    page_size = checks.check_pages(pages, fmt)
    for name, x in (("k", k), ("v", v)):
        checks.check_vectors(name, x, fmt, pages)
    if k.shape != v.shape or k.shape[1] != pages.shape[1]:
        raise ValueError(f"k and v must both be [T, {pages.shape[1]}, d], got {list(k.shape)} and {list(v.shape)}")
    checks.check_tensor("slot_mapping", slot_mapping, (k.shape[0],), torch.int64, pages)
    checks.check_range("slot_mapping", slot_mapping, -1, pages.shape[0] * page_size - 1)
    checks.check_outliers(outlier_channels, fmt, pages)
    if torch.compiler.is_compiling():
        torch.ops.kvturbo.store(k, v, pages, slot_mapping, fmt.name, fmt.seed, outlier_channels, backend)
        return
    name = backends.choose(backend, "store", pages.device, fmt)
    backends.load("store", name)(k, v, pages, slot_mapping, fmt=fmt, outlier_channels=outlier_channels)
