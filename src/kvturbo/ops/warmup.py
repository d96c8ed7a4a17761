"""Warm-up: compiles and loads every kernel that a model's calls will launch, before the first of them."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from kvturbo.config import KVFormat
from kvturbo.ops import backends
from kvturbo.ops.checks import MAX_Q_LEN


def warmup(
    fmt: KVFormat,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    max_q_len: int | None = None,
    backend: str = "auto",
    **options: Any,
) -> None:
    """Compiles and loads store, decode and gather for one kind of layer; nothing to do on the reference backend.

    Calls that differ from these in their options only may still compile on the Triton backend, where options are part of a kernel;
    the cuda backend has one kernel for all options.

    Args:
        fmt, page_size: the pages.
        num_q_heads, num_kv_heads: of a layer.
        dtype: of queries, keys, values, outputs and 16-bit copies.
        device: the GPU.
        max_q_len: the largest q_len to come, 1 to 8; None for calls without q_lens.
        backend: as in `kvturbo.ops.decode`.
        options: of decode, whose presence picks a kernel: seq_starts, sinks (bool), window, soft_cap (a value or None), and
            ring_size (tokens of a ring of the calls' `recent`, 0 for calls without).

    Raises:
        ValueError: the backend does not exist or can't run here, or max_q_len is not from 1 to 8.
        TypeError: an option does not exist.
    """
    if max_q_len is not None and not 1 <= max_q_len <= MAX_Q_LEN:
        raise ValueError(f"max_q_len must be from 1 to {MAX_Q_LEN}, got {max_q_len}")
    unknown = set(options) - {"seq_starts", "window", "soft_cap", "sinks", "ring_size"}
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; valid: ring_size, seq_starts, sinks, soft_cap, window")
    device = torch.empty(0, device=device).device  # with its index
    shape = {"num_kv_heads": num_kv_heads, "page_size": page_size, "dtype": dtype, "device": device}
    for operation in backends.OPERATIONS:
        name = backends.choose(backend, operation, device, fmt)
        if name == "reference":
            continue
        module = importlib.import_module(f"kvturbo.ops.{operation}.{name}")
        if operation == "decode":
            module.warmup(fmt, num_q_heads=num_q_heads, max_q_len=max_q_len, **options, **shape)
        elif operation == "store":
            module.warmup(fmt, ring_size=options.get("ring_size", 0), **shape)
        else:
            module.warmup(fmt, **shape)
