"""Contents of golden pages, from a documented integer generator: no random library and no floating-point rounding.

Word n of the generator is SplitMix64's output function of (n + 1) * 0x9E3779B97F4A7C15 (mod 2^64). Field number f (its place in
FIELDS), slot s, channel c take word (f * 64 + s) * 256 + c. A code of b bits is the word mod 2^b; a scale is the fp16 number
(1 + word mod 1023) / 64, the channel being the part. Channels count over the whole side, part 1 after part 0.
"""

from __future__ import annotations

import struct
from functools import cache

from golden import page_spec

MASK = (1 << 64) - 1
FIELDS = (
    "k.codes",
    "v.codes",
    "k.scales",
    "v.scales",
    "k.residual_signs",
    "k.residual_norm",
    "k.outliers",
    "k.outlier_scale",
)


def mix(z: int) -> int:
    """SplitMix64's output function."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


@cache
def field_word(field: str, slot: int, channel: int) -> int:
    n = (FIELDS.index(field) * 64 + slot) * 256 + channel
    return mix((n + 1) * 0x9E3779B97F4A7C15 & MASK)


def code(field: str, bits: int, slot: int, channel: int) -> int:
    return field_word(field, slot, channel) % (1 << bits)


def scale(field: str, slot: int, part: int) -> float:
    return (1 + field_word(field, slot, part) % 1023) / 64


def code_bits(name: str, field: str, head_dim: int) -> list[int]:
    """Bits of the code of every channel of a field."""
    if field.endswith(".codes"):
        return [bits for channels, bits in page_spec.parts(name, field[0], head_dim) for _ in range(channels)]
    return [8] * int(name[-2:]) if field == "k.outliers" else [1] * head_dim


def page(name: str, head_dim: int, page_size: int) -> bytes:
    """The golden page of a format, made bit by bit."""
    whole = b""
    for plane in page_spec.planes(name, head_dim):
        if plane.width == 16:
            whole += b"".join(struct.pack("<e", scale(plane.field, s, plane.part)) for s in range(page_size))
            continue
        first = sum(channels for channels, _ in page_spec.parts(name, plane.side, head_dim)[: plane.part])
        bits = code_bits(name, plane.field, head_dim)[first : first + plane.channels]
        codes = [
            code(plane.field, bits[c], s, first + c) >> plane.low
            for s in range(page_size)
            for c in range(plane.channels)
        ]
        whole += _pack(codes, plane, page_size)
    return whole


def _pack(codes: list[int], plane: page_spec.Plane, page_size: int) -> bytes:
    packed = bytearray(len(codes) * plane.width // 8)
    offsets = iter(page_spec.bit_offsets(plane.side, plane.width, plane.channels, page_size))
    for code_ in codes:
        for j in range(plane.width):
            offset = next(offsets)
            packed[offset // 8] |= (code_ >> j & 1) << offset % 8
    return bytes(packed)
