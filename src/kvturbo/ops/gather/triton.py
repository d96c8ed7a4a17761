# mypy: disable-error-code="no-untyped-def"
"""Gather in Triton: dequantise a range of positions; the rotation is undone by the product that puts channels in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvturbo.config import SIDES, KVFormat
from kvturbo.layout import PageLayout
from kvturbo.ops import triton_common as common
from kvturbo.ops.triton_common import key_block, level, load_key_units, load_scales, load_value_units

TOKENS = 128


@triton.jit
def _gather_keys(
    base, slot, m_out, target, matrix, outlier_channels, factor,
    D: tl.constexpr, P: tl.constexpr, SP: tl.constexpr, PACK: tl.constexpr, KB: tl.constexpr, K_CODES: tl.constexpr,
    K_SIGNS: tl.constexpr, K_SCALE: tl.constexpr, OUTLIERS: tl.constexpr, OUT_CODES: tl.constexpr,
    OUT_SCALE: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    U: tl.constexpr = 4 * SP
    u = tl.arange(0, U)
    mask = (u % SP * 32 < D)[None, :] & (slot >= 0)[:, None]
    word, second = load_key_units(
        (base + K_CODES)[:, None], (base + K_SIGNS)[:, None], slot[:, None], u[None, :], mask, KB, SP, D, P
    )
    scale = load_scales(base + K_SCALE, slot, m_out) * factor
    if OUTLIERS > 0:
        out_word, out_second = load_key_units(
            (base + OUT_CODES)[:, None], base[:, None], slot[:, None], tl.arange(0, 4)[None, :], None, 8, 1, OUTLIERS, P
        )
        out_scale = load_scales(base + OUT_SCALE, slot, m_out)
    n = tl.arange(0, U * PACK)
    for start in range(0, D, CHUNK):
        c = start + tl.arange(0, CHUNK)
        x = tl.zeros((TOKENS, CHUNK), tl.float32)
        for i in tl.static_range(8 // PACK):
            b_matrix = tl.load(
                matrix + (i * U * PACK + n)[:, None] * D + c[None, :],
                mask=(n >= 0)[:, None] & (c < D)[None, :],
                other=0.0,
            )
            x = tl.dot(key_block(word, second, i * PACK, PACK, KB, DOT), b_matrix.to(DOT), x)
        x = x * scale[:, None]
        if OUTLIERS > 0:
            y = tl.zeros((TOKENS, CHUNK), tl.float32)
            taken = tl.zeros((CHUNK,), tl.float32)
            for i in tl.static_range(OUTLIERS // 16):
                channel = tl.load(outlier_channels + i * 16 + tl.arange(0, 16))
                here = (channel[:, None] == c[None, :]).to(tl.float32)
                y = tl.dot(key_block(out_word, out_second, i * 4, 4, 8, DOT), here.to(DOT), y)
                taken += tl.sum(here, 0)
            x = tl.where((taken > 0)[None, :], y * out_scale[:, None], x)
        tl.store(target[:, None] + c[None, :], x.to(target.dtype.element_ty), mask=m_out[:, None] & (c < D)[None, :])


@triton.jit
def _gather_values(
    base, position, target, stride, start_position, stop, matrix, factor,
    D: tl.constexpr, P: tl.constexpr, DV: tl.constexpr, VB: tl.constexpr, V_CODES: tl.constexpr, V_SIGNS: tl.constexpr,
    V_SCALE: tl.constexpr, OCTETS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Values of octets that begin at `position` [OCTETS]; `target` points to position 0."""
    octet = position % P // 8
    column = tl.arange(0, DV)
    mask = (column < D)[None, :] & (octet >= 0)[:, None]
    word = load_value_units(
        (base + V_CODES)[:, None], (base + V_SIGNS)[:, None], octet[:, None], column[None, :], mask, VB, D, P
    )
    for start in range(0, D, CHUNK):
        c = start + tl.arange(0, CHUNK)
        b_matrix = tl.load(
            matrix + column[:, None] * D + c[None, :], mask=(column < D)[:, None] & (c < D)[None, :], other=0.0
        ).to(DOT)
        for e in tl.static_range(8):
            m_out = (position + e >= start_position) & (position + e < stop)
            scale = load_scales(base + V_SCALE, octet * 8 + e, m_out) * factor
            x = tl.dot(level(word, word, e, VB).to(DOT), b_matrix, tl.zeros((OCTETS, CHUNK), tl.float32))
            pointer = target + (position + e).to(tl.int64)[:, None] * stride * 8 + c[None, :]
            x = (x * scale[:, None]).to(target.dtype.element_ty)
            tl.store(pointer, x, mask=m_out[:, None] & (c < D)[None, :])


