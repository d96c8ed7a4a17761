"""Decode on int8 tensor cores: checks calls, finds or makes their plans, and launches decode.cu."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import Parameters, current_device, current_stream, empty_strided
from kvturbo.cuda.source import sign_words
from kvturbo.ops.decode.cuda_schedule import (
    Schedule,
    check_contiguous,
    idle_schedules,
    schedule_for,
    shape_of,
    variant_of,
)
from kvturbo.ops.decode.loading import warmup
from kvturbo.ops.recent import Recent
from kvturbo.ops.sharing import SharedSchedules

__all__ = ["decode", "prepare", "warmup"]

_LOG2E = 1.4426950408889634


class _Params(Parameters):
    """`Params` of decode.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "pages", "block_table", "seq_lens", "q_lens", "seq_starts", "sinks")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("outlier_channels", "recent", "recent_slots", "recent_counts", "plan", "workspace")
        ),
        *((name, ctypes.c_void_p) for name in ("counters", "out", "lse")),
        ("block_stride", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("table_stride", "batch", "rows", "kv_heads", "window")),
        ("scale_log2", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("signs", ctypes.c_uint32 * 8),
    )


_ADDRESSES = struct.Struct("16P")
"""The first fields of `_Params`; the others are the same in all calls of a kind."""


class _Call:
    """What calls of one kind share: their kernel, and all of its parameters but the addresses."""

    def __init__(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        out_dtype: torch.dtype,
        recent: Recent | None,
        *,
        fmt: KVFormat,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        variant = variant_of(q, pages, seq_lens, fmt, out_dtype, 0 if recent is None else recent.size)
        self.shape = shape_of(variant, len(seq_lens), pages.shape[1], q.device)
        self.window = window
        rows, heads, head_dim = q.shape
        self._out = (rows, heads, head_dim), (heads * head_dim, head_dim, 1), q.dtype
        self._lse = (rows, heads), (heads, 1), torch.float32
        self._spare: list[_Params] = []
        self._sizes = (
            pages.stride(0), block_table.stride(0), len(seq_lens), q.shape[0], pages.shape[1], window or 0,
            scale * _LOG2E, (soft_cap or 0.0) * _LOG2E, sign_words(fmt.head_dim, fmt.seed),
        )  # fmt: skip

    def run(
        self,
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        out: Tensor | None,
        q_lens: Tensor | None,
        seq_starts: Tensor | None,
        sinks: Tensor | None,
        outlier_channels: Tensor | None,
        schedule: Any,
        recent: Recent | None,
    ) -> tuple[Tensor, Tensor]:
        """Launches the kernel for a contiguous q, and without a schedule that of the plan before it; returns out and lse."""
        shape, idle = self.shape, None
        if current_device() != shape.device.index:
            with torch.cuda.device(shape.device):
                return self.run(
                    q, pages, block_table, seq_lens, out, q_lens, seq_starts, sinks, outlier_channels, schedule, recent
                )
        at_pages = pages.data_ptr()
        if at_pages % 16:
            raise ValueError(f"pages must begin at a multiple of 16 bytes, got address {at_pages:#x}")
        stream = current_stream(shape.device.index)
        rings = (0, 0, 0) if recent is None else tuple(map(Tensor.data_ptr, recent))
        if rings[0] % 16:
            raise ValueError(f"recent.rows must begin at a multiple of 16 bytes, got address {rings[0]:#x}")
        lens = (
            seq_lens.data_ptr(),
            0 if q_lens is None else q_lens.data_ptr(),
            0 if seq_starts is None else seq_starts.data_ptr(),
            rings[2],
        )
        if schedule is not None and not isinstance(schedule, SharedSchedules):
            self._check(schedule, rings[2])
        elif torch.cuda.is_current_stream_capturing():  # a captured graph gets one of its own, in its own memory
            schedule = self._planned(Schedule(shape.variant, shape.batch, shape.kv_heads, shape.device), lens, stream)
        elif schedule is None or recent is not None:  # whose counts shared plans don't know
            idle = idle_schedules(shape, stream)
            try:
                schedule = idle.pop()
            except IndexError:
                schedule = schedule_for(shape, stream)
            schedule.plan_at(lens, self.window, stream)
        else:
            kind = shape, self.window, stream
            schedule = schedule.find(kind, seq_lens, q_lens, seq_starts) or schedule.make(
                kind, seq_lens, q_lens, seq_starts, lambda last: self._planned(last, lens, stream)
            )
        out = empty_strided(*self._out) if out is None else out
        lse = empty_strided(*self._lse)
        try:
            parameters = self._spare.pop()  # one that no other thread is filling
        except IndexError:
            parameters = _Params(*[None] * 16, *self._sizes)
        _ADDRESSES.pack_into(
            parameters, 0, q.data_ptr(), at_pages, block_table.data_ptr(), *lens[:3], 0 if sinks is None else sinks.data_ptr(),
            0 if outlier_channels is None else outlier_channels.data_ptr(), *rings, *schedule.addresses, out.data_ptr(),
            lse.data_ptr(),
        )  # fmt: skip
        schedule.kernel.launch(schedule.ctas, schedule.threads, parameters, stream)
        self._spare.append(parameters)
        if idle is not None:
            idle.append(schedule)
        return out, lse

    def _planned(self, last: Schedule | None, lens: tuple[int, int, int, int], stream: int) -> Schedule:
        """A plan in the memory of the last one."""
        schedule = last or schedule_for(self.shape, stream)
        schedule.plan_at(lens, self.window, stream)
        return schedule

    def _check(self, schedule: Any, counts_at: int) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"the cuda backend needs a schedule of make_schedule, got {type(schedule).__name__}")
        shape = self.shape
        if (
            (schedule.variant is not shape.variant and schedule.variant != shape.variant)
            or schedule.batch != shape.batch
            or schedule.kv_heads != shape.kv_heads
            or schedule.window != self.window
        ):
            raise ValueError(
                f"the schedule is for another call: {schedule.variant}, batch {schedule.batch}, window {schedule.window}"
            )
        if schedule.counts_at != counts_at:
            raise ValueError("the schedule was updated with other recent_counts than those of this call's recent")
        if not schedule.planned:
            raise RuntimeError("the schedule has no plan: call its update before the step's decodes")


