"""What the baselines rotate and round with: an orthonormal Hadamard matrix without signs, and Lloyd-Max levels as published."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvturbo.rotation import hadamard_matrix

LEVELS = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
"""Positive Lloyd-Max levels of N(0, 1) (J. Max, 1960, table I)."""


def hadamard(x: Tensor) -> Tensor:
    """H x / sqrt(d) over the last axis, in x's dtype."""
    return x @ _matrix(x.shape[-1], str(x.device)).to(x.dtype).T


def inverse_hadamard(y: Tensor) -> Tensor:
    """H^T y / sqrt(d) over the last axis: the inverse of `hadamard`."""
    return y @ _matrix(y.shape[-1], str(y.device)).to(y.dtype)


def lloyd_max(x: Tensor, bits: int) -> Tensor:
    """Every value of x, of about unit variance, at its nearest level."""
    levels = torch.tensor(LEVELS[bits], device=x.device)
    index = torch.bucketize(x.abs(), (levels[1:] + levels[:-1]) / 2)
    return levels[index].copysign(x)


@lru_cache(maxsize=8)
def _matrix(d: int, device: str) -> Tensor:
    return (hadamard_matrix(d) * d**-0.5).float().to(device)
