"""What a format does to normal vectors: the codec alone, without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvturbo.config import SIDES, KVFormat
from kvturbo.quantizer import dequantize, quantize

VECTORS = 2048


@dataclass(frozen=True)
class Distortion:
    """Measured on seeded standard normal vectors.

    Attributes:
        key, value: relative error sum |x - x^|^2 / sum |x|^2 of the two sides.
        key_slope: mean of <k, k^> / |k|^2, the factor on the logit of a query that points along its key; 1 is unbiased.
    """

    key: float
    value: float
    key_slope: float


def measure(fmt: KVFormat, vectors: int = VECTORS, seed: int = 0) -> Distortion:
    """Quantises `vectors` standard normal vectors of fmt.head_dim channels.

    The stored-apart channels of an `-o` format are the first ones: all channels of this data are alike.
    """
    x = torch.randn(vectors, fmt.head_dim, generator=torch.Generator().manual_seed(seed))
    channels = torch.arange(fmt.channel_count) if fmt.channel_count else None
    error, restored = {}, {}
    for side in SIDES:
        restored[side] = dequantize(quantize(x, fmt, side, channels), fmt, side, channels)
        error[side] = ((x - restored[side]).square().sum() / x.square().sum()).item()
    slope = ((x * restored["k"]).sum(-1) / x.square().sum(-1)).mean().item()
    return Distortion(error["k"], error["v"], slope)