def prepare(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor | None,
    q_lens: Tensor | None,
    seq_starts: Tensor | None,
    sinks: Tensor | None,
    outlier_channels: Tensor | None,
    recent: Recent | None,
    *,
    fmt: KVFormat,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Checks what the kernel needs of a call's tensors, and loads the kernel.

    Args:
        q, pages, ...: of a call, as in `kvturbo.ops.decode`.

    Returns:
        What runs calls with such tensors: takes the same ones, a schedule or None before the last; returns out (made if None), lse.

    Raises:
        TypeError, ValueError: the kernel can't do it.
    """
    if not len(q) or not len(seq_lens) or not len(pages):
        return _nothing
    out_dtype = q.dtype if out is None else out.dtype
    run = _Call(
        q, pages, block_table, seq_lens, out_dtype, recent, fmt=fmt, scale=scale, window=window, soft_cap=soft_cap
    ).run
    slots, counts = (None, None) if recent is None else recent[1:]
    check_contiguous(
        out=out,
        slots=slots,
        counts=counts,
        seq_lens=seq_lens,
        q_lens=q_lens,
        seq_starts=seq_starts,
        sinks=sinks,
        outlier_channels=outlier_channels,
    )
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise ValueError(f"block_table's rows must be contiguous, got strides {block_table.stride()}")
    if len(pages) > 1 and (pages.stride(0) >= 1 << 32 or pages.stride(0) % 16):
        raise ValueError(
            f"pages must begin at multiples of 16 bytes and lie less than 4 GiB apart, got stride {pages.stride(0)}"
        )
    return run if q.is_contiguous() else lambda q, *rest: run(q.contiguous(), *rest)


def _nothing(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor | None,
    q_lens: Tensor | None,
    seq_starts: Tensor | None,
    sinks: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """A call without queries, sequences or pages (the kernel reads page 0 in place of those that a sequence does not have)."""
    out = torch.zeros_like(q) if out is None else out.zero_()
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
    return out, lse if sinks is None else lse.copy_(sinks.expand_as(lse))


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
    schedule: Schedule | None = None,
) -> Tensor:
    """See `kvturbo.ops.decode`; writes into out and returns lse."""
    tensors = q, pages, block_table, seq_lens, out, q_lens, seq_starts, sinks, outlier_channels
    run = prepare(*tensors, recent, fmt=fmt, scale=scale, window=window, soft_cap=soft_cap)
    return run(*tensors, schedule, recent)[1]
