"""The page: where each bit of each (slot, channel) lies. `docs/page.md` draws it; this is the only code that knows.

A page holds `page_size` tokens of one KV head as contiguous planes, every plane a multiple of 16 bytes:

    [K codes | V codes | K scales | V scales | K outliers]

Codes lie in 32-bit little-endian words in the order in which `mma.sync.m16n8k32` wants its B operand. A *unit* is 8 codes:
8 channels of one slot for keys, 8 consecutive slots of one channel for values. Eight *lanes* share the units of 8 slots (an
*octet*), so a lane owns head_dim / 8 units per octet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from kvturbo.config import PAGE_SIZES, SIDES, KVFormat, Side
from kvturbo.quantizer import Packed

Width = Literal[1, 2, 4, 8]
OCTET = 8
LANES = 8
BAND = 32


@dataclass(frozen=True)
class Plane:
    """A contiguous run of bytes of a page.

    Attributes:
        name: what it holds, such as `k.codes0.2` (key, first part, 2-bit plane) or `v.scale0`.
        offset, nbytes: where it lies in the page.
        width: bits per channel in this plane, 16 for scales.
        channels: channels per slot, 1 for scales.
        side: which words it has (see `word_order`).
    """

    name: str
    offset: int
    nbytes: int
    width: int
    channels: int
    side: Side

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def bit_positions(width: Width) -> np.ndarray:
    """Bit j of element e of a word lies at bit `[e, j]`: [32 // width, width] int64, elements in order of `word_order`.

    Width 4: element i has its magnitude in bits 4i..4i+2; signs of elements 0-3 are bits 7, 15, 23, 31 and of 4-7 bits 3, 11,
    19, 27. Width 2: element i of unit u at bits 4i + 2u. Width 1: element i of unit u at bit 4i + u. Width 8: bytes.
    """
    if width == 4:
        signs = [8 * i + 7 for i in range(4)] + [8 * i + 3 for i in range(4)]
        return np.array([[4 * i, 4 * i + 1, 4 * i + 2, signs[i]] for i in range(8)])
    if width == 8:
        return np.arange(32).reshape(4, 8)
    units = 4 // width
    return np.array([[4 * i + width * u + j for j in range(width)] for u in range(units) for i in range(8)])


def _units(side: Side, channels: int, page_size: int) -> tuple[np.ndarray, ...]:
    """Octet, lane, unit and element of every (slot, channel): four arrays [page_size, channels]."""
    slot, channel = np.meshgrid(np.arange(page_size), np.arange(channels), indexing="ij")
    octet, row = slot // OCTET, slot % OCTET
    if side == "v":
        return octet, channel % LANES, channel // LANES, row
    pair, parity, odd = (
        row // 4,
        row % 2,
        row // 2 % 2,
    )  # slots s and s + 2 of a pair share a word where channels run out
    steps, tail = channels // 32, channels % 32 == 16  # k-steps of 32 channels, and whether 16 more remain
    step, rest = channel // 32, channel % 32
    lane = parity * 4 + rest % 16 // 4
    per_pair = 2 * steps + tail
    unit = pair * per_pair + odd * steps + step
    element = rest // 16 * 4 + rest % 4
    in_tail = step == steps
    unit = np.where(in_tail, pair * per_pair + 2 * steps, unit)
    element = np.where(in_tail, odd * 4 + rest % 4, element)
    return octet, lane, unit, element


def _runs(words: int) -> list[tuple[int, int]]:
    """A lane's words in runs that one load takes: (first word, length), lengths 4, ..., 4, then 2, then 1."""
    runs, start = [], 0
    for length in [4] * (words // 4) + [2] * (words % 4 // 2) + [1] * (words % 2):
        runs.append((start, length))
        start += length
    return runs


def _word_addresses(side: Side, words: int, page_size: int) -> np.ndarray:
    """Index in the plane of a lane's m-th word: [octets, lanes, words] int64.

    Keys: [octet][run][lane][word of run]. Values: [band][run][lane][octet of band][word of run], a band being at most 32 slots.
    """
    octets = page_size // OCTET
    octet, lane, _ = np.meshgrid(np.arange(octets), np.arange(LANES), np.arange(1), indexing="ij")
    per_band = min(page_size, BAND) // OCTET
    columns = []
    for start, length in _runs(words):
        m = np.arange(length)
        if side == "k":
            address = octet * LANES * words + LANES * start + lane * length + m
        else:
            band, in_band = octet // per_band, octet % per_band
            address = (
                band * per_band * LANES * words + per_band * LANES * start + (lane * per_band + in_band) * length + m
            )
        columns.append(address)
    return np.concatenate(columns, -1) if columns else np.zeros((octets, LANES, 0), dtype=np.int64)


def word_order(side: Side, width: Width, channels: int, page_size: int) -> np.ndarray:
    """Where each (slot, channel) goes: word * (32 // width) + element of the word, [page_size, channels] int64, a bijection.

    A 1-bit word holds four units; where a lane's units are not a multiple of four, the words of their rest come last in the
    plane and are shared by two octets, the even one in units 0 and 1, the odd one in units 2 and 3.
    """
    octet, lane, unit, element = _units(side, channels, page_size)
    if width == 8:
        word, place = 2 * unit + element // 4, element % 4
        return _word_addresses(side, channels // 4, page_size)[octet, lane, word] * 4 + place
    per_word = 4 // width
    full = channels // 8 // per_word
    word, place = unit // per_word, unit % per_word
    shared = word == full
    addresses = _word_addresses(side, full, page_size)
    tail = page_size // OCTET * LANES * full + octet // 2 * LANES + lane
    if full:
        tail = np.where(shared, tail, addresses[octet, lane, np.minimum(word, full - 1)])
    place = np.where(shared, place + 2 * (octet % 2), place)
    return tail * (32 // width) + place * 8 + element


@lru_cache(maxsize=256)
def _order(side: Side, width: Width, channels: int, page_size: int, device: str) -> tuple[Tensor, Tensor]:
    order = torch.from_numpy(word_order(side, width, channels, page_size).reshape(-1))
    return order.to(device), torch.argsort(order).to(device)


@lru_cache(maxsize=16)
def _bits_of_code(width: Width, device: str) -> tuple[Tensor, ...]:
    """Per bit of a code, where it lies in a word for each element: `width` tensors [32 // width] int32."""
    return torch.from_numpy(bit_positions(width)).to(device, torch.int32).unbind(1)


def _write_words(codes: Tensor, side: Side, width: Width) -> Tensor:
    """Codes [..., page_size, channels] uint8, below 2^width, to a plane's bytes [..., nbytes] uint8."""
    page_size, channels = codes.shape[-2:]
    _, inverse = _order(side, width, channels, page_size, str(codes.device))
    elements = _permute(codes.flatten(-2), inverse)
    if width == 8:
        return elements
    elements = elements.unflatten(-1, (-1, 32 // width)).int()
    words = torch.zeros(elements.shape[:-1], dtype=torch.int32, device=codes.device)
    for j, positions in enumerate(_bits_of_code(width, str(codes.device))):
        words |= ((elements >> j & 1) << positions).sum(-1, dtype=torch.int32)
    return words.view(torch.uint8)


def _read_words(plane: Tensor, side: Side, width: Width, channels: int, page_size: int) -> Tensor:
    """A plane's bytes [..., nbytes] uint8 to codes [..., page_size, channels] uint8."""
    order, _ = _order(side, width, channels, page_size, str(plane.device))
    elements = plane if width == 8 else _unpack(plane.contiguous().view(torch.int32).long(), width)
    return _permute(elements, order).unflatten(-1, (page_size, channels))


def _unpack(words: Tensor, width: Width) -> Tensor:
    """The elements of words [..., n] int64 in order, [..., n * 32 // width] uint8. `bit_positions` in eight elements at a time."""
    if width == 4:
        signs = words >> 7 & 0x01010101 | (words >> 3 & 0x01010101) << 32
        units = [_spread(words & 0x77777777) | signs << 3]
    else:
        nibbles = 0x33333333 if width == 2 else 0x11111111
        units = [_spread(words >> width * u & nibbles) for u in range(4 // width)]
    return torch.stack(units, -1).view(torch.uint8).flatten(-2)


def _spread(x: Tensor) -> Tensor:
    """Eight nibbles, in the low half of an int64, to its eight bytes."""
    x = (x | x << 16) & 0x0000FFFF0000FFFF
    x = (x | x << 8) & 0x00FF00FF00FF00FF
    return (x | x << 4) & 0x0F0F0F0F0F0F0F0F


def _permute(x: Tensor, order: Tensor) -> Tensor:
    # A gather takes a third of the time of x[..., order].
    return x.gather(-1, order.expand(*x.shape[:-1], -1))


def _code_planes(bits: int) -> tuple[tuple[Width, int], ...]:
    """Planes of b-bit codes as (width, lowest bit of the code): 3 bits are 2-bit magnitudes and a plane of signs."""
    return ((2, 0), (1, 2)) if bits == 3 else ((bits, 0),)  # type: ignore[return-value]


class PageLayout:
    """The planes of a page, and the way between pages and `Packed`. Get one with `PageLayout.of`.

    Attributes:
        fmt: the format.
        page_size: tokens per page, 16, 32 or 64.
        page_bytes: bytes of a page.
        planes: every plane by name, in the order in which they lie.
    """

    def __init__(self, fmt: KVFormat, page_size: int) -> None:
        self.fmt, self.page_size, self.page_bytes = fmt, page_size, fmt.page_bytes(page_size)
        self.planes: dict[str, Plane] = {}
        for side in SIDES:
            self._add_codes(side)
        for side in SIDES:
            for i in range(len(fmt.side(side).parts)):
                self._add(f"{side}.scale{i}", side, 16, 1)
            if fmt.side(side).qjl:
                self._add(f"{side}.residual_norm", side, 16, 1)
        if fmt.outliers:
            self._add("k.outliers", "k", 8, fmt.outliers)
            self._add("k.outlier_scale", "k", 16, 1)
        assert self._end == self.page_bytes, (self._end, self.page_bytes)

    @staticmethod
    @lru_cache(maxsize=128)
    def of(fmt: KVFormat, page_size: int) -> PageLayout:
        """The layout of a format's pages.

        Raises:
            ValueError: page_size is not 16, 32 or 64.
        """
        return PageLayout(fmt, page_size)

    @staticmethod
    def page_size_of(fmt: KVFormat, page_bytes: int) -> int:
        """Tokens per page, from its bytes.

        Raises:
            ValueError: no page size gives that many bytes.
        """
        page_size = page_bytes // fmt.bytes_per_token
        if page_size * fmt.bytes_per_token != page_bytes or page_size not in PAGE_SIZES:
            sizes = ", ".join(f"{fmt.page_bytes(size)} (page_size {size})" for size in PAGE_SIZES)
            raise ValueError(
                f"pages of format {fmt.name!r}, head_dim {fmt.head_dim}, have {sizes} bytes per head, got {page_bytes}"
            )
        return page_size

    @property
    def _end(self) -> int:
        return next(reversed(self.planes.values())).end if self.planes else 0

    def _add(self, name: str, side: Side, width: int, channels: int) -> None:
        nbytes = self.page_size * channels * width // 8
        assert nbytes % 16 == 0, name
        self.planes[name] = Plane(name, self._end, nbytes, width, channels, side)

    def _add_codes(self, side: Side) -> None:
        form = self.fmt.side(side)
        for i, part in enumerate(form.parts):
            for width, _ in _code_planes(part.bits):
                self._add(f"{side}.codes{i}.{width}", side, width, part.channels)
        if form.qjl:
            self._add(f"{side}.residual_signs", side, 1, form.head_dim)

    def write(self, pages: Tensor, side: Side, packed: Packed) -> None:
        """Writes one side of whole pages in place.

        Args:
            pages: [..., page_bytes] uint8, contiguous in its last axis.
            side: "k" or "v".
            packed: vectors of shape [..., page_size].
        """
        for name, codes, width in self._fields(side, packed):
            plane = self.planes[name]
            if width == 16:
                data = codes.contiguous().view(torch.uint8)
            else:
                data = _write_words(codes, side, width)  # type: ignore[arg-type]
            pages[..., plane.offset : plane.end] = data

    def read(self, pages: Tensor, side: Side) -> Packed:
        """Reads one side of whole pages: pages [..., page_bytes] uint8 -> vectors of shape [..., page_size]."""
        form = self.fmt.side(side)
        codes = []
        for i, part in enumerate(form.parts):
            shifted = [self._codes(pages, f"{side}.codes{i}.{width}") << low for width, low in _code_planes(part.bits)]
            codes.append(shifted[0] if len(shifted) == 1 else shifted[0] | shifted[1])
        scales = torch.stack([self._scale(pages, f"{side}.scale{i}") for i in range(len(form.parts))], -1)
        packed = Packed(codes[0] if len(codes) == 1 else torch.cat(codes, -1), scales)
        if form.outliers:
            packed.outliers = self._codes(pages, "k.outliers")
            packed.outlier_scale = self._scale(pages, "k.outlier_scale")
        if form.qjl:
            packed.residual_signs = self._codes(pages, f"{side}.residual_signs")
            packed.residual_norm = self._scale(pages, f"{side}.residual_norm")
        return packed

    def _fields(self, side: Side, packed: Packed) -> list[tuple[str, Tensor, int]]:
        form = self.fmt.side(side)
        fields: list[tuple[str, Tensor | None, int]] = []
        splits = packed.codes.split([part.channels for part in form.parts], -1)
        for i, (part, codes) in enumerate(zip(form.parts, splits, strict=True)):
            for width, low in _code_planes(part.bits):
                fields.append((f"{side}.codes{i}.{width}", codes >> low & (2**width - 1), width))
            fields.append((f"{side}.scale{i}", packed.scales[..., i], 16))
        fields += [
            (f"{side}.residual_signs", packed.residual_signs, 1),
            (f"{side}.residual_norm", packed.residual_norm, 16),
        ]
        fields += [(f"{side}.outliers", packed.outliers, 8), (f"{side}.outlier_scale", packed.outlier_scale, 16)]
        return [(name, data, width) for name, data, width in fields if data is not None]

    def _codes(self, pages: Tensor, name: str) -> Tensor:
        plane = self.planes[name]
        data = pages[..., plane.offset : plane.end]
        return _read_words(data, plane.side, plane.width, plane.channels, self.page_size)  # type: ignore[arg-type]

    def _scale(self, pages: Tensor, name: str) -> Tensor:
        plane = self.planes[name]
        return pages[..., plane.offset : plane.end].contiguous().view(torch.float16)
