"""Decode on int8 tensor cores: builds, schedules and launches decode.cu and schedule.cu."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import Kernel, Parameters, arch_of, compiled
from kvturbo.cuda.source import TYPES, pointer, sign_words
from kvturbo.layout import PageLayout
from kvturbo.ops.decode.variants import FEW_TASKS, FOLDER, Variant, limits_of, variant_for

_LOG2E = 1.4426950408889634
_CHUNKS_PER_CTA = 3  # 1 + SMALL_PER_CTA of schedule.cu


class _Params(Parameters):
    """`Params` of decode.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("q", "pages", "block_table", "seq_lens", "q_lens", "seq_starts", "sinks")
        ),
        *((name, ctypes.c_void_p) for name in ("outlier_channels", "plan", "workspace", "counters", "out", "lse")),
        ("block_stride", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("table_stride", "batch", "rows", "kv_heads", "window")),
        ("scale_log2", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("signs", ctypes.c_uint32 * 8),
    )


class _ScheduleParams(Parameters):
    """`Params` of schedule.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("seq_lens", "q_lens", "seq_starts", "plan")),
        *(
            (name, ctypes.c_int)
            for name in ("batch", "window", "kv_heads", "group", "rows", "step", "ctas", "min_chunk")
        ),
    )


@lru_cache(maxsize=8)
def _plan_kernel(device: torch.device) -> Kernel:
    """schedule.cu, the same for every variant."""
    return Kernel(compiled((FOLDER / "schedule.cu").read_text(), arch_of(device), {}), "schedule", device)


def _code(variant: Variant, device: torch.device) -> bytes:
    return compiled(variant.source(), arch_of(device), variant.macros())


def warmup(
    fmt: KVFormat,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_q_len: int | None = None,
    **options: object,
) -> None:
    """Compiles (in parallel) and loads every kernel for queries and outputs of a dtype, whatever the batch and the options.

    Args:
        max_q_len: the largest q_len; None as 1.
        options: of decode; they are arguments of the kernel here.

    Raises:
        KeyError: dtype is not bf16, fp16 or fp32.
    """
    limits, group = limits_of(device), num_q_heads // num_kv_heads
    variants = {
        variant_for(fmt, page_size, dtype, dtype, group, q_len, tasks, limits)
        for q_len in range(1, (max_q_len or 1) + 1)
        for tasks in (1, FEW_TASKS + 1)
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda variant: _code(variant, device), variants))
    for variant in variants:
        _kernels(variant, device)


_LOADED: dict[tuple[Variant, torch.device], tuple[Kernel, Kernel, int]] = {}


def _kernels(variant: Variant, device: torch.device) -> tuple[Kernel, Kernel, int]:
    """The decode kernel, the schedule kernel and the number of CTAs.

    Raises:
        RuntimeError: they are not loaded yet and a CUDA graph is being captured.
    """
    key = variant, device
    if key not in _LOADED:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a decode kernel must be loaded before a graph is captured: call decode once with such tensors"
            )
        code = _code(variant, device)
        decode = Kernel(code, "decode", device, variant.shared_bytes)
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        _LOADED[key] = (
            decode,
            _plan_kernel(device),
            sms * min(variant.ctas_per_sm, decode.ctas_per_sm(variant.warps * 32)),
        )
    return _LOADED[key]


Memory = tuple[Tensor, Tensor]
"""Workspace (two partial results per chunk) and counters (zero between launches)."""


def memory_for(variant: Variant, device: torch.device) -> Memory:
    """Memory for the launches of a variant, one after another."""
    chunks = _CHUNKS_PER_CTA * _kernels(variant, device)[2]
    workspace = torch.empty(2 * chunks * variant.partial_floats, dtype=torch.float32, device=device)
    return workspace, torch.zeros(1 + chunks * variant.warps, dtype=torch.int32, device=device)


def _check_contiguous(**tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous for the cuda backend, got strides {x.stride()}")


class Schedule:
    """The plan of splits of a decode step, and the workspace it needs; one for all layers of a step, per stream.

    The workspace does not grow with the pool or the context: 2 partial results per chunk, 3 chunks per CTA; for head_dim 128
    on a GPU with 132 multiprocessors at most 2 * 3 * 264 * 16 * 130 * 4 bytes = 13.2 MB (9.9 MB for up to 8 query rows).

    Args:
        variant: the kernel it is for.
        batch: number of sequences.
        kv_heads: KV heads per layer.
        device: the GPU.
        memory: of a schedule for the same variant whose launches never run beside this one's; default: its own.
    """

    def __init__(
        self, variant: Variant, batch: int, kv_heads: int, device: torch.device, memory: Memory | None = None
    ) -> None:
        self.variant, self.batch, self.kv_heads, self.device = variant, batch, kv_heads, device
        self.window: int | None = None
        self._planned = False
        self._decode, self._plan, self.ctas = _kernels(variant, device)
        ints = 8 + 8 * _CHUNKS_PER_CTA * self.ctas + 2 * (batch + 1)
        self.plan = torch.zeros(ints, dtype=torch.int32, device=device)
        self.workspace, self.counters = memory or memory_for(variant, device)

    def update(
        self,
        seq_lens: Tensor,
        q_lens: Tensor | None = None,
        seq_starts: Tensor | None = None,
        window: int | None = None,
    ) -> None:
        """Makes the plan for new lengths, on the device; tensors as in `kvturbo.ops.decode`.

        Raises:
            ValueError: a tensor is not contiguous.
        """
        _check_contiguous(seq_lens=seq_lens, q_lens=q_lens, seq_starts=seq_starts)
        self.window, self._planned = window, True
        parameters = _ScheduleParams(
            seq_lens.data_ptr(), pointer(q_lens), pointer(seq_starts), self.plan.data_ptr(), self.batch, window or 0,
            self.kv_heads, self.variant.group, self.variant.rows, self.variant.step, self.ctas, self.variant.warps,
        )  # fmt: skip
        self._plan.launch(1, 1024, parameters, torch.cuda.current_stream(self.device).cuda_stream)

    def launch(self, parameters: _Params) -> None:
        """Launches the decode kernel on the current stream.

        Raises:
            RuntimeError: there is no plan yet.
        """
        if not self._planned:
            raise RuntimeError("the schedule has no plan: call its update before the step's decodes")
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self._decode.launch(self.ctas, self.variant.warps * 32, parameters, stream)


@lru_cache(maxsize=16)
def _stream_memory(variant: Variant, device: torch.device, stream: int) -> Memory:
    return memory_for(variant, device)


@lru_cache(maxsize=64)
def _own_schedule(variant: Variant, batch: int, kv_heads: int, device: torch.device, stream: int) -> Schedule:
    return Schedule(variant, batch, kv_heads, device, _stream_memory(variant, device, stream))


def make_schedule(
    q: Tensor, pages: Tensor, seq_lens: Tensor, *, fmt: KVFormat, out_dtype: torch.dtype | None = None
) -> Schedule:
    """A schedule for decode calls with such tensors; call its `update` once per step, before the step's decodes.

    Args:
        q, pages, seq_lens, fmt: as in `kvturbo.ops.decode`.
        out_dtype: of the outputs (default: q's).
    """
    return Schedule(_variant(q, pages, seq_lens, fmt, out_dtype or q.dtype), len(seq_lens), pages.shape[1], q.device)


def _variant(q: Tensor, pages: Tensor, seq_lens: Tensor, fmt: KVFormat, out_dtype: torch.dtype) -> Variant:
    for name, dtype in (("q", q.dtype), ("out", out_dtype)):
        if dtype not in TYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, TYPES))} for the cuda backend, got {dtype}")
    batch, kv_heads = len(seq_lens), pages.shape[1]
    q_len = -(-q.shape[0] // max(1, batch))
    return variant_for(
        fmt, PageLayout.page_size_of(fmt, pages.shape[2]), q.dtype, out_dtype, q.shape[1] // kv_heads, q_len,
        batch * kv_heads, limits_of(q.device),
    )  # fmt: skip


def _schedule(variant: Variant, batch: int, kv_heads: int, device: torch.device) -> Schedule:
    """This stream's schedule; a captured graph gets one of its own, in its own memory."""
    if torch.cuda.is_current_stream_capturing():
        return Schedule(variant, batch, kv_heads, device)
    return _own_schedule(variant, batch, kv_heads, device, torch.cuda.current_stream(device).cuda_stream)


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
    schedule: Schedule | None = None,
) -> Tensor:
    """See `kvturbo.ops.decode`; writes into out and returns lse."""
    tokens, heads, _ = q.shape
    batch, kv_heads = len(seq_lens), pages.shape[1]
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    if not tokens or not batch:
        out.zero_()
        return lse.copy_(torch.full_like(lse, -torch.inf) if sinks is None else sinks.expand_as(lse))
    variant = _variant(q, pages, seq_lens, fmt, out.dtype)
    _check_contiguous(out=out, seq_lens=seq_lens, seq_starts=seq_starts, sinks=sinks, outlier_channels=outlier_channels)
    if block_table.stride(1) != 1:
        raise ValueError(f"block_table's rows must be contiguous, got strides {block_table.stride()}")
    if pages.stride(0) >= 1 << 32 or pages.stride(0) % 16 or pages.data_ptr() % 16:
        raise ValueError(
            f"pages must begin at multiples of 16 bytes and lie less than 4 GiB apart, got stride {pages.stride(0)}"
        )
    if schedule is None:
        schedule = _schedule(variant, batch, kv_heads, q.device)
        schedule.update(seq_lens, q_lens, seq_starts, window)
    elif not isinstance(schedule, Schedule):
        raise TypeError(f"the cuda backend needs a schedule of make_schedule, got {type(schedule).__name__}")
    elif (schedule.variant, schedule.batch, schedule.kv_heads, schedule.window) != (variant, batch, kv_heads, window):
        raise ValueError(
            f"the schedule is for another call: {schedule.variant}, batch {schedule.batch}, window {schedule.window}"
        )
    q = q.contiguous()
    schedule.launch(
        _Params(
            q.data_ptr(), pages.data_ptr(), block_table.data_ptr(), seq_lens.data_ptr(), pointer(q_lens),
            pointer(seq_starts), pointer(sinks), pointer(outlier_channels), schedule.plan.data_ptr(),
            schedule.workspace.data_ptr(), schedule.counters.data_ptr(), out.data_ptr(), lse.data_ptr(), pages.stride(0),
            block_table.stride(0), batch, tokens, kv_heads, window or 0, scale * _LOG2E, (soft_cap or 0.0) * _LOG2E,
            sign_words(fmt.head_dim, fmt.seed),
        )
    )  # fmt: skip
    return lse
