"""fp8 e4m3 with one scale per tensor: what `--kv-cache-dtype fp8` of vLLM and SGLang stores.

The scale is the largest magnitude of the tensor over 448, of the very tokens that are stored: the best that calibration can
do. Two scales per layer are not worth counting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import Side
from kvturbo.eval.codec import Codec
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.simulated_cache import baseline

LARGEST = 448.0


def restore(x: Tensor, side: Side, layer: int) -> Tensor:
    scale = (x.abs().amax() / LARGEST).clamp(min=2.0**-24)
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


BASELINES.register("fp8")(baseline(Codec("e4m3, a scale per tensor", restore, lambda d: 2.0 * d)))
