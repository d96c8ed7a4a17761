"""The codec: a vector to codes and scales, and back.

Method: TurboQuant (Zandieh et al., arXiv 2504.19874, Algorithm 1: rotate, then Lloyd-Max per channel) with the unbiased
scale of EDEN (Vargaftik et al., ICML 2022) and a search over it. The `qjl` formats add the paper's Algorithm 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvturbo.codebook import CODEBOOKS, Codebook
from kvturbo.config import KVFormat, Part, Side, SideFormat
from kvturbo.rotation import gaussian_matrix, rotate, unrotate

FP16_MAX = 65504.0
FP16_SMALLEST = 2.0**-24
SEARCH_STEPS = tuple(1 + 0.06 * j for j in (-2, -1, 0, 1, 2))
_ROWS_AT_ONCE = {"cpu": 1 << 12}  # what a search touches stays in the cache
_ROWS_AT_ONCE_ELSEWHERE = 1 << 16


@dataclass
class Packed:
    """Quantised vectors, one code per byte; `PageLayout` places the bits.

    Attributes:
        codes: [..., d] uint8. 2-4 bits: `sign << (bits - 1) | magnitude index`. 8 bits: the int8's bit pattern. Channels of
            the rotated vector; the `tq` formats put the part with more bits first.
        scales: [..., parts] fp16; 2-4 bits: in units of the vector's rms, 8 bits: the size of a step.
        outliers: [..., o] uint8, int8 bit patterns of the outlier channels in the order of `outlier_channels`, or None.
        outlier_scale: [...] fp16, the size of an outlier's step, or None.
        residual_signs: [..., d] uint8, 1 where S r is negative (`qjl`), or None.
        residual_norm: [...] fp16, |r| (`qjl`), or None.
    """

    codes: Tensor
    scales: Tensor
    outliers: Tensor | None = None
    outlier_scale: Tensor | None = None
    residual_signs: Tensor | None = None
    residual_norm: Tensor | None = None


def quantize(x: Tensor, fmt: KVFormat, side: Side, outlier_channels: Tensor | None = None) -> Packed:
    """Quantises keys or values.

    A vector with a NaN or an infinity (or a squared norm beyond fp32) gets a NaN scale, so that everything that reads it
    is NaN; scales saturate at 65504 and are 0 below 2^-24.

    Args:
        x: [..., d], any floating dtype, d = fmt.head_dim.
        fmt: the format.
        side: "k" or "v".
        outlier_channels: [o] or [..., o] int64, `fmt.channel_count` distinct channels, broadcast over x's leading axes.
            Needed for a key of an `-o` format; for a key of a `tq` format the channels with more bits (default: the first
            quarter). Ignored for values.

    Raises:
        ValueError: x has another last axis than head_dim, or the outlier channels' number is wrong or they are missing.
        TypeError: x is not floating point.
    """
    form = fmt.side(side)
    _check_vectors(x, fmt)
    channels = select_channels(fmt, side, outlier_channels, x)
    rows = x.reshape(-1, fmt.head_dim)
    if channels is not None:
        channels = channels.reshape(-1, channels.shape[-1])
    at_once = _ROWS_AT_ONCE.get(x.device.type, _ROWS_AT_ONCE_ELSEWHERE)
    pieces = [
        _quantize_rows(rows[i : i + at_once], form, fmt.seed, None if channels is None else channels[i : i + at_once])
        for i in range(0, max(len(rows), 1), at_once)
    ]
    return _join(pieces, x.shape[:-1])


def dequantize(
    packed: Packed, fmt: KVFormat, side: Side, outlier_channels: Tensor | None = None, *, rotated: bool = False
) -> Tensor:
    """The vectors that `packed` stands for.

    Args:
        packed: what `quantize` returned.
        fmt, side, outlier_channels: as given to `quantize`.
        rotated: leave the rotation in, for attention with a rotated query. Formats whose vectors are not one rotated part
            (`-o`, `tq`) have no rotated form.

    Returns:
        [..., d] fp32.

    Raises:
        ValueError: rotated is asked of a format that has no rotated form, or the outlier channels are missing or wrong.
    """
    form = fmt.side(side)
    if rotated and not has_rotated_form(form):
        raise ValueError(f"format {fmt.name!r} has no rotated form of its {'keys' if side == 'k' else 'values'}")
    parts, start = [], 0
    for i, part in enumerate(form.parts):
        y = decode_levels(packed.codes[..., start : start + part.channels], packed.scales[..., i], part)
        if form.qjl:
            y = y + _qjl_residual(packed, fmt.seed)
        parts.append(y if rotated or not form.rotate else unrotate(y, fmt.seed))
        start += part.channels
    channels = select_channels(fmt, side, outlier_channels, packed.codes)
    if len(parts) > 1:
        assert channels is not None
        return torch.empty_like(torch.cat(parts, -1)).scatter_(
            -1, _split_order(channels, form.head_dim), torch.cat(parts, -1)
        )
    if channels is None:
        return parts[0]
    assert packed.outliers is not None
    assert packed.outlier_scale is not None
    outliers = packed.outliers.view(torch.int8).float() * packed.outlier_scale.float().unsqueeze(-1)
    return parts[0].scatter(-1, channels, outliers)


def has_rotated_form(form: SideFormat) -> bool:
    """Whether all channels of the side are one vector in rotated space (or were never rotated)."""
    return not form.outliers and len(form.parts) == 1


def select_channels(fmt: KVFormat, side: Side, outlier_channels: Tensor | None, like: Tensor) -> Tensor | None:
    """The channels that are stored apart, expanded over like's leading axes ([..., o] int64), or None where there are none.

    Raises:
        ValueError: their number is wrong, an index is out of range, or an `-o` format got none.
    """
    form = fmt.side(side)
    count = fmt.channel_count if side == "k" else (form.parts[0].channels if len(form.parts) > 1 else 0)
    if not count:
        return None
    if outlier_channels is None or side == "v":
        if form.outliers:
            raise ValueError(f"format {fmt.name!r} needs outlier_channels: {count} channel indices per KV head")
        outlier_channels = torch.arange(count, device=like.device)
    check_channels(outlier_channels, fmt)
    return outlier_channels.to(like.device).expand(*like.shape[:-1], count)


def check_channels(outlier_channels: Tensor, fmt: KVFormat) -> None:
    """Raises ValueError unless outlier_channels are `fmt.channel_count` distinct indices below head_dim on their last axis."""
    if outlier_channels.shape[-1] != fmt.channel_count or outlier_channels.dtype != torch.int64:
        raise ValueError(
            f"outlier_channels of format {fmt.name!r} must be int64 [..., {fmt.channel_count}], "
            f"got {outlier_channels.dtype} {list(outlier_channels.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    ascending = outlier_channels.sort(-1).values
    if ((ascending < 0) | (ascending >= fmt.head_dim)).any() or (ascending.diff(dim=-1) == 0).any():
        raise ValueError(
            f"outlier_channels must be distinct and from 0 to {fmt.head_dim - 1}, got {outlier_channels.tolist()}"
        )


def encode_part(y: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """Quantises vectors that are already rotated.

    Args:
        y: [n, channels] fp32.
        part: bits, scale rule, search.

    Returns:
        codes [n, channels] uint8 and scale [n] fp16.
    """
    if part.bits == 8:
        return encode_int8(y)
    book = CODEBOOKS[part.bits]
    energy = y.square().sum(-1)
    rms = (energy / y.shape[-1]).sqrt()
    magnitude, dot = _search(y.abs(), rms, book, SEARCH_STEPS if part.search else (1.0,))
    scale = rms if part.rule == "rms" else torch.where(energy > 0, energy / dot * book.T, 0.0)
    scale = torch.where(torch.isfinite(energy), scale, math.nan)
    codes = magnitude | (y < 0).to(torch.uint8) << (part.bits - 1)
    return codes, to_fp16_scale(scale)


def decode_levels(codes: Tensor, scale: Tensor, part: Part) -> Tensor:
    """scale * level of every code: codes [..., n] uint8, scale [...] fp16 -> [..., n] fp32."""
    if part.bits == 8:
        return codes.view(torch.int8).float() * scale.float().unsqueeze(-1)
    book = CODEBOOKS[part.bits]
    return _lookup(_table(book.levels, str(codes.device)), codes) * (scale.float() * (1 / book.T)).unsqueeze(-1)


def encode_int8(y: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with step amax / 127: [n, channels] fp32 -> int8 bit patterns [n, channels] uint8, step [n] fp16."""
    amax = y.abs().amax(-1)
    step = to_fp16_scale(torch.where(torch.isfinite(amax), amax / 127, math.nan))
    divisor = step.float().unsqueeze(-1)
    codes = torch.where(divisor > 0, (y / divisor).round(), 0).clamp(-127, 127)
    return codes.to(torch.int8).view(torch.uint8), step


