"""Trellis-coded values, 2 bits a channel: a reference of what a code with memory gives, not a format.

A state is the last 4 codes of a vector, 8 bits; each of the 256 states has a level. Encoding finds the path of least squared
error by Viterbi's algorithm, decoding reads one table entry per channel. Sources: Marcellin and Fischer, 1990; QTIP (Tseng et
al., NeurIPS 2024, arXiv 2406.11235) for the shift-register trellis. The start is state 0, so nothing but the codes and the
scale is stored.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from kvturbo.config import Side
from kvturbo.eval.codec import Codec
from kvturbo.rotation import rotate, unrotate

BITS = 2
STATE_BITS = 8
STATES, CODES = 1 << STATE_BITS, 1 << BITS
TRAINING_VECTORS, TRAINING_ROUNDS = 512, 12
ROWS_AT_ONCE = 1 << 13


def trellis_values() -> Codec:
    """Vectors rotated, in units of their rms, with the formats' unbiased scale in fp16."""

    def restore(x: Tensor, side: Side, layer: int) -> Tensor:
        rows = rotate(x, 0).reshape(-1, x.shape[-1])
        rms = rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
        table = levels().to(x.device)
        back = torch.cat([encode(piece, table) for piece in (rows / rms).split(ROWS_AT_ONCE)])
        energy = rows.square().sum(-1, keepdim=True)
        scale = torch.where(energy > 0, energy / (rows * back).sum(-1, keepdim=True), 0.0)
        return unrotate((back * scale.half().float()).view(x.shape), 0)

    return Codec("2-bit trellis code with 256 states", restore, lambda d: 2 * (d * BITS / 8 + 2))


def encode(x: Tensor, table: Tensor) -> Tensor:
    """The levels of the best path through x: [n, d] fp32 with a level for each of the states [256] -> [n, d]."""
    return table[_best_path(x, table)]


@lru_cache(maxsize=1)
def levels() -> Tensor:
    """Levels of the states, [256] fp32: trained on seeded standard normal vectors, as Lloyd's algorithm trains a codebook."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRAINING_VECTORS, 128, generator=generator)
    table = torch.randn(STATES, generator=generator)
    for _ in range(TRAINING_ROUNDS):
        states = _best_path(x, table).flatten()
        total = torch.zeros(STATES).index_add_(0, states, x.flatten())
        count = torch.zeros(STATES).index_add_(0, states, torch.ones(x.numel()))
        table = torch.where(count > 0, total / count.clamp(min=1), table)
    return table


def _best_path(x: Tensor, table: Tensor) -> Tensor:
    """States along the path of least squared error from state 0: [n, d] int64.

    A step turns state s into (s << 2 | code) & 255, so the four states before s differ in their upper two bits.
    """
    n, d = x.shape
    before = _before(x.device)
    cost = torch.full((n, STATES), float("inf"), device=x.device)
    cost[:, 0] = 0
    choices = torch.empty(d, n, STATES, dtype=torch.uint8, device=x.device)
    for i in range(d):
        best, choice = cost[:, before].min(-1)
        choices[i] = choice.to(torch.uint8)
        cost = best + (x[:, i : i + 1] - table).square()
    state = cost.argmin(-1)
    path = torch.empty(n, d, dtype=torch.int64, device=x.device)
    for i in range(d - 1, -1, -1):
        path[:, i] = state
        state = before[state, choices[i].gather(1, state[:, None]).squeeze(1).long()]
    return path


def _before(device: torch.device) -> Tensor:
    """[256, 4]: the states from which a state can be reached."""
    state = torch.arange(STATES, device=device)[:, None]
    return (state >> BITS) | torch.arange(CODES, device=device) << (STATE_BITS - BITS)