@triton.jit(
    do_not_specialize=[
        "start", "stop", "stride_page", "stride_table", "k_factor", "v_factor",
        "k_stride_b", "k_stride_t", "k_stride_h", "v_stride_b", "v_stride_t", "v_stride_h",
    ],
    do_not_specialize_on_alignment=["block_table", "outlier_channels"],
)  # fmt: skip
def _gather(
    pages, block_table, k_out, v_out, outlier_channels, k_matrix, v_matrix, start, stop, stride_page, stride_table,
    k_factor, v_factor, k_stride_b, k_stride_t, k_stride_h, v_stride_b, v_stride_t, v_stride_h,
    D: tl.constexpr, P: tl.constexpr, SP: tl.constexpr, PACK: tl.constexpr, DV: tl.constexpr, KB: tl.constexpr,
    VB: tl.constexpr, K_CODES: tl.constexpr, K_SIGNS: tl.constexpr, V_CODES: tl.constexpr, V_SIGNS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, OUTLIERS: tl.constexpr, OUT_CODES: tl.constexpr,
    OUT_SCALE: tl.constexpr, PAGE_BYTES: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """TOKENS positions of one sequence and KV head, keys or values."""
    head = tl.program_id(1)
    b = (tl.program_id(2) // 2).to(tl.int64)
    first = start // 8 * 8 + tl.program_id(0) * TOKENS
    table = block_table + b * stride_table
    heads = pages + head.to(tl.int64) * PAGE_BYTES
    if tl.program_id(2) % 2 == 0:
        k_position = first + tl.arange(0, TOKENS)
        m_out = (k_position >= start) & (k_position < stop)
        k_page = tl.load(table + k_position // P, mask=m_out, other=0).to(tl.int64)
        target = k_out + (b * k_stride_b + head.to(tl.int64) * k_stride_h) * 8
        _gather_keys(
            heads + k_page * stride_page * 16, k_position % P, m_out,
            target + (k_position - start).to(tl.int64) * k_stride_t * 8, k_matrix,
            outlier_channels + head * OUTLIERS if OUTLIERS > 0 else k_matrix, k_factor,
            D, P, SP, PACK, KB, K_CODES, K_SIGNS, K_SCALE, OUTLIERS, OUT_CODES, OUT_SCALE, TOKENS, CHUNK, DOT,
        )  # fmt: skip
    else:
        v_position = first + tl.arange(0, TOKENS // 8) * 8
        m_octet = (v_position + 8 > start) & (v_position < stop)
        v_page = tl.load(table + v_position // P, mask=m_octet, other=0).to(tl.int64)
        target = v_out + (b * v_stride_b + head.to(tl.int64) * v_stride_h) * 8
        _gather_values(
            heads + v_page * stride_page * 16, v_position, target - start.to(tl.int64) * v_stride_t * 8, v_stride_t, start, stop,
            v_matrix, v_factor, D, P, DV, VB, V_CODES, V_SIGNS, V_SCALE, TOKENS // 8, CHUNK, DOT,
        )  # fmt: skip


def _in_eights(x: Tensor) -> bool:
    """Whether every vector of x is contiguous and starts at a multiple of 16 bytes and of 8 elements."""
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])


def warmup(fmt: KVFormat, *, num_kv_heads: int, page_size: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Compiles and loads what `gather` launches for such pages and copies of `dtype`."""
    pages, channels = common.scratch_pages(fmt, page_size, num_kv_heads, device)
    k, v = torch.empty(2, 1, 1, num_kv_heads, fmt.head_dim, dtype=dtype, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    for rotated in (False,) if fmt.outliers else (False, True):
        gather(pages, table, 0, 1, (k, v), fmt=fmt, rotated=rotated, outlier_channels=channels)


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
    """See `kvturbo.ops.gather`; writes into out. Computes in fp32.

    Raises:
        ValueError: pages are not aligned to 16 bytes.
    """
    common.check_pages(pages)
    if stop == start or not block_table.shape[0]:
        return
    constants = common.page_constants(fmt, PageLayout.page_size_of(fmt, pages.shape[2]))
    outlier_channels, block_table = *common.contiguous(outlier_channels), common.rows_contiguous(block_table)
    targets = [x if _in_eights(x) else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in out]
    strides = [stride // 8 for x in targets for stride in x.stride()[:3]]
    matrices, factors = [], []
    for side, bits in zip(SIDES, (constants["KB"], constants["VB"]), strict=True):
        turn = fmt.side(side).rotate and not rotated
        matrices.append(common.rotation_matrix(fmt.head_dim, fmt.seed, side, turn, pages.device))
        factors.append(common.UNITS[bits] * common.norm(fmt.head_dim, turn))
    blocks = -(-(stop - start // 8 * 8) // TOKENS)
    _gather[(blocks, pages.shape[1], 2 * block_table.shape[0])](
        pages, block_table, *targets, outlier_channels, *matrices, start, stop, pages.stride(0) // 16, block_table.stride(0),
        *factors, *strides, **constants, PAGE_BYTES=pages.shape[2],
        TOKENS=TOKENS, CHUNK=64, DOT=common.DOT, num_warps=8, num_stages=1,
    )  # fmt: skip
    for x, target in zip(out, targets, strict=True):
        if target is not x:
            x.copy_(target)
