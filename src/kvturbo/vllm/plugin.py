"""What vLLM calls in every one of its processes: registers the cache dtypes and the attention backend."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch

from kvturbo.vllm.formats import cache_dtypes

OLDEST = (0, 33)
"""The first release in which a package can own a cache dtype and a packed page without changing vLLM."""

_LOG = logging.getLogger("vllm.kvturbo")  # below vLLM's logger, whose format and level it shares


def unsupported_version(version: str) -> str | None:
    """Why the plugin can't work with a version of vLLM, or None if it can."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and tuple(map(int, numbers.groups())) >= OLDEST:
        return None
    oldest = ".".join(map(str, OLDEST))
    return (
        f"kvturbo needs vLLM {oldest} or newer, found {version}: --kv-cache-dtype {', '.join(cache_dtypes())} are not available; "
        f"upgrade with pip install -U 'vllm>={oldest}'"
    )


def register() -> None:
    """Adds the plugin's cache dtypes and its attention backend to vLLM; calling it again changes nothing.

    With an older vLLM it adds nothing and logs an error that names the version, so that vLLM's own dtypes go on working.
    """
    from vllm import __version__

    reason = unsupported_version(__version__)
    if reason:
        _LOG.error(reason)
        return
    _register_dtypes()
    _register_backend()


def _register_dtypes() -> None:
    from vllm.config.cache import get_kv_cache_dtype_handler, register_kv_cache_dtype

    for cache_dtype in cache_dtypes():
        if get_kv_cache_dtype_handler(cache_dtype) is None:
            register_kv_cache_dtype(cache_dtype)(_handler(cache_dtype))


def _handler(cache_dtype: str) -> type:
    from vllm.v1.kv_cache_interface import KVQuantMode

    class PackedCacheDType:
        """vLLM's KVCacheDTypeHandler: pages are bytes, and the backend alone knows what they mean."""

        name = cache_dtype

        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            return KVQuantMode.CUSTOM

    return PackedCacheDType


def _register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.TURBOQUANT, "kvturbo.vllm.routing.TurboQuantRouter")
