"""Codecs as functions: what comes back for keys and values that were stored, and how many bytes storing took.

A codec stands for a cache format without its bytes: kvturbo's formats (through the reference quantiser) and the formats of
other projects (`kvturbo.eval.baselines`) are then measured by the same code, on the same model, texts and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from kvturbo.config import KVFormat, Side
from kvturbo.guard.plan import SIXTEEN_BIT as SIXTEEN_BIT_NAME
from kvturbo.guard.plan import LayerPlan, Plan
from kvturbo.hf.geometry import windows_of
from kvturbo.quantizer import dequantize, quantize

Restore = Callable[[Tensor, Side, int], Tensor]
"""(vectors [batch, KV heads, tokens, d] fp32, side, layer) -> what a cache gives back for them, the same shape, fp32."""


@dataclass(frozen=True)
class Codec:
    """A lossy store of keys and values.

    Attributes:
        source: the paper or the code it follows.
        restore: see `Restore`.
        bytes_per_token: head_dim -> bytes of one token's key and value in one KV head, everything stored counted.
        sink, recent: the first and the last tokens, which stay in 16 bits.
        group: tokens that are quantised together; a group that is not full stays in 16 bits.
    """

    source: str
    restore: Restore
    bytes_per_token: Callable[[int], float]
    sink: int = 0
    recent: int = 0
    group: int = 1

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per key or value element of a packed token."""
        return self.bytes_per_token(head_dim) * 8 / (2 * head_dim)

    def bits_at(self, head_dim: int, tokens: int) -> float:
        """Stored bits per element of a context of `tokens` tokens: the windows are in 16 bits."""
        first, stop = self.packed_range(tokens)
        packed = (stop - first) / tokens
        return packed * self.bits_per_element(head_dim) + (1 - packed) * 16

    def packed_range(self, tokens: int, layer: int = 0) -> tuple[int, int]:
        """Which of `tokens` tokens are packed in a layer: first and one past the last."""
        first = min(self.sink, tokens)
        return first, max(first, (tokens - self.recent) // self.group * self.group)


def packed_codec(
    fmt: KVFormat,
    channels: Mapping[int, Tensor] | None = None,
    *,
    sink: int | None = None,
    recent: int | None = None,
) -> Codec:
    """One of kvturbo's formats, through the reference quantiser.

    Args:
        fmt: the format; it may be one that has no name.
        channels: layer -> [KV heads, channels] int64, for formats with outlier channels.
        sink, recent: windows in tokens, by default the format's.
    """

    def restore(x: Tensor, side: Side, layer: int) -> Tensor:
        chosen = None if channels is None else channels[layer].unsqueeze(1).to(x.device)
        return dequantize(quantize(x, fmt, side, chosen), fmt, side, chosen)

    sink, recent = windows_of(fmt, sink, recent)
    return Codec(f"kvturbo {fmt.name}", restore, lambda _: fmt.bytes_per_token, sink, recent)


def scaled_keys(codec: Codec, factors: Mapping[int, Tensor]) -> Codec:
    """Keys are multiplied by factors before they are stored and divided after.

    Where both channels of a RoPE pair have one factor this is what folding the factors into the key projection, and their
    inverses into the query projection, does to the same model: nothing is stored in addition.

    Args:
        codec: what stores them.
        factors: layer -> [KV heads, d].
    """

    def restore(x: Tensor, side: Side, layer: int) -> Tensor:
        if side == "v":
            return codec.restore(x, side, layer)
        factor = factors[layer].to(x).unsqueeze(1)
        return codec.restore(x * factor, side, layer) / factor

    return replace(codec, restore=restore)


def centred(codec: Codec, means: Mapping[int, Tensor], side: Side) -> Codec:
    """A constant is taken off the vectors of one side before they are stored and added after.

    For values it can be folded exactly: attention weights add up to 1, so the constant comes back as a bias of the output
    projection.

    Args:
        codec: what stores them.
        means: layer -> [KV heads, d].
        side: which vectors.
    """

    def restore(x: Tensor, given: Side, layer: int) -> Tensor:
        if given != side:
            return codec.restore(x, given, layer)
        mean = means[layer].to(x).unsqueeze(1)
        return codec.restore(x - mean, given, layer) + mean

    return replace(codec, restore=restore)


OtherRule = Literal["norm", "least_squares"]
"""Scale rules that formats do not have: |x^| = |x|, and the smallest |x - x^|."""


def rescaled(codec: Codec, rule: OtherRule, side: Side) -> Codec:
    """Every vector of one side with another scale on the same codes, in fp32.

    A rotation changes neither <x, x^> nor |x^|, so this is the rule on the rotated vector where all of it is one part.
    Source: Vargaftik et al., DRIVE (NeurIPS 2021) and EDEN (ICML 2022).

    Args:
        codec: what stores them.
        rule: the scale.
        side: which vectors.
    """

    def restore(x: Tensor, given: Side, layer: int) -> Tensor:
        back = codec.restore(x, given, layer)
        if given != side:
            return back
        energy = back.square().sum(-1, keepdim=True)
        if rule == "norm":
            factor = (x.square().sum(-1, keepdim=True) / energy).sqrt()
        else:
            factor = (x * back).sum(-1, keepdim=True) / energy
        return back * torch.where(energy == 0, 1.0, factor)

    return replace(codec, restore=restore)


@dataclass(frozen=True)
class ByLayer(Codec):
    """Every layer as its own codec stores it, its windows included; bytes are the mean over layers.

    Attributes:
        layers: by layer index, none of which is a `ByLayer`.
    """

    layers: Mapping[int, Codec] = field(default_factory=dict)

    def described(self) -> dict[str, str]:
        """What every layer has, by its index."""
        return {str(i): f"{codec.source}, windows {codec.sink} + {codec.recent}" for i, codec in self.layers.items()}

    def bits_at(self, head_dim: int, tokens: int) -> float:
        return sum(codec.bits_at(head_dim, tokens) for codec in self.layers.values()) / len(self.layers)

    def packed_range(self, tokens: int, layer: int = 0) -> tuple[int, int]:
        return self.layers[layer].packed_range(tokens)


def by_layer(codecs: Mapping[int, Codec], windows: tuple[int, int] | None = None) -> ByLayer:
    """A codec that differs from layer to layer.

    Args:
        codecs: by layer index.
        windows: sink and recent tokens of all layers; None: each codec's own.
    """
    if windows is not None:
        codecs = {i: replace(codec, sink=windows[0], recent=windows[1]) for i, codec in codecs.items()}

    def restore(x: Tensor, side: Side, layer: int) -> Tensor:
        return codecs[layer].restore(x, side, layer)

    def size(head_dim: int) -> float:
        return sum(codec.bytes_per_token(head_dim) for codec in codecs.values()) / len(codecs)

    sources = dict.fromkeys(codec.source for codec in codecs.values())
    return ByLayer(" and ".join(sources), restore, size, layers=codecs)


def plan_codec(plan: Plan) -> ByLayer:
    """What a cache made with a plan stores."""
    channels = plan.own_channels()

    def codec_of(i: int, layer: LayerPlan) -> Codec:
        if layer.format == SIXTEEN_BIT_NAME:
            return SIXTEEN_BIT
        fmt = KVFormat.from_name(layer.format, layer.head_dim)
        own = {i: channels[i]} if fmt.outliers else None
        return packed_codec(fmt, own, sink=layer.sink, recent=layer.recent)

    return by_layer({i: codec_of(i, layer) for i, layer in plan.layers.items()})


SIXTEEN_BIT = Codec("16 bit", lambda x, side, layer: x, lambda head_dim: 4.0 * head_dim)
"""A layer that is not packed, for `by_layer`."""


def mixed(keys: Codec, values: Codec, head_dim: int, bytes_per_token: float) -> Codec:
    """Keys as one codec stores them, values as another.

    Args:
        keys, values: the codecs; the windows are those of `keys`.
        head_dim: the only one it is for.
        bytes_per_token: of both sides together.
    """

    def restore(x: Tensor, side: Side, layer: int) -> Tensor:
        return (keys if side == "k" else values).restore(x, side, layer)

    def size(asked: int) -> float:
        if asked != head_dim:
            raise ValueError(f"this codec is for head_dim {head_dim}, got {asked}")
        return bytes_per_token

    return replace(keys, source=f"{keys.source}, {values.source}", restore=restore, bytes_per_token=size)
