"""QuaRot int4 (Ashkboos et al., NeurIPS 2024, arXiv 2404.00456): the KV cache of its 4-bit setting.

Keys (after RoPE) and values are turned by a Hadamard matrix, then rounded to 16 uniform steps per vector, asymmetrically,
with the range clipped to 0.95 of its ends; one group is a head of 128 channels.
"""

from __future__ import annotations

from torch import Tensor

from kvturbo.config import Side
from kvturbo.eval.affine import STEP_BYTES, round_to_nearest
from kvturbo.eval.codec import Codec
from kvturbo.eval.hadamard import hadamard, inverse_hadamard
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.simulated_cache import baseline

BITS = 4
CLIP = 0.95


def restore(x: Tensor, side: Side, layer: int) -> Tensor:
    return inverse_hadamard(round_to_nearest(hadamard(x), BITS, -1, clip=CLIP))


BASELINES.register("quarot-int4")(
    baseline(Codec("QuaRot int4, arXiv 2404.00456", restore, lambda d: 2 * (d * BITS / 8 + STEP_BYTES)))
)
