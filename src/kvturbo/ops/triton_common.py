"""What the Triton kernels share: where a word lies, what a code means, and the rotation as a matrix product.

A *unit* is 8 codes (see `kvturbo.layout`). A tile of keys is [slots, units]: unit `t * SP + step` of a slot holds channels
`32 * step + 16 * (e // 4) + 4 * t + e % 4` for elements e = 0..7. A tile of values is [octets, columns]: a column is a channel in
the order in which a lane's words lie, and its unit holds 8 slots. `column_channels` and `unit_channels` say which channel is where,
and every product with a rotated vector uses a matrix whose rows or columns have been put into that order.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvturbo.codebook import CODEBOOKS
from kvturbo.config import KVFormat, Side
from kvturbo.layout import PageLayout
from kvturbo.rotation import hadamard_matrix, signs

INTERPRETED: bool = triton.knobs.runtime.interpret
DOT: Any = tl.float32 if INTERPRETED else tl.bfloat16
"""Type of matrix product operands, all of which are exact in bfloat16; the interpreter can't multiply bfloat16, hence fp32."""


def _table(values: list[int]) -> tl.constexpr:
    return tl.constexpr(sum(value << (8 * i) for i, value in enumerate(values)))


def _signed(bits: int) -> list[int]:
    halves = [int(m) for m in CODEBOOKS[bits].magnitudes]
    return [128 + m for m in halves] + [127 - m for m in halves]


TABLE4 = _table([int(2 * m) for m in CODEBOOKS[4].magnitudes])
TABLE3 = _table(_signed(3))
TABLE2 = _table(_signed(2))
UNITS = {2: 1 / CODEBOOKS[2].T, 3: 1 / CODEBOOKS[3].T, 4: 0.5 / CODEBOOKS[4].T, 8: 1.0}
"""By bits: what `level` is multiplied by to give a level for unit variance (8 bits: a step)."""


