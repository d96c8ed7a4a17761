"""Decode in Triton: rotate the queries, attend split by split, merge the splits and un-rotate.

Three launches of fixed shape. A split decodes each key and value once for all query heads of its KV head. Queries and
probabilities go into the products as two bfloat16 parts, high in the upper half of a tile's rows, low in the lower half; the
levels themselves are exact in bfloat16.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import current_stream
from kvturbo.layout import PageLayout
from kvturbo.ops import triton_common as common
from kvturbo.ops.checks import MAX_Q_LEN
from kvturbo.ops.recent import Recent
from kvturbo.ops.schedule import BLOCK, Schedule, plan
from kvturbo.ops.sharing import SharedSchedules
from kvturbo.ops.triton_common import (
    exact_dot,
    key_block,
    level,
    load_key_units,
    load_scales,
    load_value_units,
)

LOG2E = math.log2(math.e)
INTERPRETED_WORKERS = 5
ROTATE_ROWS = 16
ROTATE_PLACES = 64
SPREAD_BELOW = 256
"""With fewer pairs of a query and a KV head than this, a program merges one head; with more, a whole group."""


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
def _rotate_queries(
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
def _count_up_to(values, count, limit):
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
def _attend(
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
    b = _count_up_to(blocks + 1, batch, here)

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


@triton.jit
def _load_newest(base, m_token, c, D: tl.constexpr):
    """Channels c of raw vectors at pointers base [tokens], in fp32."""
    return tl.load(base[:, None] + c[None, :], mask=m_token[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _newest_scores(q, keys, m_row, m_token, D: tl.constexpr, CHUNK: tl.constexpr):
    """Products of the queries at pointers q [rows] with the raw keys at pointers keys [tokens], in fp32: [rows, tokens]."""
    s = tl.zeros((q.shape[0], keys.shape[0]), tl.float32)
    for start in range(0, D, CHUNK):
        c = start + tl.arange(0, CHUNK)
        x = _load_newest(q, m_row, c, D)
        s = tl.dot(x, tl.trans(_load_newest(keys, m_token, c, D)), s, input_precision="ieee")
    return s


@triton.jit
def _all_finite(base, m_token, D: tl.constexpr, DV: tl.constexpr):
    """Whether the raw vectors at pointers base [tokens] are finite: one of them must not vanish with a weight of 0."""
    x = tl.abs(_load_newest(base, m_token, tl.arange(0, DV), D))
    return tl.sum(tl.sum((x < float("inf")).to(tl.int32) - 1, 1), 0) == 0


@triton.jit(
    do_not_specialize=[
        "q_stride_t", "q_stride_h", "window", "score_factor", "soft_cap", "batch", "workers", "split_rows", "stride_t", "stride_h",
        "factor",
    ],
    do_not_specialize_on_alignment=[
        "q", "recent_slots", "recent_counts", "seq_lens", "seq_starts", "blocks", "rows", "sinks", "out", "lse",
    ],
)  # fmt: skip
def _merge(
    q, recent, recent_slots, recent_counts, seq_lens, seq_starts, q_stride_t, q_stride_h, window, score_factor, soft_cap,
    part, part_stats, blocks, rows, sinks, matrix, out, lse, batch, workers, split_rows, stride_t, stride_h, factor,
    HQ: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, GT: tl.constexpr, SPLITS: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_SINKS: tl.constexpr, RING: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One query and GT heads of a KV head's group: its splits and its newest tokens merged, divided by their weight, un-rotated.

    Up to `RING` they are the arguments of the newest tokens, which are raw: their values join behind the un-rotation.
    """
    query = tl.program_id(0)
    TILES: tl.constexpr = (G + GT - 1) // GT
    head = tl.program_id(1) // TILES
    g = tl.program_id(1) % TILES * GT + tl.arange(0, GT)
    m_head = g < G
    b, i_query, real = query, 0, True
    if HAS_ROWS:
        b = _count_up_to(rows + 1, batch, query)
        real = b < batch
        b = tl.minimum(b, batch - 1)
        i_query = query - tl.load(rows + b)
    total = tl.load(blocks + batch)
    per = tl.maximum(tl.cdiv(total, workers), 1)
    first_block = tl.load(blocks + b)
    end_block = tl.load(blocks + b + 1)
    first = first_block // per
    last = (end_block - 1) // per + 1
    if (end_block == first_block) | (real == False):  # noqa: E712 - `not` needs a Python bool, this may be a tensor
        last = first

    column = tl.arange(0, DV)
    acc = tl.zeros((GT, DV), tl.float32)
    top = tl.full((GT,), float("-inf"), tl.float32)
    weight = tl.zeros((GT,), tl.float32)
    for start in range(first, last, SPLITS):
        split = start + tl.arange(0, SPLITS)
        index = ((split + b).to(tl.int64) * HKV + head)[:, None] * split_rows + (i_query * G + g)[
            None, :
        ]  # [SPLITS, GT]
        m_split = (split < last)[:, None] & m_head[None, :]
        tops = tl.load(part_stats + index * 2, mask=m_split, other=float("-inf"))
        weights = tl.load(part_stats + index * 2 + 1, mask=m_split, other=0.0)
        m_part = m_split[:, :, None] & (column < D)[None, None, :]
        parts = tl.load(part + index[:, :, None] * D + column[None, None, :], mask=m_part, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - shift)
        share = tl.exp2(tops - shift[None, :])
        weight = weight * fade + tl.sum(weights * share, 0)
        acc = acc * fade[:, None] + tl.sum(parts * share[:, :, None], 0)
        top = new_top
    ROWS: tl.constexpr = 16 if GT < 16 else GT
    if GT < 16:  # the least that a matrix product takes everywhere
        acc = tl.reshape(tl.broadcast_to(acc[None, :, :], (16 // GT, GT, DV)), (16, DV))
        top = tl.reshape(tl.broadcast_to(top[None, :], (16 // GT, GT)), (16,))
        weight = tl.reshape(tl.broadcast_to(weight[None, :], (16 // GT, GT)), (16,))
    r = tl.arange(0, ROWS)
    g_row = tl.program_id(1) % TILES * GT + r % GT
    m_row = (r < GT) & (g_row < G)
    if RING > 0:
        length = tl.load(seq_lens + b)
        packed = length - tl.load(recent_counts + b)
        position = length - 1
        if HAS_ROWS:
            position += 1 + i_query - (tl.load(rows + b + 1) - tl.load(rows + b))
        begin = 0
        if HAS_WINDOW:
            begin = tl.maximum(position - window + 1, 0)
        if HAS_STARTS:
            begin = tl.maximum(begin, tl.load(seq_starts + b))
        i_token = tl.arange(0, 16 if RING < 16 else RING)
        at = packed + i_token
        m_token = (i_token < RING) & (at >= begin) & (at <= position) & real
        vector = (tl.load(recent_slots + b).to(tl.int64) * HKV + head) * (2 * RING)
        keys = recent + (vector + at % RING) * D
        q_base = q + query.to(tl.int64) * q_stride_t + (head * G + g_row) * q_stride_h
        s = _newest_scores(q_base, keys, g_row < G, m_token, D, CHUNK) * score_factor
        s = tl.where(tl.abs(s) == float("inf"), float("nan"), s)
        if HAS_CAP:
            s = soft_cap * (1 - 2 / (tl.exp2(s * (2 / soft_cap * 1.4426950408889634)) + 1)) * 1.4426950408889634
        s = tl.where(m_token[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - shift)
        newest = tl.exp2(s - shift[:, None])
        weight = weight * fade + tl.sum(newest, 1)
        acc = acc * fade[:, None]
        top = new_top
    if HAS_SINKS:
        sink = tl.load(sinks + head * G + g_row, mask=g_row < G, other=float("-inf")) * 1.4426950408889634
        new_top = tl.maximum(top, sink)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp2(top - shift)
        weight = weight * fade + tl.exp2(sink - shift)
        acc = acc * fade[:, None]
        if RING > 0:
            newest = newest * fade[:, None]
        top = new_top
    shift = tl.where(top == float("-inf"), 0.0, top)
    tl.store(lse + query * HQ + head * G + g_row, (shift + tl.log2(weight)) * 0.6931471805599453, mask=m_row)
    weight = tl.where(weight == 0.0, 1.0, weight)
    acc = acc * (factor / weight)[:, None]
    if RING > 0:
        newest = newest / weight[:, None]
        newest = tl.where(_all_finite(keys + RING * D, m_token, D, DV), newest, float("nan"))
    target = out + query.to(tl.int64) * stride_t + (head * G + g_row) * stride_h
    for start in range(0, D, CHUNK):
        c = start + tl.arange(0, CHUNK)
        m_matrix = (column < D)[:, None] & (c < D)[None, :]
        b_matrix = tl.load(matrix + column[:, None] * D + c[None, :], mask=m_matrix, other=0.0).to(DOT)  # [DV, CHUNK]
        y = exact_dot(acc, b_matrix, tl.zeros((ROWS, CHUNK), tl.float32), DOT)
        if RING > 0:
            v = _load_newest(keys + RING * D, m_token, c, D)
            y = tl.dot(newest, v, y, input_precision="ieee")
        tl.store(target[:, None] + c[None, :], y.to(out.dtype.element_ty), mask=m_row[:, None] & (c < D)[None, :])


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_workers(device: torch.device, num_kv_heads: int, per_processor: int) -> int:
    """Workers per KV head: together as many as the GPU holds at once."""
    if device.type != "cuda":
        return INTERPRETED_WORKERS
    return max(1, _processors(device) * per_processor // num_kv_heads)


def _register_limit(device: torch.device, per_processor: int) -> dict[str, int]:
    """Launch options that keep a worker's registers low enough for `per_processor` of them; NVIDIA only."""
    if device.type != "cuda" or torch.version.hip or per_processor < 3:
        return {}
    return {"maxnreg": 168}


def workspace_bytes(queries: int, workers: int, batch: int, num_q_heads: int, head_dim: int, max_q_len: int = 1) -> int:
    """Upper bound of the memory that a call takes beside its results.

    Rotated queries, two bfloat16 parts of at most 2 * d + 32 places each, and (workers + B) partial results per query head, of at
    most max_q_len queries rounded up to a tile of 16 rows per KV head. It does not depend on the lengths of the sequences.
    """
    rotated = queries * num_q_heads * (2 * head_dim + 32) * 2 * 2
    partial = (workers + batch) * num_q_heads * (max_q_len + 15) * (head_dim + 2) * 4
    return rotated + partial


def warmup(
    fmt: KVFormat,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    max_q_len: int | None = None,
    seq_starts: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
    ring_size: int = 0,
) -> None:
    """Compiles and loads what `decode` launches for such pages and queries of `dtype`, whatever the batch.

    Args:
        max_q_len: of the schedules to come with q_lens; None for calls without q_lens.
        seq_starts, sinks: whether calls have them.
        window, soft_cap: as in the calls; only whether they are None matters.
        ring_size: tokens of a ring of the calls' `recent`; 0 for calls without.
    """
    pages, channels = common.scratch_pages(fmt, page_size, num_kv_heads, device)
    for batch in (1, -(-SPREAD_BELOW // num_kv_heads)):
        q = torch.zeros(batch, num_q_heads, fmt.head_dim, dtype=dtype, device=device)
        lens = torch.zeros(batch, dtype=torch.int32, device=device)
        q_lens, starts = None if max_q_len is None else lens, lens if seq_starts else None
        recent = None
        if ring_size:
            rows = torch.zeros(1, num_kv_heads, 2, ring_size, fmt.head_dim, dtype=dtype, device=device)
            recent = Recent(rows, lens, lens)
        schedule = plan(
            lens, q_lens=q_lens, seq_starts=starts, window=window, recent_counts=recent and recent.counts,
            max_q_len=max_q_len or 1,
        )  # fmt: skip
        decode(
            q, pages, lens[:, None], lens, torch.empty_like(q), fmt=fmt, scale=1.0, q_lens=q_lens, seq_starts=starts,
            window=window, soft_cap=soft_cap, sinks=torch.zeros(num_q_heads, device=device) if sinks else None,
            outlier_channels=channels, recent=recent, schedule=schedule,
        )  # fmt: skip


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    fmt: KVFormat,
    scale: float,
    q_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    outlier_channels: Tensor | None = None,
    recent: Recent | None = None,
    schedule: Any = None,
) -> Tensor:
    """See `kvturbo.ops.decode`; writes into out and returns lse. Computes in fp32. Memory: `workspace_bytes`.

    Raises:
        TypeError: schedule is not a `kvturbo.ops.schedule.Schedule`.
        ValueError: the schedule does not fit the call, or pages or rings are not aligned to 16 bytes.
    """
    common.check_pages(pages)
    if recent is not None:
        common.check_rings("recent.rows", recent.rows)
    batch, (num_queries, num_heads) = seq_lens.shape[0], q.shape[:2]
    lse = torch.empty(num_queries, num_heads, dtype=torch.float32, device=q.device)
    if not num_queries or not batch:
        out.zero_()
        lse.copy_(torch.full_like(lse, -torch.inf) if sinks is None else sinks.expand_as(lse))
        return lse.to(torch.promote_types(q.dtype, torch.float32))
    schedule = _planned(schedule, seq_lens, q_lens, seq_starts, window, recent, num_queries)
    seq_lens, seq_starts, sinks, outlier_channels = common.contiguous(seq_lens, seq_starts, sinks, outlier_channels)
    recent = recent and Recent(recent.rows, *common.contiguous(recent.slots, recent.counts))
    block_table, q = common.rows_contiguous(block_table), common.rows_contiguous(q)
    call = _Call(q, pages, fmt, schedule, scale * (1.0 if soft_cap else LOG2E), window, soft_cap)
    rotated = call.rotate(q, outlier_channels)
    part, stats = call.attend(rotated, pages, block_table, seq_lens, seq_starts, recent)
    target = out if out.stride(-1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    call.merge(part, stats, q, seq_lens, seq_starts, recent, sinks, target, lse)
    if target is not out:
        out.copy_(target)
    return lse.to(torch.promote_types(q.dtype, torch.float32))


def _planned(
    schedule: Any,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    seq_starts: Tensor | None,
    window: int | None,
    recent: Recent | None,
    num_queries: int,
) -> Schedule:
    counts = None if recent is None else recent.counts
    bound = min(MAX_Q_LEN, num_queries)

    def make(_: Schedule | None = None) -> Schedule:
        return plan(
            seq_lens, q_lens=q_lens, seq_starts=seq_starts, window=window, recent_counts=counts, max_q_len=bound
        )

    device, shared = seq_lens.device, isinstance(schedule, SharedSchedules)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if schedule is None or (shared and (capturing or recent is not None)):  # shared plans don't know of rings
        return make()
    if shared:
        stream = current_stream(device.index) if device.type == "cuda" else 0
        kind = ("triton", len(seq_lens), window, bound, device, stream)
        lens = seq_lens, q_lens, seq_starts
        return schedule.find(kind, *lens) or schedule.make(kind, *lens, make)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a kvturbo.ops.schedule.Schedule, got {type(schedule).__name__}")
    schedule.check(seq_lens.shape[0], window, q_lens, counts)
    return schedule


class _Call:
    """Sizes of one call, and its three launches. score_factor: to base-2 logarithms, or what the soft cap takes."""

    def __init__(
        self,
        q: Tensor,
        pages: Tensor,
        fmt: KVFormat,
        schedule: Schedule,
        score_factor: float,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        self.score_factor, self.window, self.soft_cap = score_factor, window, soft_cap
        self.fmt, self.schedule, self.device = fmt, schedule, q.device
        self.constants = common.page_constants(fmt, PageLayout.page_size_of(fmt, pages.shape[2]))
        self.num_queries, self.num_heads, self.num_kv_heads = q.shape[0], q.shape[1], pages.shape[1]
        self.group = self.num_heads // self.num_kv_heads
        self.batch = schedule.blocks.shape[0] - 1
        rows = self.group * schedule.max_q_len
        self.half = 8 if rows <= 8 else 16
        self.tiles = -(-rows // self.half)
        self.per_processor = 3 if fmt.head_dim <= 128 and self.half == 8 else 2
        self.workers = num_workers(q.device, self.num_kv_heads, self.per_processor)
        self.shared = {
            "HQ": self.num_heads,
            "HKV": self.num_kv_heads,
            "G": self.group,
            "HAS_ROWS": schedule.rows is not None,
            "DOT": common.DOT,
        }

    def rotate(self, q: Tensor, outlier_channels: Tensor | None) -> Tensor:
        fmt, factor = self.fmt, self.score_factor
        places = 32 * self.constants["SP"]
        dtype = torch.float32 if common.INTERPRETED else torch.bfloat16
        rows = self.num_queries * self.num_heads
        out = torch.empty(2, rows, places + fmt.outliers, dtype=dtype, device=self.device)
        grid = (-(-rows // ROTATE_ROWS), -(-places // ROTATE_PLACES) + (1 if fmt.outliers else 0))
        matrix = common.rotation_matrix(fmt.head_dim, fmt.seed, "k", fmt.k.rotate, self.device)
        unit = common.UNITS[self.constants["KB"]] * common.norm(fmt.head_dim, fmt.k.rotate)
        _rotate_queries[grid](
            q, out, matrix, outlier_channels, rows, q.stride(0), q.stride(1), factor * unit, factor,
            HQ=self.num_heads, G=self.group, D=fmt.head_dim, DV=self.constants["DV"], PLACES=places,
            OUTLIERS=fmt.outliers, ROWS=ROTATE_ROWS, CHUNK=ROTATE_PLACES, DOT=common.DOT, num_warps=8,
        )  # fmt: skip
        return out

    def attend(
        self,
        rotated: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        recent: Recent | None,
    ) -> tuple[Tensor, Tensor]:
        splits = (self.workers + self.batch) * self.num_kv_heads * self.tiles * self.half
        part = torch.empty(splits, self.fmt.head_dim, dtype=torch.float32, device=self.device)
        stats = torch.empty(splits, 2, dtype=torch.float32, device=self.device)
        _attend[(self.workers, self.num_kv_heads, self.tiles)](
            rotated, pages, block_table, seq_lens, seq_starts, recent and recent.counts, self.schedule.blocks, self.schedule.rows,
            part, stats, self.batch, rotated.shape[1], pages.stride(0) // 16, block_table.stride(0), self.window or 0,
            float(self.soft_cap or 0.0), R=2 * self.half, BLOCK=BLOCK, HAS_STARTS=seq_starts is not None,
            HAS_WINDOW=self.window is not None, HAS_CAP=self.soft_cap is not None, HAS_RECENT=recent is not None,
            PAGE_BYTES=pages.shape[2], STAGES=2, num_warps=4,
            **self.shared, **self.constants, **_register_limit(self.device, self.per_processor),
        )  # fmt: skip
        return part, stats

    def merge(
        self,
        part: Tensor,
        stats: Tensor,
        q: Tensor,
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        recent: Recent | None,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        fmt = self.fmt
        newest: tuple[Any, ...] = (None,) * 6 + (0, 0, 0, 0.0, 0.0)
        if recent is not None:
            numbers = q.stride(0), q.stride(1), self.window or 0, self.score_factor, float(self.soft_cap or 0.0)
            newest = (q, *recent, seq_lens, seq_starts, *numbers)
        spread = self.num_queries * self.num_kv_heads < SPREAD_BELOW
        heads = 1 if spread else triton.next_power_of_2(self.group)
        matrix = common.rotation_matrix(fmt.head_dim, fmt.seed, "v", fmt.v.rotate, self.device)
        unit = common.UNITS[self.constants["VB"]] * common.norm(fmt.head_dim, fmt.v.rotate)
        _merge[(self.num_queries, self.num_kv_heads * -(-self.group // heads))](
            *newest, part, stats, self.schedule.blocks, self.schedule.rows, sinks, matrix, out, lse,
            self.batch, self.workers, self.tiles * self.half, out.stride(0), out.stride(1), unit,
            GT=heads, SPLITS=max(1, 16 // heads), HAS_SINKS=sinks is not None,
            RING=0 if recent is None else recent.size, HAS_STARTS=newest[5] is not None,
            HAS_WINDOW=recent is not None and self.window is not None, HAS_CAP=recent is not None and self.soft_cap is not None,
            D=fmt.head_dim, DV=self.constants["DV"],
            CHUNK=64, num_warps=4, **self.shared, **({} if recent is None else {"num_stages": 2}),  # shared memory is short
        )  # fmt: skip
