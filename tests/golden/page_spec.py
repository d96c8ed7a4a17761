"""The page of docs/page.md once more: plain loops over integers, written from that document; nothing of the package is used."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
PLAIN = {"k4v4": (4, 4), "k4v3": (4, 3), "k4v2": (4, 2), "k3v3": (3, 3), "k3v2": (3, 2), "k2v2": (2, 2)}


class Plane(NamedTuple):
    """A plane: which field it holds ("k.codes", ...), part of the side, lowest bit of the code, width, channels."""

    field: str
    part: int
    low: int
    width: int
    channels: int

    @property
    def side(self) -> str:
        return self.field[0]


def formats(head_dim: int) -> list[str]:
    """Every format of a head_dim, without aliases."""
    names = [*PLAIN, "lite4", "k8v4", "qjl4", "qjl3"]
    names += ["tq3.5", "tq2.5"] if head_dim in (64, 128, 256) else []
    names += [name + "-o16" for name in PLAIN]
    return names + ([name + "-o32" for name in PLAIN] if head_dim >= 128 else [])


def parts(name: str, side: str, head_dim: int) -> list[tuple[int, int]]:
    """(channels, bits of a code) of every part of a side."""
    if name in ("tq3.5", "tq2.5"):
        bits = 3 if name == "tq3.5" else 2
        return [(head_dim // 4, bits + 1), (head_dim - head_dim // 4, bits)]
    special = {"lite4": (4, 4), "k8v4": (8, 4), "qjl4": (3, 4), "qjl3": (2, 4)}
    k_bits, v_bits = {**PLAIN, **special}[name.split("-")[0]]
    return [(head_dim, k_bits if side == "k" else v_bits)]


def planes(name: str, head_dim: int) -> list[Plane]:
    """The planes of a page in order (section 1)."""

    def code_planes(side: str) -> list[Plane]:
        found = []
        for part, (channels, bits) in enumerate(parts(name, side, head_dim)):
            for width, low in {4: [(4, 0)], 3: [(2, 0), (1, 2)], 2: [(2, 0)], 8: [(8, 0)]}[bits]:
                found.append(Plane(side + ".codes", part, low, width, channels))
        return found

    def scale_planes(side: str) -> list[Plane]:
        return [Plane(side + ".scales", part, 0, 16, 1) for part in range(len(parts(name, side, head_dim)))]

    qjl = name.startswith("qjl")
    found = code_planes("k") + ([Plane("k.residual_signs", 0, 0, 1, head_dim)] if qjl else [])
    found += code_planes("v") + scale_planes("k")
    found += [Plane("k.residual_norm", 0, 0, 16, 1)] if qjl else []
    found += scale_planes("v")
    if "-o" in name:
        found += [Plane("k.outliers", 0, 0, 8, int(name[-2:])), Plane("k.outlier_scale", 0, 0, 16, 1)]
    return found


def word_of(side: str, width: int, channels: int, page_size: int, slot: int, channel: int) -> tuple[int, int, int]:
    """Index of the word in the plane, place and element of (slot, channel) (sections 2, 4 and 5)."""
    octet, r = slot // 8, slot % 8
    units = channels // 8
    if side == "v":
        lane, unit, element = channel % 8, channel // 8, r
    else:
        steps, p, h, x = channels // 32, r // 4, (r // 2) % 2, channel % 32
        lane = 4 * (r % 2) + (x % 16) // 4
        if channel // 32 < steps:
            unit, element = p * (units // 2) + h * steps + channel // 32, 4 * (x // 16) + x % 4
        else:
            unit, element = p * (units // 2) + 2 * steps, 4 * h + x % 4
    if width == 8:
        whole, word, place = channels // 4, 2 * unit + element // 4, 0
    else:
        n = 4 // width
        whole, word, place = units // n, unit // n, unit % n
    if word == whole:
        index = page_size // 8 * 8 * whole + octet // 2 * 8 + lane
        place += 2 * (octet % 2)
    else:
        index = _index(side, whole, word, page_size, octet, lane)
    return index, place, element


def _index(side: str, whole: int, word: int, page_size: int, octet: int, lane: int) -> int:
    fours = whole - whole % 4
    if word < fours:
        first, length = word - word % 4, 4
    elif whole % 4 >= 2 and word < fours + 2:
        first, length = fours, 2
    else:
        first, length = whole - 1, 1
    if side == "k":
        return octet * 8 * whole + 8 * first + lane * length + word - first
    per_band = 2 if page_size == 16 else 4
    band, k = octet // per_band, octet % per_band
    return band * per_band * 8 * whole + per_band * 8 * first + (lane * per_band + k) * length + word - first


def _bit(width: int, i: int, place: int, j: int) -> int:
    """Section 3."""
    if width == 4 and j == 3:
        return 8 * i + 7 if i < 4 else 8 * (i - 4) + 3
    return {4: 4 * i + j, 2: 4 * i + 2 * place + j, 1: 4 * i + place, 8: 8 * (i % 4) + j}[width]


def bit_offset(side: str, width: int, channels: int, page_size: int, slot: int, channel: int, j: int) -> int:
    """Bit of the plane at which bit j of the code of (slot, channel) lies."""
    index, place, element = word_of(side, width, channels, page_size, slot, channel)
    return 32 * index + _bit(width, element, place, j)


@cache
def bit_offsets(side: str, width: int, channels: int, page_size: int) -> tuple[int, ...]:
    """`bit_offset` of every (slot, channel, j), j fastest; scales (width 16) are arrays of fp16."""
    if width == 16:
        return tuple(range(16 * page_size))
    offsets = []
    for slot in range(page_size):
        for channel in range(channels):
            index, place, element = word_of(side, width, channels, page_size, slot, channel)
            offsets += [32 * index + _bit(width, element, place, j) for j in range(width)]
    return tuple(offsets)