def steps_padded(channels: int) -> int:
    """SP: k-steps of 32 channels in a tile of keys, a last half one included, to the next power of two."""
    return triton.next_power_of_2(-(-channels // 32))


def unit_channels(channels: int) -> np.ndarray:
    """Channel of (unit, element) in a tile of keys: [4 * SP, 8] int64, -1 where there is none."""
    sp = steps_padded(channels)
    t, step, e = np.meshgrid(np.arange(4), np.arange(sp), np.arange(8), indexing="ij")
    half = (step == channels // 32) & (channels % 32 == 16)
    channel = 32 * step + 16 * (e // 4) + 4 * t + e % 4
    present = (step < channels // 32) | (half & (e < 4))
    return np.where(present, channel, -1).reshape(4 * sp, 8)


def key_pack(channels: int) -> int:
    """Elements of a unit that one product takes together, so that it has at least 16 columns."""
    return max(1, 16 // (4 * steps_padded(channels)))


def key_places(channels: int) -> np.ndarray:
    """Channel of every place of a rotated query, block by block as `key_block` wants it: [8 * units] int64, -1 where none."""
    pack = key_pack(channels)
    return unit_channels(channels).reshape(-1, 8 // pack, pack).transpose(1, 0, 2).reshape(-1)


def column_channels(channels: int) -> np.ndarray:
    """Channel of a column in a tile of values: [next power of two] int64, -1 beyond the last one."""
    units, start, order = channels // 8, 0, []
    for length in [4] * (units // 4) + [2] * (units % 4 // 2):
        order += [(start + m) * 8 + lane for lane in range(8) for m in range(length)]
        start += length
    return np.array(order + [-1] * (triton.next_power_of_2(channels) - channels))


def _ordered(matrix: Tensor, order: np.ndarray) -> Tensor:
    """Rows of `matrix` in the given order, zero where the order says -1."""
    rows = matrix[torch.from_numpy(np.maximum(order, 0))]
    return torch.where(torch.from_numpy(order >= 0)[:, None], rows, 0.0)


@lru_cache(maxsize=64)
def rotation_matrix(head_dim: int, seed: int, side: Side, rotate: bool, device: torch.device) -> Tensor:
    """sqrt(d) times the rotation, a row per place of a tile: y[place] = matrix[place] @ x.

    Args:
        head_dim: d.
        seed: of the signs.
        side: "k" for the places of `key_places`, "v" for the columns of `column_channels`.
        rotate: False gives the matrix that only puts channels into their places (and has no factor sqrt(d)).
        device: where to.

    Returns:
        [places, d] bf16, entries -1, 0 and 1: exact.
    """
    matrix = torch.eye(head_dim, dtype=torch.float64)
    if rotate:
        matrix = hadamard_matrix(head_dim) * signs(head_dim, seed).double()
    order = key_places(head_dim) if side == "k" else column_channels(head_dim)
    return _ordered(matrix, order).to(torch.bfloat16).contiguous().to(device)


@lru_cache(maxsize=64)
def device_signs(head_dim: int, seed: int, device: torch.device) -> Tensor:
    """`kvturbo.rotation.signs`, copied to the device once: a copy from the host can't be captured in a graph."""
    return signs(head_dim, seed, device)


def norm(head_dim: int, rotate: bool) -> float:
    """What a product with `rotation_matrix` is multiplied by."""
    return float(head_dim**-0.5) if rotate else 1.0


@lru_cache(maxsize=128)
def page_constants(fmt: KVFormat, page_size: int) -> dict[str, Any]:
    """The page as compile-time constants of every kernel: sizes, bits, and the offsets of the planes."""
    planes = PageLayout.of(fmt, page_size).planes

    def offset(name: str) -> int:
        return planes[name].offset if name in planes else 0

    def codes(side: Side) -> tuple[int, int]:
        bits = fmt.side(side).parts[0].bits
        return (offset(f"{side}.codes0.{2 if bits == 3 else bits}"), offset(f"{side}.codes0.1"))

    return {
        "D": fmt.head_dim,
        "P": page_size,
        "SP": steps_padded(fmt.head_dim),
        "PACK": key_pack(fmt.head_dim),
        "DV": triton.next_power_of_2(fmt.head_dim),
        "KB": fmt.k.parts[0].bits,
        "VB": fmt.v.parts[0].bits,
        "K_CODES": codes("k")[0],
        "K_SIGNS": codes("k")[1],
        "V_CODES": codes("v")[0],
        "V_SIGNS": codes("v")[1],
        "K_SCALE": offset("k.scale0"),
        "V_SCALE": offset("v.scale0"),
        "OUTLIERS": fmt.outliers,
        "OUT_CODES": offset("k.outliers"),
        "OUT_SCALE": offset("k.outlier_scale"),
    }


def check_pages(pages: Tensor) -> None:
    """Raises ValueError unless pages are aligned as the kernels' 16-byte loads need."""
    if pages.data_ptr() % 16 or pages.stride(0) % 16:
        raise ValueError(
            f"pages must start at a multiple of 16 bytes, got address {pages.data_ptr()} and page stride {pages.stride(0)}"
        )


def check_rings(name: str, rows: Tensor) -> None:
    """Raises ValueError unless rows of raw keys and values are aligned, so that there is one kernel for all of them."""
    if rows.data_ptr() % 16:
        raise ValueError(f"{name} must start at a multiple of 16 bytes, got address {rows.data_ptr():#x}")


def scratch_pages(
    fmt: KVFormat, page_size: int, num_kv_heads: int, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """One page and outlier channels to warm kernels up with."""
    pages = torch.zeros(1, num_kv_heads, fmt.page_bytes(page_size), dtype=torch.uint8, device=device)
    channels = torch.arange(fmt.outliers, device=device).repeat(num_kv_heads, 1) if fmt.outliers else None
    return pages, channels


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """Copies of those that are not contiguous: the kernels read lengths, slots, channels and sinks one after another."""
    return [None if x is None else x.contiguous() for x in tensors]


def rows_contiguous(x: Tensor) -> Tensor:
    """x, copied if its last axis is not contiguous; fp64 becomes fp32, in which the kernels compute."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _in_run(m, lane, lanes: tl.constexpr, W: tl.constexpr):
    """Word m of a lane among runs of 4, ..., 4, 2, 1 words; `lanes` share each run."""
    FULL: tl.constexpr = W // 4 * 4
    address = lanes * (m // 4 * 4) + lane * 4 + m % 4
    if W % 4 >= 2:
        address = tl.where(m >= FULL, lanes * FULL + lane * 2 + (m - FULL), address)
    if W % 2 == 1:
        LAST: tl.constexpr = W - 1
        address = tl.where(m >= LAST, lanes * LAST + lane + (m - LAST), address)
    return address


@triton.jit
def key_word(slot, u, WIDTH: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Index in its plane of the word that holds unit u of a slot, and the bit at which the unit starts in it.

    Width 8: the first of the unit's two words (its only one in a last half step). A last half step's unit belongs to two
    slots: 16 more bits for the odd one at widths 2 and 1; see `whole_unit` for width 4.
    """
    S: tl.constexpr = D // 32
    HALF: tl.constexpr = D % 32 // 16
    PAIR: tl.constexpr = 2 * S + HALF
    t, step = u // SP, u % SP
    octet = slot // 8
    odd = slot // 2 % 2
    lane = slot % 2 * 4 + t
    base = slot % 8 // 4 * PAIR
    unit = base + odd * S + step
    if HALF == 1:
        unit = tl.where(step == S, base + 2 * S, unit)
    if WIDTH == 4 and (S == 2 or S % 4 == 0) and HALF == 0:
        # The general form, with slot and place apart, so that the compiler sees adjacent words and loads them together.
        row = octet * D + 8 * base + slot % 2 * 16
        if S == 2:
            address = row + 2 * odd + (u // 2 * 4 + u % 2)
        else:
            address = row + 8 * S * odd + (u // SP * 4 + u // 4 % (SP // 4) * 32 + u % 4)
        shift = address * 0
    elif WIDTH == 8:
        m = 2 * unit
        if HALF == 1:
            m = tl.where(step == S, m + odd, m)
        address = octet * (2 * D) + _in_run(m, lane, 8, D // 4)
        shift = m * 0
    else:
        PER_WORD: tl.constexpr = 4 // WIDTH
        W: tl.constexpr = D // 8 // PER_WORD
        word = unit // PER_WORD
        place = unit % PER_WORD
        address = octet * (8 * W) + _in_run(word, lane, 8, W)
        if W * PER_WORD * 8 < D:
            shared = word == W
            address = tl.where(shared, P * W + octet // 2 * 8 + lane, address)
            place = tl.where(shared, place + 2 * (octet % 2), place)
        shift = place * WIDTH
        if HALF == 1 and WIDTH < 4:
            shift = tl.where(step == S, shift + 16 * odd, shift)
    return address, shift


@triton.jit
def value_word(octet, column, WIDTH: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Index in its plane of the word that holds a column's unit (8 slots of a channel), and the unit's first bit in it."""
    BAND: tl.constexpr = (P if P < 32 else 32) // 8
    FULL: tl.constexpr = D // 32 * 32
    if WIDTH == 4:
        address = octet // BAND * (BAND * D) + octet % BAND * 4
        address += column // 32 * (BAND * 32) + column // 4 % 8 * (BAND * 4) + column % 4
        if D % 32 == 16:
            rest = column - FULL
            last = octet // BAND * (BAND * D) + octet % BAND * 2 + (BAND * FULL + rest // 2 * (BAND * 2) + column % 2)
            address = tl.where(column >= FULL, last, address)
        shift = address * 0
    else:
        lane = column // 4 % 8
        unit = column // 32 * 4 + column % 4
        if D % 32 == 16:
            rest = column - FULL
            lane = tl.where(column >= FULL, rest // 2 % 8, lane)
            unit = tl.where(column >= FULL, FULL // 8 + rest % 2, unit)
        PER_WORD: tl.constexpr = 4 // WIDTH
        W: tl.constexpr = D // 8 // PER_WORD
        word = unit // PER_WORD
        place = unit % PER_WORD
        address = octet // BAND * (BAND * 8 * W) + _in_run(word, lane * BAND + octet % BAND, 8 * BAND, W)
        if W * PER_WORD * 8 < D:
            shared = word == W
            address = tl.where(shared, P * W + octet // 2 * 8 + lane, address)
            place = tl.where(shared, place + 2 * (octet % 2), place)
        shift = place * WIDTH
    return address, shift


@triton.jit
def words_at(base):
    """Byte pointers as pointers to 32-bit words."""
    return base.to(tl.pointer_type(tl.uint32))


@triton.jit
def load_scales(plane, slot, mask):
    """fp16 scales of slots, in fp32; 0 where masked. `plane` points to each slot's plane."""
    return tl.load(plane.to(tl.pointer_type(tl.float16)) + slot, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_key_units(codes, signs, slot, u, mask, BITS: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Units of keys as one or two words that `level` reads, element e's code at the same bits whatever the slot.

    Args:
        codes, signs: byte pointers to the planes of each slot's page.
        slot, u: what to load; all arguments broadcast to the tile's shape.
        mask: of the tile, or None; what it leaves out is undefined, but `level` makes a finite number of any word.
    """
    address, shift = key_word(slot, u, 2 if BITS == 3 else BITS, SP, D, P)
    word = tl.load(words_at(codes) + address, mask=mask)
    second = word
    if BITS == 8:
        if D > 16:
            second = tl.load(words_at(codes) + address + 1, mask=mask)
    elif BITS == 4:
        if D % 32 == 16:
            odd_half = (u % SP == D // 32) & (slot // 2 % 2 == 1)
            word = tl.where(odd_half, ((word >> 16) & 0x7777) | ((word << 4) & 0x80808080), word)
    else:
        word = word >> shift.to(tl.uint32)
        if BITS == 3:
            address, shift = key_word(slot, u, 1, SP, D, P)
            sign = tl.load(words_at(signs) + address, mask=mask) >> shift.to(tl.uint32)
            word = (word & 0x33333333) | ((sign & 0x11111111) << 2)
    return word, second


@triton.jit
def load_value_units(codes, signs, octet, column, mask, BITS: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Units of values, as `load_key_units`."""
    address, shift = value_word(octet, column, 2 if BITS == 3 else BITS, D, P)
    word = tl.load(words_at(codes) + address, mask=mask)
    if BITS < 4:
        word = word >> shift.to(tl.uint32)
        if BITS == 3:
            address, shift = value_word(octet, column, 1, D, P)
            sign = tl.load(words_at(signs) + address, mask=mask) >> shift.to(tl.uint32)
            word = (word & 0x33333333) | ((sign & 0x11111111) << 2)
    return word


@triton.jit
def _shift(word, BY: tl.constexpr):
    """word shifted right by BY bits, left for a negative BY."""
    if BY < 0:
        shifted = word << -BY
    else:
        shifted = word >> BY
    return shifted


@triton.jit
def level(word, second, e: tl.constexpr, BITS: tl.constexpr):
    """Element e of a unit in steps of `UNITS[BITS]`, fp32, at most 8 significant bits."""
    if BITS == 8:
        byte = _shift(second if e >= 4 else word, 8 * (e % 4) - 24)
        result = (byte.to(tl.int32, bitcast=True) >> 24).to(tl.float32)
    elif BITS == 4:
        index = _shift(word, 4 * e - 3) & 0x38
        table = tl.full(word.shape, TABLE4, tl.uint64)
        magnitude = ((table >> index.to(tl.uint64)).to(tl.uint32) & 0xFF).to(tl.int32).to(tl.float32)
        sign = (word << (24 - 8 * e if e < 4 else 60 - 8 * e)) & 0x80000000
        result = (magnitude.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    elif BITS == 3:
        index = _shift(word, 4 * e - 3) & 0x38
        table = tl.full(word.shape, TABLE3, tl.uint64)
        result = ((table >> index.to(tl.uint64)).to(tl.uint32) & 0xFF).to(tl.int32).to(tl.float32) - 127.5
    else:
        index = _shift(word, 4 * e - 3) & 0x18
        table = tl.full(word.shape, TABLE2, tl.uint32)
        result = ((table >> index) & 0xFF).to(tl.int32).to(tl.float32) - 127.5
    return result


@triton.jit
def key_block(word, second, e: tl.constexpr, PACK: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """Elements e..e+PACK-1 of a tile of keys as a product's operand: [slots, units] words -> [slots, units * PACK] DOT.

    Column `unit * PACK + i` is element e + i; PACK is 1, 2 or 4.
    """
    block = level(word, second, e, BITS).to(DOT)
    if PACK >= 2:
        other = level(word, second, e + PACK // 2, BITS).to(DOT)
        block = tl.join(block, other)
    if PACK == 4:
        first = level(word, second, e + 1, BITS).to(DOT)
        other = level(word, second, e + 3, BITS).to(DOT)
        block = tl.join(block, tl.join(first, other))  # element e + 2 i + j at [..., i, j]
    return tl.reshape(block, (word.shape[0], word.shape[1] * PACK))


@triton.jit
def exact_dot(x, matrix, acc, DOT: tl.constexpr):
    """acc + x @ matrix for fp32 x and a matrix that is exact in bfloat16, as three products: x to its last bit."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    acc = tl.dot(low.to(DOT), matrix, acc)
    acc = tl.dot(middle.to(DOT), matrix, acc)
    return tl.dot(high.to(DOT), matrix, acc)
