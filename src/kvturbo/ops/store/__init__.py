"""Store: quantise new keys and values into their slots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.ops import backends, checks
from kvturbo.ops.calls import CheckedCalls, traits
from kvturbo.ops.recent import check_recent_places

Run = Callable[..., None]
"""Takes k, v, pages, slot_mapping, outlier_channels, recent_rows, recent_slots."""
_CHECKED: CheckedCalls[Run] = CheckedCalls()


def store(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    *,
    fmt: KVFormat,
    outlier_channels: Tensor | None = None,
    recent_rows: Tensor | None = None,
    recent_slots: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Quantises keys and values and writes them into their slots; every other slot keeps its bits.

    With recent_rows and recent_slots (both or none) it also copies tokens as they are into rings, in the same launch.

    Args:
        k, v: [T, num_kv_heads, d], fp16, bf16, fp32 or fp64, keys after RoPE.
        pages: [num_pages, num_kv_heads, page_bytes] uint8, changed in place.
        slot_mapping: [T] int64, page * page_size + slot; -1 skips the token. No slot twice.
        fmt: the format.
        outlier_channels: [num_kv_heads, fmt.channel_count] int64, needed by the `-o` formats.
        recent_rows: [rings, num_kv_heads, 2, R, d] in the dtype of k and v, contiguous, changed in place: rings of raw keys
            and values, as in `kvturbo.ops.recent.Recent`.
        recent_slots: [T] int64, ring * R + p % R for a token of position p that is copied, -1 for none; no place twice. A
            token that slot_mapping skips is not copied either.
        backend: "auto" or one of `kvturbo.ops.backends.BACKENDS`.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, a slot is out of range (seen on the CPU
            only: no synchronisation on a GPU), or the backend is not available.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        kind = (
            k.shape, k.is_contiguous() or k.stride(), k.dtype, k.device,
            v.shape, v.is_contiguous() or v.stride(), v.dtype, v.device,
            pages.shape, pages.is_contiguous() or pages.stride(), pages.dtype, pages.device,
            slot_mapping.shape, slot_mapping.is_contiguous() or slot_mapping.stride(), slot_mapping.dtype, slot_mapping.device,
            outlier_channels if outlier_channels is None else traits(outlier_channels),
            recent_rows if recent_rows is None else traits(recent_rows),
            recent_slots if recent_slots is None else traits(recent_slots), fmt, backend,
        )  # fmt: skip
        last, run = _CHECKED.last
        if last != kind:
            run = _CHECKED.get(kind)
        if run is not None:
            return run(k, v, pages, slot_mapping, outlier_channels, recent_rows, recent_slots)
    page_size = checks.check_pages(pages, fmt)
    for name, x in (("k", k), ("v", v)):
        checks.check_vectors(name, x, fmt, pages)
    if k.shape != v.shape or k.shape[1] != pages.shape[1]:
        raise ValueError(f"k and v must both be [T, {pages.shape[1]}, d], got {list(k.shape)} and {list(v.shape)}")
    checks.check_tensor("slot_mapping", slot_mapping, (k.shape[0],), torch.int64, pages)
    checks.check_range("slot_mapping", slot_mapping, -1, pages.shape[0] * page_size - 1)
    checks.check_outliers(outlier_channels, fmt, pages)
    check_recent_places(recent_rows, recent_slots, k, v, pages)
    if compiling:
        torch.ops.kvturbo.store(
            k, v, pages, slot_mapping, fmt.name, fmt.seed, outlier_channels, backend, recent_rows, recent_slots
        )
        return None
    tensors = k, v, pages, slot_mapping, outlier_channels, recent_rows, recent_slots
    run = _prepared(backends.choose(backend, "store", pages.device, fmt), tensors, fmt)
    _CHECKED.remember(kind, run, pages.device)
    return run(*tensors)


def _prepared(backend: str, tensors: tuple[Tensor | None, ...], fmt: KVFormat) -> Run:
    """A backend's store with the format filled in; the cuda backend works out more of a call beforehand."""
    if backend == "cuda":
        return backends.load("store", "cuda", "prepare")(*tensors, fmt=fmt)
    return partial(backends.load("store", backend), fmt=fmt)
