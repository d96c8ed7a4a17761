"""vLLM's TurboQuant presets (vLLM pull request #38479): k8v4, 4bit_nc, k3v4_nc, 3bit_nc.

Keys of the `_nc` presets: divided by their norm, turned by an orthonormal Hadamard matrix without random signs, rounded to
the Lloyd-Max levels of N(0, 1/d); reading normalises the levels' vector ("norm correction") and multiplies by the fp16 norm.
Keys of `k8v4`: e4m3 without a scale. Values: not rotated; 2^b uniform steps between the smallest and the largest channel of
a vector. Bytes are those before the slot is rounded up to a multiple of 8. All layers are packed, where vLLM by default
leaves the first two and the last two in 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import Side
from kvturbo.eval.affine import STEP_BYTES, round_to_nearest
from kvturbo.eval.codec import Codec
from kvturbo.eval.hadamard import hadamard, inverse_hadamard, lloyd_max
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.simulated_cache import baseline

LARGEST = 448.0
PRESETS = {"k8v4": (8, 4), "4bit_nc": (4, 4), "k3v4_nc": (3, 4), "3bit_nc": (3, 3)}
"""Bits of a key and of a value."""


def keys(k: Tensor, bits: int) -> Tensor:
    """[..., d] fp32 -> what reading gives back."""
    if bits == 8:
        return k.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(k.dtype)
    norm = k.norm(dim=-1, keepdim=True)
    unit = hadamard(k / norm.clamp(min=1e-12))
    levels = lloyd_max(unit * k.shape[-1] ** 0.5, bits)
    return inverse_hadamard(levels / levels.norm(dim=-1, keepdim=True)) * norm.half().float()


def codec(name: str) -> Codec:
    """The preset called `name`."""
    k_bits, v_bits = PRESETS[name]

    def restore(x: Tensor, side: Side, layer: int) -> Tensor:
        return keys(x, k_bits) if side == "k" else round_to_nearest(x, v_bits, -1)

    norm_bytes = 0 if k_bits == 8 else 2
    return Codec(f"vLLM turboquant_{name}", restore, lambda d: d * (k_bits + v_bits) / 8 + norm_bytes + STEP_BYTES)


for _name in PRESETS:
    BASELINES.register(f"vllm-{_name}")(baseline(codec(_name)))
