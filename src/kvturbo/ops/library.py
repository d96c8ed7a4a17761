"""The operations as torch.library ops, so that torch.compile takes them whole. Needs nothing but torch."""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.ops import backends
from kvturbo.ops.recent import Recent


# No default for recent_rows: torch 2.11 leaves out trailing arguments that equal their defaults and then looks for the mutated one.
@torch.library.custom_op("kvturbo::store", mutates_args={"pages", "recent_rows"})
def store(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    format_name: str,
    seed: int,
    outlier_channels: Tensor | None,
    backend: str,
    recent_rows: Tensor | None,
    recent_slots: Tensor | None,
) -> None:
    """`kvturbo.ops.store`, the format by name. The backend is chosen when it runs, not when it is traced."""
    fmt = KVFormat.from_name(format_name, k.shape[-1], seed=seed)
    run = backends.load("store", backends.choose(backend, "store", pages.device, fmt))
    run(k, v, pages, slot_mapping, outlier_channels, recent_rows, recent_slots, fmt=fmt)


@store.register_fake
def _(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    format_name: str,
    seed: int,
    outlier_channels: Tensor | None,
    backend: str,
    recent_rows: Tensor | None,
    recent_slots: Tensor | None,
) -> None:
    return None


@torch.library.custom_op("kvturbo::gather", mutates_args={"k_out", "v_out"})
def gather(
    pages: Tensor,
    block_table: Tensor,
    start: int,
    stop: int,
    k_out: Tensor,
    v_out: Tensor,
    format_name: str,
    seed: int,
    rotated: bool,
    outlier_channels: Tensor | None,
    backend: str,
) -> None:
    """`kvturbo.ops.gather`, the format by name. The backend is chosen when it runs, not when it is traced."""
    fmt = KVFormat.from_name(format_name, k_out.shape[-1], seed=seed)
    run = backends.load("gather", backends.choose(backend, "gather", pages.device, fmt))
    run(pages, block_table, start, stop, (k_out, v_out), fmt=fmt, rotated=rotated, outlier_channels=outlier_channels)


@gather.register_fake
def _(
    pages: Tensor,
    block_table: Tensor,
    start: int,
    stop: int,
    k_out: Tensor,
    v_out: Tensor,
    format_name: str,
    seed: int,
    rotated: bool,
    outlier_channels: Tensor | None,
    backend: str,
) -> None:
    return None


@torch.library.custom_op("kvturbo::decode", mutates_args={"out"})
def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    format_name: str,
    seed: int,
    scale: float,
    q_lens: Tensor | None,
    seq_starts: Tensor | None,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    outlier_channels: Tensor | None,
    backend: str,
    recent_rows: Tensor | None = None,
    recent_slots: Tensor | None = None,
    recent_counts: Tensor | None = None,
) -> Tensor:
    """`kvturbo.ops.decode`, the format by name. The backend is chosen when it runs, not when it is traced. Returns lse."""
    fmt = KVFormat.from_name(format_name, q.shape[-1], seed=seed)
    run = backends.load("decode", backends.choose(backend, "decode", pages.device, fmt))
    lse: Tensor = run(
        q, pages, block_table, seq_lens, out, fmt=fmt, scale=scale, q_lens=q_lens, seq_starts=seq_starts, window=window,
        soft_cap=soft_cap, sinks=sinks, outlier_channels=outlier_channels, recent=_recent(recent_rows, recent_slots, recent_counts),
    )  # fmt: skip
    return lse


def _recent(rows: Tensor | None, slots: Tensor | None, counts: Tensor | None) -> Recent | None:
    return None if rows is None or slots is None or counts is None else Recent(rows, slots, counts)


@decode.register_fake
def _(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    format_name: str,
    seed: int,
    scale: float,
    q_lens: Tensor | None,
    seq_starts: Tensor | None,
    window: int | None,
    soft_cap: float | None,
    sinks: Tensor | None,
    outlier_channels: Tensor | None,
    backend: str,
    recent_rows: Tensor | None = None,
    recent_slots: Tensor | None = None,
    recent_counts: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
