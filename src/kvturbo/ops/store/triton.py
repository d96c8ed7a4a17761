# mypy: disable-error-code="no-untyped-def"
"""Store in Triton: rotation, scale search and packing of keys and values in one launch.

A program takes some tokens of one KV head and one side. Words whose bits belong to several slots are changed by their owners alone,
each with one atomic XOR of (word ^ new) & bits; whole words are written plainly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvturbo.config import SIDES, KVFormat
from kvturbo.layout import PageLayout
from kvturbo.ops import triton_common as common
from kvturbo.ops.store.triton_encode import encode, encode_int8, rotate_keys, rotate_values
from kvturbo.ops.triton_common import key_word, value_word, words_at


@triton.jit
def _put(pointer, new, bits, mask):
    """Changes `bits` of shared words to those of `new`; other bits may be changed by others at the same time."""
    old = tl.load(pointer, mask=mask, other=0)
    tl.atomic_xor(pointer, (old ^ new) & bits, mask=mask, sem="relaxed")


@triton.jit
def _unit_words(codes, shift, U: tl.constexpr, ROWS: tl.constexpr):
    """The sum over each unit's elements of codes [ROWS, 8 U] << shift [8 U]: [ROWS, U]."""
    return tl.sum(tl.reshape(codes << shift.to(tl.uint32)[None, :], (ROWS, U, 8)), 2)


