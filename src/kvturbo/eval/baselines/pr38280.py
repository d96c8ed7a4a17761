"""The first TurboQuant pull request of vLLM, #38280: its slot of 95 bytes, as published and with its trim repaired.

19 of 128 channels are kept in bf16: those with the largest variance over all heads of a layer. The other 109 get random
signs, are padded to 128, turned by a Hadamard matrix and rounded to 4-bit Lloyd-Max levels with an fp16 norm. As published,
the rotated vector is then cut to its first 109 coefficients, and reading fills the rest with zeros; repaired, all 128
codes are stored, in 104 bytes. The variance is taken from the tokens that are stored, as from the pull request's first batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import Side
from kvturbo.eval.codec import Codec
from kvturbo.eval.hadamard import hadamard, inverse_hadamard, lloyd_max
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.simulated_cache import baseline
from kvturbo.rotation import signs

OUTLIER_SHARE = 0.15
BITS = 4


def outlier_count(head_dim: int) -> int:
    """19 of 128."""
    return int(head_dim * OUTLIER_SHARE)


def restore(x: Tensor, kept: int) -> Tensor:
    """What reading gives back for x [B, H, T, d] when `kept` rotated coefficients are stored."""
    d = x.shape[-1]
    variance = x.flatten(0, -2).var(dim=0)
    normal = variance.argsort(descending=True)[outlier_count(d) :].sort().values
    part = x[..., normal]
    norm = part.norm(dim=-1, keepdim=True)
    padded = torch.zeros_like(x)
    padded[..., : len(normal)] = part / norm.clamp(min=1e-12)
    sigma = signs(d, 0, x.device)
    levels = lloyd_max(hadamard(padded * sigma) * d**0.5, BITS) * d**-0.5
    levels[..., kept:] = 0
    back = (inverse_hadamard(levels) * sigma)[..., : len(normal)] * norm.half().float()
    out = x.to(torch.bfloat16).to(x.dtype)
    out[..., normal] = back
    return out


def codec(trimmed: bool) -> Codec:
    """As published (trimmed), or with every coefficient stored."""

    def stored(d: int) -> int:
        return d - outlier_count(d) if trimmed else d

    def restored(x: Tensor, side: Side, layer: int) -> Tensor:
        return restore(x, stored(x.shape[-1]))

    def size(d: int) -> float:
        return 2.0 * (2 * outlier_count(d) + -(-stored(d) * BITS // 8) + 2)

    return Codec(f"vLLM pull request 38280{'' if trimmed else ', all codes stored'}", restored, size)


BASELINES.register("pr38280")(baseline(codec(trimmed=True)))
BASELINES.register("pr38280-repaired")(baseline(codec(trimmed=False)))
