"""KIVI (Liu et al., ICML 2024, arXiv 2402.02750), 2 and 4 bits.

Asymmetric rounding to nearest without rotation: keys per channel over groups of 32 tokens, values per token over groups of
32 channels, the newest 128 tokens in 16 bits. KIVI's keys leave that window by whole groups; here both sides keep all of it.
"""

from __future__ import annotations

import math

from torch import Tensor

from kvturbo.config import Side
from kvturbo.eval.affine import STEP_BYTES, round_to_nearest
from kvturbo.eval.codec import Codec
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.simulated_cache import baseline

GROUP = 32
WINDOW = 128


def keys(k: Tensor, bits: int) -> Tensor:
    """[B, H, T, d]: groups of tokens; the tokens of a last, incomplete group stay as they are."""
    whole = k.shape[2] // GROUP * GROUP
    back = k.clone()
    groups = k[:, :, :whole].unflatten(2, (-1, GROUP))
    back[:, :, :whole] = round_to_nearest(groups, bits, 3).flatten(2, 3)
    return back


def values(v: Tensor, bits: int) -> Tensor:
    """[B, H, T, d]: groups of channels, of 16 where 32 do not fit."""
    return round_to_nearest(v.unflatten(-1, (-1, math.gcd(v.shape[-1], GROUP))), bits, -1).flatten(-2)


def codec(bits: int) -> Codec:
    """Both sides with `bits` bits."""

    def restore(x: Tensor, side: Side, layer: int) -> Tensor:
        return keys(x, bits) if side == "k" else values(x, bits)

    def size(d: int) -> float:
        return 2 * d * bits / 8 + d / GROUP * STEP_BYTES + d / math.gcd(d, GROUP) * STEP_BYTES

    return Codec(f"KIVI-{bits}, arXiv 2402.02750", restore, size, recent=WINDOW, group=GROUP)


for _bits in (2, 4):
    BASELINES.register(f"kivi{_bits}")(baseline(codec(_bits)))
