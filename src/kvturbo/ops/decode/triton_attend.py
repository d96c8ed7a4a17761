"""The first two kernels of decode in Triton: rotate the queries, and attend split by split.

A split decodes each key and value once for all query heads of its KV head. Queries and probabilities go into the products as two
bfloat16 parts, high in the upper half of a tile's rows, low in the lower half; the levels themselves are exact in bfloat16.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kvturbo.ops.triton_common import (
    exact_dot,
    key_block,
    level,
    load_key_units,
    load_scales,
    load_value_units,
)


@triton.jit
def _store_parts(target, place, low, y, mask, DOT: tl.constexpr):
    """Stores y [rows, places] as its bfloat16 value and, `low` elements further, what that leaves."""
    high = y.to(tl.bfloat16)
    rest = (y - high.to(tl.float32)).to(tl.bfloat16)
    tl.store(target[:, None] + place[None, :], high.to(DOT), mask=mask)
    tl.store(target[:, None] + low + place[None, :], rest.to(DOT), mask=mask)


@triton.jit(
    do_not_specialize=["num_rows", "stride_t", "stride_h", "factor", "outlier_factor"],
    do_not_specialize_on_alignment=["q", "outlier_channels"],
)
def rotate_queries(
    q, out, matrix, outlier_channels, num_rows, stride_t, stride_h, factor, outlier_factor,
    HQ: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PLACES: tl.constexpr, OUTLIERS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rotated queries in the order of `key_places`, then the outlier channels', as high and low parts: [2, rows, places]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    m_row = row < num_rows
    token = (row // HQ).to(tl.int64)
    head = row % HQ
    source = q + token * stride_t + head * stride_h
    TOTAL: tl.constexpr = PLACES + OUTLIERS
    target = out + row.to(tl.int64) * TOTAL
    low = num_rows.to(tl.int64) * TOTAL
    if chunk * CHUNK < PLACES:
        c = tl.arange(0, DV)
        x = tl.load(source[:, None] + c[None, :], mask=m_row[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
        if OUTLIERS > 0:
            for i in range(OUTLIERS):
                channel = tl.load(outlier_channels + head // G * OUTLIERS + i)
                x = tl.where(c[None, :] == channel[:, None], 0.0, x)
        place = chunk * CHUNK + tl.arange(0, CHUNK)
        m_matrix = (c < D)[:, None] & (place < PLACES)[None, :]
        b_matrix = tl.load(matrix + place[None, :] * D + c[:, None], mask=m_matrix, other=0.0).to(DOT)  # [DV, CHUNK]
        y = exact_dot(x, b_matrix, tl.zeros((ROWS, CHUNK), tl.float32), DOT) * factor
        _store_parts(target, place, low, y, m_row[:, None] & (place < PLACES)[None, :], DOT)
    elif OUTLIERS > 0:
        o = tl.arange(0, OUTLIERS)
        channels = tl.load(outlier_channels + (head // G)[:, None] * OUTLIERS + o[None, :])
        picked = tl.load(source[:, None] + channels, mask=m_row[:, None], other=0.0).to(tl.float32) * outlier_factor
        _store_parts(target, PLACES + o, low, picked, m_row[:, None], DOT)


@triton.jit
def _load_queries(base, mask, U: tl.constexpr, PACK: tl.constexpr, BLOCKS: tl.constexpr):
    """BLOCKS operands [rows, units * PACK], as a tuple."""
    n = tl.arange(0, U * PACK)
    blocks = (tl.load(base[:, None] + n[None, :], mask=mask[:, None], other=0.0),)
    for i in tl.static_range(1, BLOCKS):
        block = tl.load(base[:, None] + i * U * PACK + n[None, :], mask=mask[:, None], other=0.0)
        blocks = blocks + (block,)  # type: ignore[assignment]  # noqa: RUF005 - Triton has no unpacking
    return blocks


@triton.jit
def _key_products(
    queries, codes, signs, slot, U: tl.constexpr, SP: tl.constexpr, PACK: tl.constexpr, BLOCKS: tl.constexpr,
    BITS: tl.constexpr, D: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Products of query rows with the levels of a block's keys: [rows, slots] fp32."""
    u = tl.arange(0, U)
    mask = None
    if SP * 32 > D:
        mask = (u % SP * 32 < D)[None, :] & (slot >= 0)[:, None]
    word, second = load_key_units(codes[:, None], signs[:, None], slot[:, None], u[None, :], mask, BITS, SP, D, P)
    s = tl.zeros((queries[0].shape[0], slot.shape[0]), tl.float32)
    for i in tl.static_range(BLOCKS):
        s = tl.dot(queries[i], tl.trans(key_block(word, second, i * PACK, PACK, BITS, DOT)), s)
    return s


