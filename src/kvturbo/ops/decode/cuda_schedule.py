"""Plans of the cuda backend's decode: how a step's work is split among CTAs, made by schedule.cu, and the memory it needs."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import Parameters, current_stream
from kvturbo.cuda.source import TYPES, pointer
from kvturbo.layout import PageLayout
from kvturbo.ops.decode.loading import kernels
from kvturbo.ops.decode.variants import Variant, limits_of, variant_for

_CHUNKS_PER_CTA = 3  # 1 + SMALL_PER_CTA of shares.cuh


class _ScheduleParams(Parameters):
    """`Params` of schedule.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("seq_lens", "q_lens", "seq_starts", "recent_counts", "plan")),
        *(
            (name, ctypes.c_int)
            for name in (
                "batch",
                "window",
                "kv_heads",
                "group",
                "rows",
                "heavy",
                "step",
                "ctas",
                "per_rank",
                "min_chunk",
            )
        ),
    )


_FIRST_FIELDS = struct.Struct("5P2i")
"""Those of `_ScheduleParams` up to the window; the others are the same in all plans of a schedule."""

Memory = tuple[Tensor, Tensor]
"""Workspace (two partial results per chunk, with rings four) and counters (zero between launches)."""


def memory_for(variant: Variant, device: torch.device) -> Memory:
    """Memory for the launches of a variant, one after another."""
    chunks = _CHUNKS_PER_CTA * kernels(variant, device).ctas
    workspace = torch.empty(2 * chunks * variant.partial_floats, dtype=torch.float32, device=device)
    tickets, arrivals, claims, ends = 1, chunks * variant.warps, variant.ctas_per_sm, 1
    return workspace, torch.zeros(tickets + arrivals + claims + ends, dtype=torch.int32, device=device)


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError for the first tensor that is not contiguous."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous for the cuda backend, got strides {x.stride()}")


class Schedule:
    """The plan of splits of a decode step, and the workspace it needs; one for all layers of a step, per stream.

    Launches with one schedule, or with several in the same memory, have to run one after another: they write to the same workspace.

    The workspace does not grow with the pool or the context: 2 partial results per chunk, 3 chunks per CTA; for head_dim 128
    on a GPU with 132 multiprocessors at most 2 * 3 * 264 * 16 * 130 * 4 bytes = 13.2 MB (9.9 MB for up to 8 query rows), and
    twice as much where newest tokens are read raw, whose results lie beside.

    Args:
        variant: the kernel it is for.
        batch: number of sequences.
        kv_heads: KV heads per layer.
        device: the GPU.
        memory: of a schedule for the same variant whose launches never run beside this one's; default: its own.

    Attributes:
        kernel, ctas, threads: the decode kernel, and what it is launched with.
        plan, workspace, counters: its memory; `addresses` are theirs.
        planned, window, counts_at: whether there is a plan, its window, and where its recent_counts lie (0: nowhere).
    """

    def __init__(
        self, variant: Variant, batch: int, kv_heads: int, device: torch.device, memory: Memory | None = None
    ) -> None:
        self.variant, self.batch, self.kv_heads, self.device = variant, batch, kv_heads, device
        self.window: int | None = None
        self.planned, self.counts_at = False, 0
        self.kernel, self._plan_kernel, self.ctas, multiprocessors = kernels(variant, device)
        ints = 8 + 8 * _CHUNKS_PER_CTA * self.ctas + 2 * (batch + 1)
        self.plan = torch.zeros(ints, dtype=torch.int32, device=device)
        self.workspace, self.counters = memory or memory_for(variant, device)
        self.addresses = self.plan.data_ptr(), self.workspace.data_ptr(), self.counters.data_ptr()
        self._sizes = (
            kv_heads, variant.group, variant.rows, int(variant.heavy), variant.step, self.ctas, multiprocessors, variant.warps,
        )  # fmt: skip
        self.threads = variant.warps * 32
        self._spare: list[_ScheduleParams] = []

    @property
    def tensors(self) -> list[Tensor]:
        """What is its own on the device: the plan."""
        return [self.plan]

    def update(
        self,
        seq_lens: Tensor,
        q_lens: Tensor | None = None,
        seq_starts: Tensor | None = None,
        window: int | None = None,
        recent_counts: Tensor | None = None,
    ) -> None:
        """Makes the plan for new lengths, on the device; tensors as in `kvturbo.ops.decode` (recent_counts: those of `recent`).

        Raises:
            ValueError: a tensor is not contiguous.
        """
        check_contiguous(seq_lens=seq_lens, q_lens=q_lens, seq_starts=seq_starts, recent_counts=recent_counts)
        lens = seq_lens.data_ptr(), pointer(q_lens), pointer(seq_starts), pointer(recent_counts)
        self.plan_at(lens, window, current_stream(self.device.index))

    def plan_at(self, lens: tuple[int, int, int, int], window: int | None, stream: int) -> None:
        """`update` for tensors at these addresses (0: None) of seq_lens, q_lens, seq_starts and recent_counts, on a stream."""
        self.window, self.counts_at, self.planned = window, lens[3], True
        try:
            parameters = self._spare.pop()  # one that no other thread is filling
        except IndexError:
            parameters = _ScheduleParams(*[None] * 5, 0, 0, *self._sizes)
        _FIRST_FIELDS.pack_into(parameters, 0, *lens, self.addresses[0], self.batch, window or 0)
        self._plan_kernel.launch(1, 1024, parameters, stream)
        self._spare.append(parameters)