def to_fp16_scale(scale: Tensor) -> Tensor:
    """Rounds fp32 scales to fp16: at most 65504, 0 below 2^-24, NaN stays NaN."""
    scale = torch.where(scale < FP16_SMALLEST, 0.0, scale)
    return scale.clamp(max=FP16_MAX).half()


def _search(magnitudes: Tensor, rms: Tensor, book: Codebook, steps: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The candidate scale with the largest <y,c>^2 / <c,c>, the first of equals: magnitude indices and <y,c>.

    Levels c are in units of 1/T.
    """
    unit = (rms * torch.tensor(steps, device=rms.device).unsqueeze(-1) * (1 / book.T)).unsqueeze(-1)  # [steps, n, 1]
    index = torch.zeros((len(steps), *magnitudes.shape), dtype=torch.uint8, device=magnitudes.device)
    for threshold in book.thresholds:
        index += magnitudes > threshold * unit
    level = _lookup(_table(book.magnitudes, str(index.device)), index)
    dot, cc = (magnitudes * level).sum(-1), level.square().sum(-1)
    best = (dot * dot / cc).argmax(0, keepdim=True)  # [1, n]
    return (
        index.gather(0, best.unsqueeze(-1).expand(1, *magnitudes.shape)).squeeze(0),
        dot.gather(0, best).squeeze(0),
    )


@lru_cache(maxsize=32)
def _table(values: tuple[float, ...], device: str) -> Tensor:
    return torch.tensor(values, device=device)


def _lookup(table: Tensor, index: Tensor) -> Tensor:
    # An index_select of long indices takes a third of the time of table[index].
    return table.index_select(0, index.flatten().long()).view(index.shape)


def _quantize_rows(x: Tensor, form: SideFormat, seed: int, channels: Tensor | None) -> Packed:
    x = x.float()
    outliers: tuple[Tensor | None, Tensor | None] = None, None
    if form.outliers:
        assert channels is not None
        outliers = encode_int8(x.gather(-1, channels))
        x = x.scatter(-1, channels, 0.0)
    elif channels is not None:
        x = x.gather(-1, _split_order(channels, form.head_dim))
    codes, scales = [], []
    for part, y in zip(form.parts, x.split([part.channels for part in form.parts], -1), strict=True):
        y = rotate(y, seed) if form.rotate else y
        code, scale = encode_part(y, part)
        codes.append(code)
        scales.append(scale)
    packed = Packed(torch.cat(codes, -1), torch.stack(scales, -1), *outliers)
    if form.qjl:
        residual = y - decode_levels(codes[0], scales[0], form.parts[0])
        packed.residual_signs = (residual @ gaussian_matrix(form.head_dim, seed, x.device).T < 0).to(torch.uint8)
        packed.residual_norm = to_fp16_scale(residual.norm(dim=-1))
    return packed


def _qjl_residual(packed: Packed, seed: int) -> Tensor:
    """sqrt(pi/2)/d |r| S^T sign(S r), TurboQuant's Algorithm 2."""
    assert packed.residual_signs is not None
    assert packed.residual_norm is not None
    d = packed.residual_signs.shape[-1]
    projected = (1 - 2 * packed.residual_signs.float()) @ gaussian_matrix(d, seed, packed.codes.device)
    return projected * (packed.residual_norm.float() * (math.sqrt(math.pi / 2) / d)).unsqueeze(-1)


def _split_order(channels: Tensor, head_dim: int) -> Tensor:
    """Storage order of a `tq` format: the given channels first, then the others ascending. [..., o] -> [..., d] int64."""
    chosen = torch.zeros(*channels.shape[:-1], head_dim, dtype=torch.bool, device=channels.device)
    chosen = chosen.scatter(-1, channels, True)
    return torch.cat(
        (channels, chosen.to(torch.uint8).sort(dim=-1, stable=True).indices[..., : head_dim - channels.shape[-1]]), -1
    )


def _check_vectors(x: Tensor, fmt: KVFormat) -> None:
    if not x.is_floating_point():
        raise TypeError(f"vectors must be floating point, got {x.dtype}")
    if x.shape[-1] != fmt.head_dim:
        raise ValueError(f"vectors of format {fmt.name!r} must have head_dim {fmt.head_dim}, got shape {list(x.shape)}")


def _join(pieces: list[Packed], shape: torch.Size) -> Packed:
    def joined(name: str) -> Tensor | None:
        tensors = [getattr(piece, name) for piece in pieces]
        if tensors[0] is None:
            return None
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return whole.reshape((*shape, *whole.shape[1:]))

    codes, scales = joined("codes"), joined("scales")
    assert codes is not None
    assert scales is not None
    names = "outliers", "outlier_scale", "residual_signs", "residual_norm"
    return Packed(codes, scales, *(joined(name) for name in names))
