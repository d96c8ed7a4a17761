"""Store on the GPU: builds and launches store.cu."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import Kernel, Parameters, arch_of, compiled, current_stream
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
        recent: tokens of the rings that raw ones go to as well; 0: none.
    """

    fmt: KVFormat
    page_size: int
    in_type: int
    recent: int = 0

    def macros(self) -> dict[str, int | str]:
        """The macros store.cu is compiled with."""
        return page_macros(self.fmt, self.page_size) | {"IN_TYPE": self.in_type, "RECENT": self.recent}

    def source(self) -> str:
        """The text that is compiled."""
        return source(self.fmt.head_dim, Path(__file__).parent / "store.cu")


class _Params(Parameters):
    """`Params` of store.cu."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("k", "v", "pages", "slots", "outlier_channels", "recent", "recent_slots")
        ),
        *((name, ctypes.c_int64) for name in ("k_token", "k_head", "v_token", "v_head", "block_stride")),
        *((name, ctypes.c_int) for name in ("tokens", "kv_heads", "span")),
        ("signs", ctypes.c_uint32 * 8),
    )


_ADDRESSES = struct.Struct("7P")
"""The first fields of `_Params`; the others are the same in all calls of a kind."""


@lru_cache(maxsize=64)
def _kernel(fmt: KVFormat, page_bytes: int, dtype: torch.dtype, recent: int, device: torch.device) -> Kernel:
    variant = Variant(fmt, PageLayout.page_size_of(fmt, page_bytes), TYPES[dtype], recent)
    return Kernel(compiled(variant.source(), arch_of(device), variant.macros()), "store", device)


def warmup(
    fmt: KVFormat,
    *,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    ring_size: int = 0,
) -> None:
    """Compiles and loads the kernel that stores keys and values of a dtype, whatever the number of heads; with rings or without.

    Raises:
        KeyError: dtype is not bf16, fp16 or fp32.
    """
    _kernel(fmt, fmt.page_bytes(page_size), dtype, ring_size, device)


class _Call:
    """What calls of one kind share: their kernel, its grid, and all of its parameters but the addresses.

    Args:
        k, v: of one dtype of `TYPES`, rows contiguous.
        pages, slots: contiguous slots, at least one.
        fmt: the format.
        recent_rows: of k's and v's dtype, or None.
    """

    def __init__(
        self, k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, fmt: KVFormat, recent_rows: Tensor | None
    ) -> None:
        tokens, heads = len(slots), pages.shape[1]
        span = 1 if 2 * tokens * heads <= _MOST_SINGLE else _OCTET
        tasks = -(-tokens // span) * 2 * heads
        recent = 0 if recent_rows is None else recent_rows.shape[3]
        self._kernel, self._grid = _kernel(fmt, pages.shape[2], k.dtype, recent, pages.device), -(-tasks // _WARPS)
        self._fmt, self._device, self._unit = fmt, pages.device.index, 4 * k.element_size()
        self._spare: list[_Params] = []
        self._sizes = (
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages.stride(0), tokens, heads, span,
            sign_words(fmt.head_dim, fmt.seed),
        )  # fmt: skip

    def __call__(
        self,
        k: Tensor,
        v: Tensor,
        pages: Tensor,
        slots: Tensor,
        outlier_channels: Tensor | None,
        recent_rows: Tensor | None,
        recent_slots: Tensor | None,
    ) -> None:
        """Launches the kernel for tensors like those that it was made for."""
        at_k, at_v, at_recent = k.data_ptr(), v.data_ptr(), pointer(recent_rows)
        if at_recent % self._unit:
            raise ValueError(f"recent_rows must begin at a multiple of {self._unit} bytes, got address {at_recent:#x}")
        if at_k % self._unit or at_v % self._unit:
            return store(k, v, pages, slots, outlier_channels, recent_rows, recent_slots, fmt=self._fmt)
        try:
            parameters = self._spare.pop()  # one that no other thread is filling
        except IndexError:
            parameters = _Params(*[None] * 7, *self._sizes)
        _ADDRESSES.pack_into(
            parameters, 0, at_k, at_v, pages.data_ptr(), slots.data_ptr(), pointer(outlier_channels), at_recent,
            pointer(recent_slots),
        )  # fmt: skip
        self._kernel.launch(self._grid, _WARPS * 32, parameters, current_stream(self._device))
        self._spare.append(parameters)


def prepare(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    outlier_channels: Tensor | None,
    recent_rows: Tensor | None,
    recent_slots: Tensor | None,
    *,
    fmt: KVFormat,
) -> Callable[..., None]:
    """What runs calls with tensors like these, as in `kvturbo.ops.store`: takes the same ones. Loads the kernel."""
    plain = k.dtype == v.dtype and k.dtype in TYPES and all(_strided_for_us(x) for x in (k, v))
    contiguous = all(x is None or x.is_contiguous() for x in (slot_mapping, outlier_channels, recent_slots))
    if plain and contiguous and len(slot_mapping):
        return _Call(k, v, pages, slot_mapping, fmt, recent_rows)
    return partial(store, fmt=fmt)


def store(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slot_mapping: Tensor,
    outlier_channels: Tensor | None = None,
    recent_rows: Tensor | None = None,
    recent_slots: Tensor | None = None,
    *,
    fmt: KVFormat,
) -> None:
    """See `kvturbo.ops.store`. fp64, and keys and values of different dtypes, go through fp32 copies.

    Raises:
        TypeError: recent_rows are fp64.
        ValueError: recent_rows are not aligned to 4 elements.
    """
    if recent_rows is not None and recent_rows.dtype not in TYPES:
        raise TypeError(
            f"recent_rows must be one of {', '.join(map(str, TYPES))} for the cuda backend, got {recent_rows.dtype}"
        )
    if not len(slot_mapping):
        return
    if k.dtype != v.dtype or k.dtype == torch.float64:
        k, v = k.float(), v.float()
    k, v, slots = _aligned(k), _aligned(v), slot_mapping.contiguous()
    channels, places = (None if x is None else x.contiguous() for x in (outlier_channels, recent_slots))
    _Call(k, v, pages, slots, fmt, recent_rows)(k, v, pages, slots, channels, recent_rows, places)


def _aligned(x: Tensor) -> Tensor:
    """x itself unless its rows can't be read four elements at a time."""
    fits = _strided_for_us(x) and not x.data_ptr() % (4 * x.element_size())
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _strided_for_us(x: Tensor) -> bool:
    return x.stride(2) == 1 and all(
        n == 1 or not stride % 4 for n, stride in zip(x.shape[:2], x.stride(), strict=False)
    )
