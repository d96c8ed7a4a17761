"""The decode kernels and the schedule kernel: compiled, loaded, and kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import torch

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import Kernel, arch_of, compiled
from kvturbo.ops.decode.variants import FEW_TASKS, Variant, limits_of, schedule_source, variant_for


@lru_cache(maxsize=8)
def _plan_kernel(device: torch.device) -> Kernel:
    """schedule.cu, the same for every variant."""
    return Kernel(compiled(schedule_source(), arch_of(device), {}), "schedule", device)


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
    ring_size: int = 0,
    **options: object,
) -> None:
    """Compiles (in parallel) and loads every kernel for queries and outputs of a dtype, whatever the batch and the options.

    Args:
        max_q_len: the largest q_len; None as 1.
        ring_size: tokens of a ring of the calls' `recent`; 0 for calls without.
        options: of decode; they are arguments of the kernel here.

    Raises:
        KeyError: dtype is not bf16, fp16 or fp32.
    """
    limits, group = limits_of(device), num_q_heads // num_kv_heads
    variants = {
        variant_for(fmt, page_size, dtype, dtype, group, q_len, tasks, limits, ring_size)
        for q_len in range(1, (max_q_len or 1) + 1)
        for tasks in (1, FEW_TASKS + 1)
    }
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda variant: _code(variant, device), variants))
    for variant in variants:
        kernels(variant, device)


class Kernels(NamedTuple):
    """What a variant's calls launch, the decode kernel with so many CTAs, and the GPU's multiprocessors."""

    decode: Kernel
    schedule: Kernel
    ctas: int
    multiprocessors: int


_LOADED: dict[tuple[Variant, torch.device], Kernels] = {}


def kernels(variant: Variant, device: torch.device) -> Kernels:
    """The kernels of a variant, as many CTAs as run at once.

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
        count = torch.cuda.get_device_properties(device).multi_processor_count
        ctas = count * min(variant.ctas_per_sm, decode.ctas_per_sm(variant.warps * 32))
        _LOADED[key] = Kernels(decode, _plan_kernel(device), ctas, count)
    return _LOADED[key]