@triton.jit
def _value_products(
    p, acc, codes, signs, octet, R: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    P: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """acc [R, DV] plus the products of p [R, slots] DOT with the levels of a block's values."""
    column = tl.arange(0, DV)
    mask = None
    if DV > D:
        mask = (column < D)[None, :] & (octet >= 0)[:, None]
    word = load_value_units(codes[:, None], signs[:, None], octet[:, None], column[None, :], mask, BITS, D, P)
    even, odd = tl.split(tl.reshape(p, (R, octet.shape[0], 2, 2, 2)))
    even0, even1 = tl.split(even)
    odd0, odd1 = tl.split(odd)
    p0, p4 = tl.split(even0)
    p2, p6 = tl.split(even1)
    p1, p5 = tl.split(odd0)
    p3, p7 = tl.split(odd1)
    parts = (p0, p1, p2, p3, p4, p5, p6, p7)
    for e in tl.static_range(8):
        acc = tl.dot(parts[e], level(word, word, e, BITS).to(DOT), acc)
    return acc


@triton.jit
def count_up_to(values, count, limit):
    """How many of `count` ascending integers are at most `limit`."""
    found = 0
    for start in range(0, count, 1024):
        i = start + tl.arange(0, 1024)
        value = tl.load(values + i, mask=i < count, other=2147483647)
        found += tl.sum((value <= limit).to(tl.int32), 0)
    return found


@triton.jit
def _both_halves(x, R: tl.constexpr, N: tl.constexpr):
    """The sum of the upper and the lower half of x's rows, in both of them: [R, N]."""
    total = tl.sum(tl.reshape(x, (2, R // 2, N)), axis=0)
    return tl.reshape(tl.broadcast_to(total[None, :, :], (2, R // 2, N)), (R, N))


@triton.jit(
    do_not_specialize=["batch", "num_rows", "stride_page", "stride_table", "window", "soft_cap"],
    do_not_specialize_on_alignment=["block_table", "seq_lens", "seq_starts", "recent_counts", "blocks", "rows"],
)
def attend(
    q, pages, block_table, seq_lens, seq_starts, recent_counts, blocks, rows, part, part_stats,
    batch, num_rows, stride_page, stride_table, window, soft_cap,
    HQ: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_RECENT: tl.constexpr, D: tl.constexpr, P: tl.constexpr, SP: tl.constexpr, PACK: tl.constexpr, DV: tl.constexpr,
    KB: tl.constexpr,
    VB: tl.constexpr, K_CODES: tl.constexpr, K_SIGNS: tl.constexpr, V_CODES: tl.constexpr, V_SIGNS: tl.constexpr,
    K_SCALE: tl.constexpr, V_SCALE: tl.constexpr, OUTLIERS: tl.constexpr, OUT_CODES: tl.constexpr,
    OUT_SCALE: tl.constexpr, PAGE_BYTES: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One worker's run of blocks for one KV head and one tile of query rows; a partial result per sequence it meets."""
    worker = tl.program_id(0)
    head = tl.program_id(1)
    tile = tl.program_id(2)
    HALF: tl.constexpr = R // 2
    U: tl.constexpr = 4 * SP
    PLACES: tl.constexpr = 8 * U
    tiles = tl.num_programs(2)
    total = tl.load(blocks + batch)
    per = tl.cdiv(total, tl.num_programs(0))
    here = worker * per
    stop = tl.minimum(here + per, total)
    b = count_up_to(blocks + 1, batch, here)

    r = tl.arange(0, R)
    row = tile * HALF + r % HALF  # query * G + head of the group
    is_high = (r < HALF)[:, None]
    j = tl.arange(0, BLOCK)
    slot = j % P
    j_octet = tl.arange(0, BLOCK // 8)
    heads = pages + head.to(tl.int64) * PAGE_BYTES
    while here < stop:
        first_block = tl.load(blocks + b)
        end = tl.minimum(tl.load(blocks + b + 1), stop)
        length = tl.load(seq_lens + b)
        q_row, count = b, 1
        if HAS_ROWS:
            q_row = tl.load(rows + b)
            count = tl.load(rows + b + 1) - q_row
        if (end > here) & (tile * HALF < count * G):
            position = length - count + row // G
            begin = 0
            if HAS_WINDOW:
                begin = tl.maximum(length - count - window + 1, 0)
            if HAS_STARTS:
                begin = tl.maximum(begin, tl.load(seq_starts + b))
            packed = length
            if HAS_RECENT:
                packed = length - tl.load(recent_counts + b)
            skip = begin // BLOCK - first_block
            m_row = row < count * G
            q_base = q + ((q_row + row // G) * HQ + head * G + row % G).to(tl.int64) * (PLACES + OUTLIERS)
            q_base += (r // HALF).to(tl.int64) * num_rows * (PLACES + OUTLIERS)
            queries = _load_queries(q_base, m_row, U, PACK, 8 // PACK)
            if OUTLIERS > 0:
                outlier_queries = _load_queries(q_base + PLACES, m_row, 4, 4, OUTLIERS // 16)
            table = block_table + b.to(tl.int64) * stride_table

            acc = tl.zeros((R, DV), tl.float32)
            top = tl.full((R,), float("-inf"), tl.float32)
            weight = tl.zeros((R,), tl.float32)
            for i in tl.range(here + skip, end + skip, num_stages=STAGES):
                slot_position = i * BLOCK + j
                m_slot = (slot_position < packed) & (slot_position >= begin)
                page = tl.load(table + slot_position // P, mask=m_slot, other=0).to(tl.int64)
                base = heads + page * stride_page * 16
                s = _key_products(queries, base + K_CODES, base + K_SIGNS, slot, U, SP, PACK, 8 // PACK, KB, D, P, DOT)
                s = s * load_scales(base + K_SCALE, slot, m_slot)[None, :]
                if OUTLIERS > 0:
                    x = _key_products(
                        outlier_queries, base + OUT_CODES, base, slot, 4, 1, 4, OUTLIERS // 16, 8, OUTLIERS, P, DOT
                    )
                    s += x * load_scales(base + OUT_SCALE, slot, m_slot)[None, :]
                s = _both_halves(s, R, BLOCK)
                if HAS_CAP:
                    s = soft_cap * (1 - 2 / (tl.exp2(s * (2 / soft_cap * 1.4426950408889634)) + 1)) * 1.4426950408889634
                m_seen = m_slot[None, :]
                if HAS_ROWS:
                    m_seen = m_seen & (slot_position[None, :] <= position[:, None])
                    if HAS_WINDOW:
                        m_seen = m_seen & (slot_position[None, :] > position[:, None] - window)
                s = tl.where(tl.abs(s) == float("inf"), float("nan"), s)  # it would vanish as a weight of 0
                s = tl.where(m_seen, s, float("-inf"))

                new_top = tl.maximum(top, tl.max(s, 1))
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                fade = tl.exp2(top - shift)
                p = tl.exp2(s - shift[:, None])
                weight = weight * fade + tl.sum(p, 1)
                top = new_top
                p = tl.where(m_seen, p * load_scales(base + V_SCALE, slot, m_slot)[None, :], 0.0)
                high = p.to(tl.bfloat16)
                rest = (p - high.to(tl.float32)).to(tl.bfloat16)
                p = tl.where(is_high, high.to(DOT), rest.to(DOT))

                octet_position = i * BLOCK + j_octet * 8
                m_octet = (octet_position < packed) & (octet_position + 8 > begin)
                page = tl.load(table + octet_position // P, mask=m_octet, other=0).to(tl.int64)
                base = heads + page * stride_page * 16
                acc = _value_products(
                    p, acc * fade[:, None], base + V_CODES, base + V_SIGNS, j_octet % (P // 8), R, VB, D, DV, P, DOT
                )
            split = ((worker + b).to(tl.int64) * HKV + head) * (tiles * HALF) + tile * HALF
            acc = tl.sum(tl.reshape(acc, (2, HALF, DV)), axis=0)
            i_row = tl.arange(0, HALF)
            column = tl.arange(0, DV)
            m_part = (tile * HALF + i_row < count * G)[:, None] & (column < D)[None, :]
            tl.store(part + (split + i_row)[:, None] * D + column[None, :], acc, mask=m_part)
            tl.store(part_stats + (split + r) * 2, top, mask=(r < HALF) & m_row)
            tl.store(part_stats + (split + r) * 2 + 1, weight, mask=(r < HALF) & m_row)
        here = tl.maximum(end, here)
        b += 1
