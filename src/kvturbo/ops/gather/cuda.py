"""Gather on the GPU: builds and launches gather.cu."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import Kernel, Parameters, arch_of, compiled, current_stream
from kvturbo.cuda.source import TYPES, page_macros, pointer, sign_words, source
from kvturbo.layout import PageLayout

_WARPS = 4
_OCTET = 8


@dataclass(frozen=True)
class Variant:
    """What a gather kernel is compiled for.

    Attributes:
        fmt, page_size: the pages.
        out_type: of the copies, 0 bf16, 1 fp16, 2 fp32.
        rotated: leave the rotation in.
    """

    fmt: KVFormat
    page_size: int
    out_type: int
    rotated: bool = False

    def macros(self) -> dict[str, int | str]:
        """The macros gather.cu is compiled with."""
        unrotate = self.fmt.k.rotate and not self.rotated
        return page_macros(self.fmt, self.page_size) | {"OUT_TYPE": self.out_type, "UNROTATE": int(unrotate)}

    def source(self) -> str:
        """The text that is compiled."""
        return source(self.fmt.head_dim, Path(__file__).parent / "gather.cu")


class _Params(Parameters):
    """`Params` of gather.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("pages", "block_table", "outlier_channels", "k", "v")),
        ("k_strides", ctypes.c_int64 * 3),
        ("v_strides", ctypes.c_int64 * 3),
        ("block_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("table_stride", "batch", "kv_heads", "start", "stop", "octets")),
        ("signs", ctypes.c_uint32 * 8),
    )


@lru_cache(maxsize=64)
def _kernel(fmt: KVFormat, page_bytes: int, dtype: torch.dtype, rotated: bool, device: torch.device) -> Kernel:
    variant = Variant(fmt, PageLayout.page_size_of(fmt, page_bytes), TYPES[dtype], rotated)
    return Kernel(compiled(variant.source(), arch_of(device), variant.macros()), "gather", device)


def warmup(fmt: KVFormat, *, num_kv_heads: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compiles and loads the kernels that make copies of a dtype, rotated ones and others, whatever the number of heads.

    Raises:
        KeyError: dtype is not bf16, fp16 or fp32.
    """
    for rotated in (False,) if fmt.outliers else (False, True):
        _kernel(fmt, fmt.page_bytes(page_size), dtype, rotated, device)


def gather(
    pages: Tensor,
    block_table: Tensor,
    start: int,
    stop: int,
    out: tuple[Tensor, Tensor],
    *,
    fmt: KVFormat,
    rotated: bool = False,
    outlier_channels: Tensor | None = None,
) -> None:
    """See `kvturbo.ops.gather`; writes into out. fp64 and outs of different dtypes go through fp32 copies."""
    if not out[0].numel():
        return
    dtype = out[0].dtype if out[0].dtype == out[1].dtype and out[0].dtype in TYPES else torch.float32
    targets = [x if _writable(x, dtype) else torch.empty(x.shape, dtype=dtype, device=x.device) for x in out]
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    outlier_channels = None if outlier_channels is None else outlier_channels.contiguous()
    batch, _, heads, _ = out[0].shape
    octets = (stop - 1) // _OCTET - start // _OCTET + 1
    strides = [(ctypes.c_int64 * 3)(*x.stride()[:3]) for x in targets]
    parameters = _Params(
        pages.data_ptr(), block_table.data_ptr(), pointer(outlier_channels), targets[0].data_ptr(), targets[1].data_ptr(),
        *strides, pages.stride(0), block_table.stride(0), batch, heads, start, stop, octets,
        sign_words(fmt.head_dim, fmt.seed),
    )  # fmt: skip
    kernel = _kernel(fmt, pages.shape[2], dtype, rotated, pages.device)
    kernel.launch(-(-batch * heads * 2 * octets // _WARPS), _WARPS * 32, parameters, current_stream(pages.device.index))
    for x, target in zip(out, targets, strict=True):
        if x is not target:
            x.copy_(target)


def _writable(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel can write x itself: of that dtype, rows of four elements at a time."""
    rows = x.stride(3) == 1 and not any(stride % 4 for stride in x.stride()[:3])
    return x.dtype == dtype and rows and x.data_ptr() % (4 * x.element_size()) == 0
