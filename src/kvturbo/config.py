"""Formats: what is stored per vector, and how many bytes that takes.

A format is data. `PRESETS` lists every one of them; sizes are properties, so that nothing else computes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
PAGE_SIZES = (16, 32, 64)
PAGE_SIZE = 32
"""The default: decode is 1 to 4 % faster than with pages of 16 (docs/kernel-notes.md)."""
SCALE_BYTES = 2

Side = Literal["k", "v"]
SIDES: tuple[Side, Side] = ("k", "v")
ScaleRule = Literal["unbiased", "rms", "amax"]
"""How the stored scale follows from a vector y and its levels c (see `quantizer`)."""


@dataclass(frozen=True)
class Part:
    """A run of channels that is rotated, scaled and quantised as one vector.

    Attributes:
        channels: number of channels.
        bits: 2, 3 or 4 (Lloyd-Max codes) or 8 (symmetric int8).
        rule: the scale rule.
        search: whether the encoder searches the scale.
    """

    channels: int
    bits: int
    rule: ScaleRule
    search: bool

    @property
    def nbytes(self) -> int:
        """Bytes of one vector's codes and scale."""
        return self.channels * self.bits // 8 + SCALE_BYTES


@dataclass(frozen=True)
class SideFormat:
    """What is stored for one key or one value.

    Attributes:
        parts: one part of all channels, or two (`tq`: the first quarter of the channels in storage order has one more bit).
        rotate: whether each part is rotated before it is quantised.
        outliers: number of channels that are stored as int8 as well, with a scale of their own.
        qjl: whether one sign bit per channel and the residual's norm are stored (Quantized Johnson-Lindenstrauss).
    """

    parts: tuple[Part, ...]
    rotate: bool = True
    outliers: int = 0
    qjl: bool = False

    @property
    def head_dim(self) -> int:
        return sum(part.channels for part in self.parts)

    @property
    def nbytes(self) -> int:
        """Bytes of one vector, everything counted."""
        outliers = self.outliers + SCALE_BYTES if self.outliers else 0
        qjl = self.head_dim // 8 + SCALE_BYTES if self.qjl else 0
        return sum(part.nbytes for part in self.parts) + outliers + qjl


@dataclass(frozen=True)
class _Preset:
    """A row of `PRESETS`: bits of the key and the value, and what is special about them."""

    k_bits: int
    v_bits: int
    kind: Literal["plain", "lite", "int8_key", "split", "qjl"] = "plain"


PRESETS: dict[str, _Preset] = {
    "k4v4": _Preset(4, 4),
    "k4v3": _Preset(4, 3),
    "k4v2": _Preset(4, 2),
    "k3v3": _Preset(3, 3),
    "k3v2": _Preset(3, 2),
    "k2v2": _Preset(2, 2),
    "k8v4": _Preset(8, 4, "int8_key"),
    "lite4": _Preset(4, 4, "lite"),
    "tq3.5": _Preset(3, 3, "split"),
    "tq2.5": _Preset(2, 2, "split"),
    "qjl4": _Preset(3, 4, "qjl"),
    "qjl3": _Preset(2, 4, "qjl"),
}
ALIASES = {"turboquant": "k4v4"}
OUTLIER_COUNTS = {16: 64, 32: 128}
"""Outlier channels on offer, and the smallest head_dim each is offered for."""
SPLIT_HEAD_DIMS = (64, 128, 256)


def format_names(head_dim: int) -> list[str]:
    """All names that `KVFormat.from_name` takes for a head_dim, the default first."""
    names = [name for name, preset in PRESETS.items() if preset.kind != "split" or head_dim in SPLIT_HEAD_DIMS]
    plain = [name for name in names if PRESETS[name].kind == "plain"]
    counts = [count for count, smallest in OUTLIER_COUNTS.items() if head_dim >= smallest]
    return names + [f"{name}-o{count}" for name in plain for count in counts] + list(ALIASES)