@triton.jit
def _store_outliers(
    x, base, slot, m_row, outlier_channels, OUTLIERS: tl.constexpr, OUT_CODES: tl.constexpr, OUT_SCALE: tl.constexpr,
    P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, OUTLIERS)
    channel = tl.load(outlier_channels + i)
    values = tl.load(x[:, None] + channel[None, :], mask=m_row[:, None], other=0.0).to(tl.float32)
    code, step = encode_int8(values)
    words = tl.sum(tl.reshape(code << (i % 4 * 8).to(tl.uint32)[None, :], (ROWS, OUTLIERS // 4, 4)), 2)
    w = tl.arange(0, OUTLIERS // 4)
    address, _ = key_word(slot[:, None], (w % 4)[None, :], 8, 1, OUTLIERS, P)
    tl.store(words_at(base + OUT_CODES)[:, None] + address + (w // 4)[None, :], words, mask=m_row[:, None])
    tl.store((base + OUT_SCALE).to(tl.pointer_type(tl.float16)) + slot, step, mask=m_row)


@triton.jit
def _store_keys(
    x, base, slot, m_row, turn, outlier_channels, norm,
    D: tl.constexpr, P: tl.constexpr, SP: tl.constexpr, DV: tl.constexpr, KB: tl.constexpr, ROTATE: tl.constexpr,
    K_CODES: tl.constexpr, K_SIGNS: tl.constexpr, K_SCALE: tl.constexpr, OUTLIERS: tl.constexpr,
    OUT_CODES: tl.constexpr, OUT_SCALE: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Encodes keys of tokens [ROWS] and writes them into their slots."""
    U: tl.constexpr = 4 * SP
    HALF: tl.constexpr = D % 32 == 16
    place = tl.arange(0, 8 * U)
    e = place % 8
    step_place = place // 8 % SP
    m_place = (step_place < D // 32) | ((step_place == D // 32) & (e < 4) & HALF)
    y = rotate_keys(x, turn, outlier_channels, m_row, U, OUTLIERS, ROTATE, D, DV, ROWS, EXACT, DOT) * norm
    u = tl.arange(0, U)
    is_half = ((u % SP == D // 32) & HALF)[None, :]
    m_unit = m_row[:, None] & ((u % SP < D // 32) | ((u % SP == D // 32) & HALF))[None, :]
    odd = (slot // 2 % 2)[:, None]
    codes = words_at(base + K_CODES)[:, None]
    if KB == 8:
        code, scale = encode_int8(y)
        address, _ = key_word(slot[:, None], u[None, :], 8, SP, D, P)
        first = _unit_words(tl.where((e < 4)[None, :], code, 0), 8 * (e % 4), U, ROWS)
        second = _unit_words(tl.where((e >= 4)[None, :], code, 0), 8 * (e % 4), U, ROWS)
        tl.store(codes + address, first, mask=m_unit)
        tl.store(codes + address + 1, second, mask=m_unit & (is_half == 0))
    else:
        index, negative, scale = encode(y, m_place[None, :], KB, D)
        if KB == 4:
            word = _unit_words(index, 4 * e, U, ROWS)
            sign = _unit_words(negative, tl.where(e < 4, 8 * e + 7, 8 * e - 29), U, ROWS)
            address, _ = key_word(slot[:, None], u[None, :], 4, SP, D, P)
            if HALF:
                shift = (16 * odd).to(tl.uint32)
                half_word = (word << shift) | (sign >> (4 * odd).to(tl.uint32))
                half_bits = tl.full(word.shape, 0x7777, tl.uint32) << shift
                half_bits |= tl.full(word.shape, 0x80808080, tl.uint32) >> (4 * odd).to(tl.uint32)
                _put(codes + address, half_word, half_bits, m_unit & is_half)
            tl.store(codes + address, word | sign, mask=m_unit & (is_half == 0))
        else:
            two = index if KB == 3 else index + negative * 2
            bits = tl.where(is_half, tl.full((ROWS, U), 0x3333, tl.uint32), 0x33333333)
            address, shift = key_word(slot[:, None], u[None, :], 2, SP, D, P)
            shift = shift.to(tl.uint32)
            _put(codes + address, _unit_words(two, 4 * e, U, ROWS) << shift, bits << shift, m_unit)
            if KB == 3:
                bits = tl.where(is_half, tl.full((ROWS, U), 0x1111, tl.uint32), 0x11111111)
                address, shift = key_word(slot[:, None], u[None, :], 1, SP, D, P)
                shift = shift.to(tl.uint32)
                signs = words_at(base + K_SIGNS)[:, None]
                _put(signs + address, _unit_words(negative, 4 * e, U, ROWS) << shift, bits << shift, m_unit)
    tl.store((base + K_SCALE).to(tl.pointer_type(tl.float16)) + slot, scale, mask=m_row)
    if OUTLIERS > 0:
        _store_outliers(x, base, slot, m_row, outlier_channels, OUTLIERS, OUT_CODES, OUT_SCALE, P, ROWS)


@triton.jit
def _first_of_8(x, ROWS: tl.constexpr):
    """Every eighth of x [ROWS]: [ROWS / 8]."""
    first = (tl.arange(0, 8) == 0)[None, :]
    return tl.sum(tl.where(first, tl.reshape(x, (ROWS // 8, 8)), 0), 1)


@triton.jit
def _put_values(
    plane, offset, slot, codes, bits, m_single, m_group,
    WIDTH: tl.constexpr, UNIT_BITS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Writes one plane of values: groups that fill 8 slots as units, the other tokens code by code.

    Args:
        plane: where the plane lies in page 0; offset [ROWS]: how many bytes further each token's page is.
        codes, bits: [ROWS, DV] and [ROWS, 1], where they lie in a unit.
        m_single: [ROWS], tokens to write code by code; m_group: [ROWS / 8], groups to write whole.
        UNIT_BITS: all bits of a unit.
    """
    column = tl.arange(0, DV)[None, :]
    if tl.sum(m_single.to(tl.int32), 0) > 0:
        address, shift = value_word((slot // 8)[:, None], column, WIDTH, D, P)
        shift = shift.to(tl.uint32)
        pointer = words_at(plane + offset)[:, None] + address
        _put(pointer, codes << shift, bits << shift, m_single[:, None] & (column < D))
    if tl.sum(m_group.to(tl.int32), 0) > 0:
        units = tl.sum(tl.reshape(codes, (ROWS // 8, 8, DV)), 1)
        address, shift = value_word((_first_of_8(slot, ROWS) // 8)[:, None], column, WIDTH, D, P)
        shift = shift.to(tl.uint32)
        pointer = words_at(plane + _first_of_8(offset, ROWS))[:, None] + address
        mask = m_group[:, None] & (column < D)
        if WIDTH == 4:
            tl.store(pointer, units, mask=mask)
        else:
            _put(pointer, units << shift, tl.full(units.shape, UNIT_BITS, tl.uint32) << shift, mask)


@triton.jit
def _store_values(
    x, pages, offset, slot, m_row, turn, norm,
    D: tl.constexpr, P: tl.constexpr, DV: tl.constexpr, VB: tl.constexpr, ROTATE: tl.constexpr,
    V_CODES: tl.constexpr, V_SIGNS: tl.constexpr, V_SCALE: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Encodes values of tokens [ROWS] and writes them into their slots."""
    y = rotate_values(x, turn, m_row, ROTATE, D, DV, ROWS, EXACT, DOT) * norm
    index, negative, scale = encode(y, (tl.arange(0, DV) < D)[None, :], VB, D)
    tl.store((pages + offset + V_SCALE).to(tl.pointer_type(tl.float16)) + slot, scale, mask=m_row)

    r = tl.arange(0, ROWS)
    place = offset * P + slot  # neighbouring slots of a page are neighbours here
    start = tl.reshape(tl.broadcast_to(_first_of_8(place, ROWS)[:, None], (ROWS // 8, 8)), (ROWS,))
    in_order = m_row & (place == start + r % 8) & (slot % 8 == r % 8)
    m_group = tl.sum(tl.reshape(in_order.to(tl.int32), (ROWS // 8, 8)), 1) == 8
    whole = tl.reshape(tl.broadcast_to(m_group.to(tl.int32)[:, None], (ROWS // 8, 8)), (ROWS,))
    m_single = m_row & (whole == 0)
    element = (slot % 8)[:, None]
    nibble = (4 * element).to(tl.uint32)
    if VB == 4:
        sign = tl.where(element < 4, 8 * element + 7, 8 * element - 29).to(tl.uint32)
        bits = (tl.full((ROWS, 1), 7, tl.uint32) << nibble) | (tl.full((ROWS, 1), 1, tl.uint32) << sign)
        codes = (index << nibble) | (negative << sign)
        _put_values(pages + V_CODES, offset, slot, codes, bits, m_single, m_group, 4, 0xFFFFFFFF, D, P, DV, ROWS)
    else:
        two = index if VB == 3 else index + negative * 2
        bits = tl.full((ROWS, 1), 3, tl.uint32) << nibble
        _put_values(
            pages + V_CODES, offset, slot, two << nibble, bits, m_single, m_group, 2, 0x33333333, D, P, DV, ROWS
        )
        if VB == 3:
            bits = tl.full((ROWS, 1), 1, tl.uint32) << nibble
            _put_values(
                pages + V_SIGNS,
                offset,
                slot,
                negative << nibble,
                bits,
                m_single,
                m_group,
                1,
                0x11111111,
                D,
                P,
                DV,
                ROWS,
            )


@triton.jit
def _put_recent(x, rows, slots, row, m_row, side, RING: tl.constexpr, D: tl.constexpr, DV: tl.constexpr):
    """Copies the vectors at pointers x [rows] as they are to where the tokens `row` have a place in a ring, on one side of it."""
    slot = tl.load(slots + row, mask=m_row, other=-1)
    vector = ((slot // RING * tl.num_programs(1) + tl.program_id(1)) * 2 + side) * RING + slot % RING
    c = tl.arange(0, DV)[None, :]
    mask = (slot >= 0)[:, None] & (c < D)
    tl.store(rows + (vector * D)[:, None] + c, tl.load(x[:, None] + c, mask=mask), mask=mask)


@triton.jit(
    do_not_specialize=["num_tokens", "k_stride_t", "k_stride_h", "v_stride_t", "v_stride_h", "stride_page"],
    do_not_specialize_on_alignment=["k", "v", "slot_mapping", "outlier_channels", "recent_slots"],
)
def _store(
    k, v, pages, slot_mapping, outlier_channels, recent_rows, recent_slots, k_turn, v_turn,
    num_tokens, k_stride_t, k_stride_h, v_stride_t, v_stride_h, stride_page, norm,
    D: tl.constexpr, P: tl.constexpr, SP: tl.constexpr, PACK: tl.constexpr, DV: tl.constexpr, KB: tl.constexpr,
    VB: tl.constexpr, K_CODES: tl.constexpr, K_SIGNS: tl.constexpr, V_CODES: tl.constexpr, V_SIGNS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, OUTLIERS: tl.constexpr, OUT_CODES: tl.constexpr,
    OUT_SCALE: tl.constexpr, PAGE_BYTES: tl.constexpr, ROTATE: tl.constexpr, RING: tl.constexpr, ROWS: tl.constexpr,
    EXACT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one KV head, keys or values."""
    head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    position = tl.load(slot_mapping + row, mask=row < num_tokens, other=-1)
    m_row = position >= 0
    position = tl.maximum(position, 0)
    slot = (position % P).to(tl.int32)
    offset = position // P * stride_page * 16 + head.to(tl.int64) * PAGE_BYTES
    token = row.to(tl.int64)
    if tl.program_id(2) == 0:
        x = k + token * k_stride_t + head.to(tl.int64) * k_stride_h
        if RING > 0:
            _put_recent(x, recent_rows, recent_slots, row, m_row, 0, RING, D, DV)
        _store_keys(
            x, pages + offset, slot, m_row, k_turn,
            outlier_channels + head * OUTLIERS if OUTLIERS > 0 else k_turn, norm,
            D, P, SP, DV, KB, ROTATE, K_CODES, K_SIGNS, K_SCALE, OUTLIERS, OUT_CODES, OUT_SCALE, ROWS, EXACT, DOT,
        )  # fmt: skip
    else:
        x = v + token * v_stride_t + head.to(tl.int64) * v_stride_h
        if RING > 0:
            _put_recent(x, recent_rows, recent_slots, row, m_row, 1, RING, D, DV)
        _store_values(
            x, pages, offset, slot, m_row, v_turn, norm,
            D, P, DV, VB, ROTATE, V_CODES, V_SIGNS, V_SCALE, ROWS, EXACT, DOT,
        )  # fmt: skip


def warmup(
    fmt: KVFormat,
    *,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    ring_size: int = 0,
) -> None:
    """Compiles and loads what `store` launches for such pages and keys and values of `dtype`; with ring_size for rings too."""
    pages, channels = common.scratch_pages(fmt, page_size, num_kv_heads, device)
    k, v = torch.zeros(2, 1, num_kv_heads, fmt.head_dim, dtype=dtype, device=device)
    none = torch.full((1,), -1, device=device)
    store(k, v, pages, none, fmt=fmt, outlier_channels=channels)
    if ring_size:
        rows = torch.zeros(1, num_kv_heads, 2, ring_size, fmt.head_dim, dtype=dtype, device=device)
        store(k, v, pages, none, fmt=fmt, outlier_channels=channels, recent_rows=rows, recent_slots=none)


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
    """See `kvturbo.ops.store`. Computes in fp32.

    Raises:
        TypeError: recent_rows are fp64.
        ValueError: pages or recent_rows are not aligned to 16 bytes.
    """
    common.check_pages(pages)
    if recent_rows is not None:
        if recent_rows.dtype == torch.float64:
            raise TypeError(f"recent_rows must be bf16, fp16 or fp32 for the triton backend, got {recent_rows.dtype}")
        common.check_rings("recent_rows", recent_rows)
    tokens, heads = k.shape[:2]
    if not tokens:
        return
    k, v = common.rows_contiguous(k), common.rows_contiguous(v)
    slot_mapping, outlier_channels, recent_slots = common.contiguous(slot_mapping, outlier_channels, recent_slots)
    if triton.next_power_of_2(fmt.head_dim) == fmt.head_dim:
        rows, turns = 8, [common.device_signs(fmt.head_dim, fmt.seed, k.device)] * 2
    else:
        rows = 16  # the least that a matrix product takes everywhere
        turns = [common.rotation_matrix(fmt.head_dim, fmt.seed, side, fmt.k.rotate, k.device) for side in SIDES]
    norm = common.norm(fmt.head_dim, fmt.k.rotate)
    _store[(-(-tokens // rows), heads, 2)](
        k, v, pages, slot_mapping, outlier_channels, recent_rows, recent_slots, *turns,
        tokens, k.stride(0), k.stride(1), v.stride(0), v.stride(1), pages.stride(0) // 16,
        norm, ROTATE=fmt.k.rotate, RING=0 if recent_rows is None else recent_rows.shape[3],
        **common.page_constants(fmt, PageLayout.page_size_of(fmt, pages.shape[2])), PAGE_BYTES=pages.shape[2],
        ROWS=rows, EXACT=k.dtype == v.dtype == torch.bfloat16, DOT=common.DOT, num_warps=4, num_stages=1,
    )  # fmt: skip
