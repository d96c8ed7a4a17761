# mypy: disable-error-code="no-untyped-def"
"""What the store kernel in Triton does to vectors: rotation, scale search, and codes."""

from __future__ import annotations

import triton
import triton.language as tl

from kvturbo.codebook import CODEBOOKS
from kvturbo.ops import triton_common as common
from kvturbo.ops.triton_common import exact_dot

SEARCH = tl.constexpr((0.88, 0.94, 1.0, 1.06, 1.12))
THRESHOLDS2 = tl.constexpr(CODEBOOKS[2].thresholds)
THRESHOLDS3 = tl.constexpr(CODEBOOKS[3].thresholds)
THRESHOLDS4 = tl.constexpr(CODEBOOKS[4].thresholds)
T2 = tl.constexpr(CODEBOOKS[2].T)
T3 = tl.constexpr(CODEBOOKS[3].T)
T4 = tl.constexpr(CODEBOOKS[4].T)


@triton.jit
def _indices(size, unit, BITS: tl.constexpr):
    """Magnitude indices of |y| [rows, n] by bisection; unit [rows] is the scale over T."""
    u = unit[:, None]
    if BITS == 4:
        high = size > THRESHOLDS4[3] * u
        middle = size > tl.where(high, THRESHOLDS4[5] * u, THRESHOLDS4[1] * u)
        upper = tl.where(middle, THRESHOLDS4[6] * u, THRESHOLDS4[4] * u)
        lower = tl.where(middle, THRESHOLDS4[2] * u, THRESHOLDS4[0] * u)
        low = size > tl.where(high, upper, lower)
        index = high.to(tl.uint32) * 4 + middle.to(tl.uint32) * 2 + low.to(tl.uint32)
    elif BITS == 3:
        high = size > THRESHOLDS3[1] * u
        low = size > tl.where(high, THRESHOLDS3[2] * u, THRESHOLDS3[0] * u)
        index = high.to(tl.uint32) * 2 + low.to(tl.uint32)
    else:
        index = (size > THRESHOLDS2[0] * u).to(tl.uint32)
    return index


@triton.jit
def _magnitudes(index, BITS: tl.constexpr):
    """Levels of magnitude indices in units of 1/T, fp32."""
    if BITS == 4:
        table = tl.full(index.shape, common.TABLE4, tl.uint64)
        level = ((table >> (index * 8).to(tl.uint64)).to(tl.uint32) & 0xFF).to(tl.int32).to(tl.float32) * 0.5
    elif BITS == 3:
        table = tl.full(index.shape, common.TABLE3, tl.uint64)
        level = ((table >> (index * 8).to(tl.uint64)).to(tl.uint32) & 0xFF).to(tl.int32).to(tl.float32) - 127.5
    else:
        table = tl.full(index.shape, common.TABLE2, tl.uint32)
        level = ((table >> (index * 8)) & 0xFF).to(tl.int32).to(tl.float32) - 127.5
    return level


@triton.jit
def _half_scale(scale):
    """fp32 scales to fp16: at most 65504, 0 below 2^-24, NaN stays NaN."""
    scale = tl.where(scale < 5.9604644775390625e-08, 0.0, scale)
    return tl.where(scale > 65504.0, 65504.0, scale).to(tl.float16)


@triton.jit
def encode(y, m_column, BITS: tl.constexpr, D: tl.constexpr):
    """Magnitude indices, signs and fp16 scales of rotated vectors y [rows, n]; places outside m_column are 0."""
    size = tl.abs(y)
    energy = tl.sum(y * y, 1)
    rms = tl.sqrt_rn(tl.div_rn(energy, tl.full(energy.shape, D, tl.float32)))
    T: tl.constexpr = T4 if BITS == 4 else (T3 if BITS == 3 else T2)
    INVERSE: tl.constexpr = 1 / T
    unit = rms * INVERSE
    if BITS > 2:
        score = tl.full(energy.shape, float("-inf"), tl.float32)
        dot = energy
        best = unit
        for j in tl.static_range(5):
            candidate = rms * SEARCH[j] * INVERSE
            level = _magnitudes(_indices(size, candidate, BITS), BITS)
            new_dot = tl.sum(size * level, 1)
            new_cc = tl.sum(tl.where(m_column, level * level, 0.0), 1)
            new_score = new_dot * new_dot / new_cc
            if j == 0:
                score, dot, best = new_score, new_dot, candidate
            else:
                better = new_score > score
                score = tl.where(better, new_score, score)
                dot = tl.where(better, new_dot, dot)
                best = tl.where(better, candidate, best)
        unit = best
    index = _indices(size, unit, BITS)
    if BITS == 2:
        dot = tl.sum(size * _magnitudes(index, BITS), 1)
    scale = tl.where(energy > 0, tl.div_rn(energy, dot) * T, 0.0)
    scale = tl.where(energy < float("inf"), scale, float("nan"))
    return index, (y < 0).to(tl.uint32), _half_scale(scale)