@lru_cache(maxsize=16)
def _stream_memory(variant: Variant, device: torch.device, stream: int) -> Memory:
    return memory_for(variant, device)


@dataclass(frozen=True, eq=False)
class Shape:
    """What schedules are made for. Its hash is its identity: it is a key in every call."""

    variant: Variant
    batch: int
    kv_heads: int
    device: torch.device


@lru_cache(maxsize=256)
def shape_of(variant: Variant, batch: int, kv_heads: int, device: torch.device) -> Shape:
    """The same object for the same shape."""
    return Shape(variant, batch, kv_heads, device)


def schedule_for(shape: Shape, stream: int) -> Schedule:
    """A schedule in a stream's memory."""
    memory = _stream_memory(shape.variant, shape.device, stream)
    return Schedule(shape.variant, shape.batch, shape.kv_heads, shape.device, memory)


@lru_cache(maxsize=64)
def idle_schedules(shape: Shape, stream: int) -> list[Schedule]:
    """A stream's schedules for calls without one; a call takes one out, so that no thread makes a plan in another's."""
    return []


def make_schedule(
    q: Tensor,
    pages: Tensor,
    seq_lens: Tensor,
    *,
    fmt: KVFormat,
    out_dtype: torch.dtype | None = None,
    ring_size: int = 0,
) -> Schedule:
    """A schedule for decode calls with such tensors; call its `update` once per step, before the step's decodes.

    Args:
        q, pages, seq_lens, fmt: as in `kvturbo.ops.decode`.
        out_dtype: of the outputs (default: q's).
        ring_size: of the calls' `recent`; 0 for calls without.
    """
    variant = variant_of(q, pages, seq_lens, fmt, out_dtype or q.dtype, ring_size)
    return Schedule(variant, len(seq_lens), pages.shape[1], q.device)


def variant_of(
    q: Tensor, pages: Tensor, seq_lens: Tensor, fmt: KVFormat, out_dtype: torch.dtype, ring_size: int
) -> Variant:
    """The kernel for calls with such tensors; TypeError for a dtype that no kernel has."""
    for name, dtype in (("q", q.dtype), ("out", out_dtype)):
        if dtype not in TYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, TYPES))} for the cuda backend, got {dtype}")
    batch, kv_heads = len(seq_lens), pages.shape[1]
    q_len = -(-q.shape[0] // max(1, batch))
    return variant_for(
        fmt, PageLayout.page_size_of(fmt, pages.shape[2]), q.dtype, out_dtype, q.shape[1] // kv_heads, q_len,
        batch * kv_heads, limits_of(q.device), ring_size,
    )  # fmt: skip
