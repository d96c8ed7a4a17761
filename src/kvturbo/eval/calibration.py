"""What a calibration text says about a model's queries, keys and values: scales, means, and which heads are sharp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvturbo.config import Side
from kvturbo.eval.simulation import Simulation, run
from kvturbo.guard.moments import LayerMoments
from kvturbo.hf.calibration import moments_of_text
from kvturbo.hf.fold import key_scales

QUERIES = 256
"""Last queries of the text whose attention is looked at."""


@dataclass(frozen=True)
class Calibration:
    """Statistics by layer.

    Attributes:
        moments: of queries and keys after RoPE, and of values.
        key_mean: [KV heads, d] fp32.
        effective_tokens: [KV heads] fp32, exp of the entropy of attention, geometric mean over queries and the group's heads.
    """

    moments: dict[int, LayerMoments]
    key_mean: dict[int, Tensor]
    effective_tokens: dict[int, Tensor]

    def pair_factors(self, alpha: float = 0.5) -> dict[int, Tensor]:
        """Layer -> [KV heads, d] factors on key channels, see `kvturbo.hf.fold.key_scales`."""
        return {layer: key_scales(own, alpha) for layer, own in self.moments.items()}

    def means(self, side: Side) -> dict[int, Tensor]:
        """Layer -> [KV heads, d]: the mean key or value."""
        return self.key_mean if side == "k" else {layer: own.value_mean for layer, own in self.moments.items()}

    def sharp_heads(self) -> dict[int, Tensor]:
        """Layer -> [KV heads] bool: the half of all KV heads that attends to the fewest tokens."""
        every = torch.cat([self.effective_tokens[layer] for layer in sorted(self.effective_tokens)])
        middle = every.median()
        return {layer: tokens <= middle for layer, tokens in self.effective_tokens.items()}


def calibrate(model: Any, ids: Tensor) -> Calibration:
    """Statistics of a text [1, T], read with a 16-bit cache."""
    found = Calibration(moments_of_text(model, ids), {}, {})

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        heads, d = k.shape[1], k.shape[3]
        grouped = q.unflatten(1, (heads, -1)).float()  # [1, H, G, T, d]
        found.key_mean[layer] = k.float().mean((0, 2))
        found.effective_tokens[layer] = _effective_tokens(grouped[0, :, :, -QUERIES:], k[0].float(), d**-0.5)

    run(model, ids, Simulation(observe=observe), start=ids.shape[1] - 1)
    return found


def _effective_tokens(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """q [H, G, n, d], the last n queries of keys k [H, T, d] -> [H]."""
    n, t = q.shape[2], k.shape[1]
    seen = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n)
    scores = (q @ k.unsqueeze(1).mT * scale).masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1)
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
    return entropy.mean((1, 2)).exp()
