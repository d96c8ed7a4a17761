"""Which implementation of an operation runs. An explicit choice never falls back to another."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from kvturbo.config import KVFormat

BACKENDS = ("reference", "triton", "cuda")
"""From the slowest to the fastest."""
OPERATIONS = ("store", "decode", "gather")


def unavailable(backend: str, operation: str, device: torch.device, fmt: KVFormat) -> str | None:
    """Why `backend` can't run `operation` for `fmt` on `device`, or None if it can.

    Raises:
        ValueError: there is no such backend or operation.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")
    if operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    if backend == "reference":
        return None
    if len(fmt.k.parts) > 1 or fmt.k.qjl:
        return f"format {fmt.name!r} is not among its formats; use backend 'reference'"
    return _triton_unavailable(device) if backend == "triton" else _cuda_unavailable(device)


def _triton_unavailable(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = importlib.import_module("triton").knobs.runtime.interpret
    if device.type != "cuda" and not interpreted:
        return f"it needs a CUDA device or TRITON_INTERPRET=1 before triton is imported, got device {str(device)!r}"
    return None


def _cuda_unavailable(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return f"it needs an NVIDIA GPU, got device {str(device)!r}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    for module, package in (("cuda.core", "cuda-core"), ("cuda.bindings", "cuda-bindings")):
        if not _importable(module):
            return f'{package} is not installed: pip install "kvturbo[cuda]"'
    return None


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


@lru_cache(maxsize=256)
def choose(requested: str, operation: str, device: torch.device, fmt: KVFormat) -> str:
    """The backend that runs an operation: the requested one, or for "auto" the fastest that can.

    Raises:
        ValueError: the requested backend does not exist or can't run the operation; the message says why.
    """
    if requested != "auto":
        reason = unavailable(requested, operation, device, fmt)
        if reason:
            raise ValueError(f"backend {requested!r} can't run {operation}: {reason}")
        return requested
    names = reversed(BACKENDS) if device.type == "cuda" else ("reference",)  # Triton's interpreter only on request
    return next(name for name in names if not unavailable(name, operation, device, fmt))


@lru_cache(maxsize=16)
def load(operation: str, backend: str, name: str | None = None) -> Callable[..., Any]:
    """The function that implements an operation in a backend, or another one of that name beside it."""
    return getattr(importlib.import_module(f"kvturbo.ops.{operation}.{backend}"), name or operation)
