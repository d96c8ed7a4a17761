"""Asymmetric uniform quantisation, which most of the baselines use: x is about low + code * step."""

from __future__ import annotations

from torch import Tensor


def round_to_nearest(x: Tensor, bits: int, dim: int, *, clip: float = 1.0) -> Tensor:
    """What comes back for x when every run of values along `dim` has a step and a lowest value of its own, both fp16.

    Args:
        x: fp32.
        bits: of a code.
        dim: the axis whose values share a step.
        clip: factor on both ends of the range.
    """
    low, high = (x.amin(dim, keepdim=True) * clip), (x.amax(dim, keepdim=True) * clip)
    low = low.half().float()
    step = ((high - low) / (2**bits - 1)).half().float()
    safe = step.masked_fill(step == 0, 1.0)
    return ((x - low) / safe).round().clamp(0, 2**bits - 1) * step + low


STEP_BYTES = 4
"""Of a run's step and lowest value."""