@dataclass(frozen=True)
class KVFormat:
    """What is stored per token and KV head. Build it with `KVFormat.from_name`.

    Attributes:
        name: the format's name, such as `k4v4` or `k4v4-o16`.
        head_dim: channels of a key or value vector, one of `HEAD_DIMS`.
        k, v: the key's and the value's side.
        seed: seed of the rotation's signs (and of the QJL matrix), one for a whole model.
    """

    name: str
    head_dim: int
    k: SideFormat
    v: SideFormat
    seed: int = 0

    def __hash__(self) -> int:  # formats are keys in every call of an operation
        return hash((self.name, self.head_dim, self.seed))

    @classmethod
    def from_name(cls, name: str, head_dim: int, *, seed: int = 0) -> KVFormat:
        """The format called `name` for vectors of `head_dim` channels.

        Raises:
            ValueError: head_dim is not supported, or there is no such format for it; the message lists what is.
        """
        check_head_dim(head_dim)
        if name not in format_names(head_dim):
            raise ValueError(
                f"unknown format {name!r} for head_dim {head_dim}; valid formats: {', '.join(format_names(head_dim))}"
            )
        name = ALIASES.get(name, name)
        base, _, outliers = name.partition("-o")
        preset = PRESETS[base]
        k = _side(preset, "k", head_dim, int(outliers or 0))
        v = _side(preset, "v", head_dim, 0)
        return cls(name, head_dim, k, v, seed)

    def side(self, side: Side) -> SideFormat:
        """The key's ("k") or the value's ("v") half of the format.

        Raises:
            ValueError: side is neither "k" nor "v".
        """
        if side not in ("k", "v"):
            raise ValueError(f"side must be 'k' or 'v', got {side!r}")
        return self.k if side == "k" else self.v

    @property
    def outliers(self) -> int:
        """Number of outlier channels of a key (0 without)."""
        return self.k.outliers

    @property
    def channel_count(self) -> int:
        """How many indices `outlier_channels` holds per KV head: outliers, or the `tq` formats' quarter with more bits."""
        return self.k.outliers or (self.k.parts[0].channels if len(self.k.parts) > 1 else 0)

    @cached_property
    def bytes_per_token(self) -> int:
        """Bytes of one token's key and value in one KV head, everything counted."""
        return self.k.nbytes + self.v.nbytes

    @property
    def bits_per_element(self) -> float:
        """Stored bits per key or value element, scales and outliers counted."""
        return self.bytes_per_token * 8 / (2 * self.head_dim)

    @property
    def compression(self) -> float:
        """Size of a 16-bit cache over this format's."""
        return 4 * self.head_dim / self.bytes_per_token

    def page_bytes(self, page_size: int) -> int:
        """Bytes of a page of `page_size` tokens of one KV head; no padding anywhere."""
        check_page_size(page_size)
        return page_size * self.bytes_per_token


def check_head_dim(head_dim: int) -> None:
    """Raises ValueError, naming the choices, unless head_dim is supported."""
    choices = ", ".join(map(str, HEAD_DIMS))
    if head_dim % 16:
        raise ValueError(f"head_dim must be a multiple of 16, got {head_dim}; supported: {choices}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {choices}, got {head_dim}")


def check_format(fmt: KVFormat) -> None:
    """Raises ValueError unless fmt is a format; a name alone does not say head_dim."""
    if not isinstance(fmt, KVFormat):
        raise ValueError(f"fmt must be a KVFormat such as KVFormat.from_name('k4v4', 128), got {fmt!r}")


def check_page_size(page_size: int) -> None:
    """Raises ValueError, naming the choices, unless page_size is supported."""
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size must be one of {', '.join(map(str, PAGE_SIZES))}, got {page_size}")


def _side(preset: _Preset, side: Side, head_dim: int, outliers: int) -> SideFormat:
    bits = preset.k_bits if side == "k" else preset.v_bits
    if preset.kind == "split":
        high, low = head_dim // 4, head_dim - head_dim // 4
        return SideFormat((_part(high, bits + 1), _part(low, bits)))
    if preset.kind == "int8_key" and side == "k":
        return SideFormat((Part(head_dim, 8, "amax", search=False),))
    if preset.kind == "qjl" and side == "k":
        return SideFormat((Part(head_dim, bits, "rms", search=False),), qjl=True)
    return SideFormat((_part(head_dim, bits),), rotate=preset.kind != "lite", outliers=outliers)


def _part(channels: int, bits: int) -> Part:
    return Part(channels, bits, "unbiased", search=bits > 2)
