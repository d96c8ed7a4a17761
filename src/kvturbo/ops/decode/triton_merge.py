"""The last kernel of decode in Triton: merge the splits of a query and its newest tokens, and un-rotate."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from kvturbo.ops.decode.triton_attend import count_up_to
from kvturbo.ops.triton_common import exact_dot


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
def merge(
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
        b = count_up_to(rows + 1, batch, query)
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
