"""How much noise a format adds to a layer's scores and values, and the cheapest format that adds little enough.

A key is rotated and has one scale, so its error spreads evenly over the channels: E[(k^ - k)_c^2] = D |k|^2 / d, with D the
format's distortion. The score q.k then has an error of variance D / d |k|^2 |q|^2, however the energy is spread over the
channels. Were keys scaled channel by channel (RoPE pair by pair) by sqrt(|q_p| / |k_p|) and queries by the inverse, which
changes no score, it would be the least it can be, D / d (sum_p |q_p| |k_p|)^2. The *excess* is the first over the second. It
is 1 for even channels and, by Cauchy and Schwarz, never less; a bias of ten times the keys' norm makes it 100. It needs no
absolute sizes, so weights are enough to compute it. A pair whose |q_p| |k_p| is far above the others' counts in the least as
4 times the median: what is that large is a constant, which quantisation should not be measured by.

Of values the same holds for the mean: it can be taken out exactly, so the excess is E|v|^2 / E|v - E v|^2.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from kvturbo.config import OUTLIER_COUNTS, PRESETS, KVFormat
from kvturbo.guard.moments import LayerMoments
from kvturbo.guard.plan import SIXTEEN_BIT, LayerPlan, Plan
from kvturbo.outliers import choose_outlier_channels
from kvturbo.quantizer import dequantize, quantize

LIMIT = 2.0
"""Excess that is put up with: above, a layer gets more for its keys."""
_INT8_LEVELS = 127
_CAP = 4.0


def key_excess(moments: LayerMoments, format: str, base: str | None = None) -> Tensor:
    """Variance of the scores' error with a format over the least that the base format could have: [num_kv_heads] float64.

    Args:
        moments: of the layer.
        format: a format's name, or `16bit`.
        base: the format whose least error is 1; default: `format`.

    Raises:
        ValueError: a name is unknown for the layer's head_dim.
    """
    if format == SIXTEEN_BIT:
        return torch.zeros(moments.num_kv_heads, dtype=torch.float64)
    fmt = KVFormat.from_name(format, moments.head_dim)
    key, query = (x.double()[:, moments.pairs].sum(-1) for x in (moments.key, moments.query))
    product = (key * query).sqrt()
    product = product.minimum(_CAP * product.median(1, keepdim=True).values)
    least = distortion(base or format, moments.head_dim) * product.sum(1).square()
    return _noise(moments, fmt) / least.clamp(min=torch.finfo(torch.float64).tiny)


def value_excess(moments: LayerMoments) -> Tensor:
    """Energy of the values over what is left without their mean: [num_kv_heads] float64."""
    energy = moments.value.sum(1)
    spread = energy - moments.value_mean.square().sum(1)
    return energy / spread.clamp(min=1e-12 * energy).clamp(min=torch.finfo(torch.float64).tiny)


def choose_format(moments: LayerMoments, base: str = "k4v4", limit: float = LIMIT) -> str:
    """The format with the fewest bytes whose excess, over what the base format could have, is within the limit in all heads.

    Candidates are the base, its `-o` variants, `k8v4` and `16bit`, which is always within.
    Values count as well: no format is better for a mean in them than 16 bits are.

    Args:
        moments: of the layer.
        base: a `k4v4`-like format or `k8v4`, without `-o`.
        limit: see `LIMIT`.

    Raises:
        ValueError: base is not such a format, or the limit is below 1.
    """
    _check(base, limit)
    if bool((value_excess(moments) > limit).any()):
        return SIXTEEN_BIT
    names = candidates(base, moments.head_dim)
    return next(name for name in names if bool((key_excess(moments, name, base) <= limit).all()))


def make_plan(moments: Mapping[int, LayerMoments], base: str = "k4v4", limit: float = LIMIT, source: str = "") -> Plan:
    """A plan with the format of `choose_format` for every layer, and outlier channels for whoever needs them.

    Args:
        moments: by layer index.
        base, limit: see `choose_format`.
        source: what the moments are from, for people.

    Raises:
        ValueError: as `choose_format`.
    """
    return Plan({i: layer_plan(own, choose_format(own, base, limit)) for i, own in moments.items()}, source)


def layer_plan(moments: LayerMoments, format: str) -> LayerPlan:
    """A layer with a format, the default windows, and what was found."""
    counts = [count for count, smallest in OUTLIER_COUNTS.items() if moments.head_dim >= smallest]
    return LayerPlan(
        format,
        moments.num_kv_heads,
        moments.head_dim,
        channels={count: channels_for(moments, count).tolist() for count in counts},
        key_excess=round(float(key_excess(moments, "k4v4").max()), 3),
        value_excess=round(float(value_excess(moments).max()), 3),
    )


def candidates(base: str, head_dim: int) -> list[str]:
    """What `choose_format` chooses from, the fewest bytes first."""
    names = [base]
    if PRESETS[base].kind == "plain":
        names += [f"{base}-o{count}" for count, smallest in OUTLIER_COUNTS.items() if head_dim >= smallest]
        names.append("k8v4")
    return [*sorted(names, key=lambda name: KVFormat.from_name(name, head_dim).bytes_per_token), SIXTEEN_BIT]


def channels_for(moments: LayerMoments, count: int) -> Tensor:
    """The layer's `count` outlier channels: [num_kv_heads, count] int64, see `choose_outlier_channels`."""
    return choose_outlier_channels(moments.key, count, pairing=moments.pairing, rotary_dim=moments.rotary_dim).cpu()


@lru_cache(maxsize=64)
def distortion(format: str, head_dim: int) -> float:
    """D of a format's keys apart from outlier channels, measured on 1,024 seeded normal vectors."""
    fmt = KVFormat.from_name(format.partition("-o")[0], head_dim)
    x = torch.randn(1024, head_dim, generator=torch.Generator().manual_seed(0))
    channels = torch.arange(fmt.channel_count) if fmt.channel_count else None
    error = x - dequantize(quantize(x, fmt, "k", channels), fmt, "k", channels)
    return float(error.square().sum() / x.square().sum())


def _noise(moments: LayerMoments, fmt: KVFormat) -> Tensor:
    """d times the variance of the scores' error, without the softmax scale: [num_kv_heads]."""
    key, query = moments.key.double(), moments.query.double()
    if not fmt.outliers:
        return distortion(fmt.name, fmt.head_dim) * key.sum(1) * query.sum(1)
    apart = torch.zeros_like(key, dtype=torch.bool).scatter(1, channels_for(moments, fmt.outliers), True)
    rest = distortion(fmt.name, fmt.head_dim) * key.where(~apart, 0).sum(1) * query.where(~apart, 0).sum(1)
    peak = (
        key.where(apart, 0)[:, moments.pairs].sum(-1).max(1).values.sqrt()
    )  # a constant pair reaches its norm as it turns
    step = peak / _INT8_LEVELS
    return rest + fmt.head_dim * step.square() / 12 * query.where(apart, 0).sum(1)


def _check(base: str, limit: float) -> None:
    plain = [name for name, preset in PRESETS.items() if preset.kind in ("plain", "int8_key")]
    if base not in plain:
        raise ValueError(f"the guard starts from one of {', '.join(plain)}, got {base!r}")
    if not limit >= 1:
        raise ValueError(f"limit must be at least 1, the excess of even channels, got {limit}")
