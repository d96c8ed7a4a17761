"""Store on the GPU: builds and launches store.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import Kernel, Parameters, arch_of, compiled
from kvturbo.cuda.source import TYPES, page_macros, pointer, sign_words, source
from kvturbo.layout import PageLayout

_WARPS = 4
_OCTET = 8
_MOST_SINGLE = (
    4096  # vectors up to which a warp per vector is faster than a warp per octet: about what the GPU holds at once
)


@dataclass(frozen=True)
class Variant:
    """What a store kernel is compiled for.

    Attributes:
        fmt, page_size: the pages.
        in_type: of keys and values, 0 bf16, 1 fp16, 2 fp32.
    """

    fmt: KVFormat
    page_size: int
    in_type: int

    def macros(self) -> dict[str, int | str]:
        """The macros store.cu is compiled with."""
        return page_macros(self.fmt, self.page_size) | {"IN_TYPE": self.in_type}

    def source(self) -> str:
        """The text that is compiled."""
        return source(Path(__file__).parent / "store.cu", self.fmt.head_dim)


class _Params(Parameters):
    """`Params` of store.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("k", "v", "pages", "slots", "outlier_channels")),
        *((name, ctypes.c_int64) for name in ("k_token", "k_head", "v_token", "v_head", "block_stride")),
        *((name, ctypes.c_int) for name in ("tokens", "kv_heads", "span")),
        ("signs", ctypes.c_uint32 * 8),
    )


@lru_cache(maxsize=64)
def _kernel(fmt: KVFormat, page_bytes: int, dtype: torch.dtype, device: torch.device) -> Kernel:
    variant = Variant(fmt, PageLayout.page_size_of(fmt, page_bytes), TYPES[dtype])
    return Kernel(compiled(variant.source(), arch_of(device), variant.macros()), "store", device)


def warmup(fmt: KVFormat, *, num_kv_heads: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles and loads the kernel that stores keys and values of a dtype, whatever the number of heads.

    Raises:
        KeyError: dtype is not bf16, fp16 or fp32.
    """
    _kernel(fmt, fmt.page_bytes(page_size), dtype, device)


def store(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    *,
    fmt: KVFormat,
    outlier_channels: Tensor | None = None,
) -> None:
    """See `kvturbo.ops.store`. fp64, and keys and values of different dtypes, go through fp32 copies."""
    tokens, heads = len(slot_mapping), pages.shape[1]
    if not tokens:
        return
    if k.dtype != v.dtype or k.dtype == torch.float64:
        k, v = k.float(), v.float()
    k, v = _aligned(k), _aligned(v)
    slot_mapping = slot_mapping.contiguous()
    outlier_channels = None if outlier_channels is None else outlier_channels.contiguous()
    span = 1 if 2 * tokens * heads <= _MOST_SINGLE else _OCTET
    parameters = _Params(
        k.data_ptr(), v.data_ptr(), pages.data_ptr(), slot_mapping.data_ptr(), pointer(outlier_channels),
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages.stride(0), tokens, heads, span,
        sign_words(fmt.head_dim, fmt.seed),
    )  # fmt: skip
    tasks = -(-tokens // span) * 2 * heads
    stream = torch.cuda.current_stream(pages.device).cuda_stream
    kernel = _kernel(fmt, pages.shape[2], k.dtype, pages.device)
    kernel.launch(-(-tasks // _WARPS), _WARPS * 32, parameters, stream)


def _aligned(x: Tensor) -> Tensor:
    """x itself unless its rows can't be read four elements at a time."""
    fits = x.stride(2) == 1 and not (x.stride(0) % 4 or x.stride(1) % 4 or x.data_ptr() % (4 * x.element_size()))
    return x if fits else x.clone(memory_format=torch.contiguous_format)