@triton.jit
def encode_int8(y):
    """Symmetric int8 bytes (uint32) of y [rows, n], and fp16 steps."""
    size = tl.abs(y)
    wrong = tl.sum((size < float("inf")).to(tl.int32) - 1, 1) < 0
    step = _half_scale(tl.where(wrong, float("nan"), tl.max(size, 1) / 127))
    divisor = step.to(tl.float32)[:, None]
    ratio = tl.minimum(tl.maximum(tl.div_rn(y, tl.broadcast_to(divisor, y.shape)), -127.0), 127.0)
    ratio = tl.where(divisor > 0, ratio, 0.0)
    code = (ratio + 12582912.0) - 12582912.0  # to the nearest integer, ties to even
    return code.to(tl.int32).to(tl.uint32, bitcast=True) & 0xFF, step


@triton.jit
def _load_vectors(x, outlier_channels, m_row, start, STEP: tl.constexpr, OUTLIERS: tl.constexpr, D: tl.constexpr):
    """Channels start..start+STEP-1 of the vectors at pointers x [rows], outlier channels zeroed, in fp32."""
    c = start + tl.arange(0, STEP)
    part = tl.load(x[:, None] + c[None, :], mask=m_row[:, None] & (c < D)[None, :], other=0.0).to(tl.float32)
    if OUTLIERS > 0:
        for i in range(OUTLIERS):
            part = tl.where(c[None, :] == tl.load(outlier_channels + i), 0.0, part)
    return part


@triton.jit
def _butterflies(x, ROWS: tl.constexpr, D: tl.constexpr):
    """Sylvester's transform of x [ROWS, D] in the order 1, 2, 4, ...: neighbours are added, and the index turns by one bit."""
    for i in tl.static_range(8):
        if (1 << i) < D:
            a, b = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, D))
    return x


@triton.jit
def _by_matrix(
    x, matrix, outlier_channels, m_row, N: tl.constexpr, PLACES: tl.constexpr, OUTLIERS: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The vectors at x times a `rotation_matrix`: [ROWS, N] fp32, without the factor."""
    place = tl.arange(0, N)
    y = tl.zeros((ROWS, N), tl.float32)
    for start in range(0, D, 64):
        c = start + tl.arange(0, 64)
        part = _load_vectors(x, outlier_channels, m_row, start, 64, OUTLIERS, D)
        m_matrix = (c < D)[:, None] & (place < PLACES)[None, :]
        b_matrix = tl.load(matrix + place[None, :] * D + c[:, None], mask=m_matrix, other=0.0).to(DOT)
        if EXACT:
            y = tl.dot(part.to(DOT), b_matrix, y)
        else:
            y = exact_dot(part, b_matrix, y, DOT)
    return y


@triton.jit
def rotate_keys(
    x, turn, outlier_channels, m_row, U: tl.constexpr, OUTLIERS: tl.constexpr, ROTATE: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Rotated keys [ROWS, 8 U], element e of unit u at 8 u + e, without the factor.

    `turn` holds the signs where d is a power of two, and a `rotation_matrix` where it is not.
    """
    if D == DV:
        y = _load_vectors(x, outlier_channels, m_row, 0, D, OUTLIERS, D)
        if ROTATE:
            y = _butterflies(y * tl.load(turn + tl.arange(0, D))[None, :], ROWS, D)
        y = tl.permute(tl.reshape(y, (ROWS, U // 4, 2, 4, 4)), (0, 3, 1, 2, 4))
    else:
        y = _by_matrix(x, turn, outlier_channels, m_row, 8 * U, 8 * U, OUTLIERS, D, ROWS, EXACT, DOT)
        y = tl.permute(tl.reshape(y, (ROWS, 8, U)), (0, 2, 1))
    return tl.reshape(y, (ROWS, 8 * U))


@triton.jit
def rotate_values(
    x, turn, m_row, ROTATE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Rotated values [ROWS, DV] by columns, without the factor; `turn` as for keys."""
    if D == DV:
        y = _load_vectors(x, turn, m_row, 0, D, 0, D)
        if ROTATE:
            y = _butterflies(y * tl.load(turn + tl.arange(0, D))[None, :], ROWS, D)
        y = tl.reshape(tl.permute(tl.reshape(y, (ROWS, D // 32, 4, 8)), (0, 1, 3, 2)), (ROWS, D))
    else:
        y = _by_matrix(x, turn, turn, m_row, DV, D, 0, D, ROWS, EXACT, DOT)
    return y
