"""What a calibration text says about a model's queries, keys and values: scales, means, and which heads are sharp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvturbo.eval.simulation import Simulation, run
from kvturbo.outliers import rope_pairs

QUERIES = 256
"""Last queries of the text whose attention is looked at."""


@dataclass(frozen=True)
class Calibration:
    """Statistics by layer.

    Attributes:
        query, key: [KV heads, d] fp32, second moments after RoPE, a query's taken over the heads of its group.
        key_mean, value_mean: [KV heads, d] fp32.
        effective_tokens: [KV heads] fp32, exp of the entropy of attention, geometric mean over queries and the group's heads.
    """

    query: dict[int, Tensor]
    key: dict[int, Tensor]
    key_mean: dict[int, Tensor]
    value_mean: dict[int, Tensor]
    effective_tokens: dict[int, Tensor]

    def pair_factors(self, alpha: float = 0.5) -> dict[int, Tensor]:
        """Factors on key channels, equal within a RoPE pair: sigma_q^(1 - alpha) / sigma_k^alpha, geometric mean 1 in a head.

        alpha = 1/2 makes the error of the scores smallest where the vector's error is spread evenly over channels, as a
        rotation does it (SmoothQuant, arXiv 2211.10438, uses the same exponent for another reason); 1 evens out the keys.

        Returns:
            Layer -> [KV heads, d].
        """
        factors = {}
        for layer in self.key:
            query, key = (_over_pairs(moment[layer]).sqrt().clamp(min=1e-6) for moment in (self.query, self.key))
            factor = query ** (1 - alpha) / key**alpha
            factors[layer] = factor / factor.log().mean(-1, keepdim=True).exp()
        return factors

    def sharp_heads(self) -> dict[int, Tensor]:
        """Layer -> [KV heads] bool: the half of all KV heads that attends to the fewest tokens."""
        every = torch.cat([self.effective_tokens[layer] for layer in sorted(self.effective_tokens)])
        middle = every.median()
        return {layer: tokens <= middle for layer, tokens in self.effective_tokens.items()}


def calibrate(model: Any, ids: Tensor) -> Calibration:
    """Statistics of a text [1, T] read once with a 16-bit cache."""
    found = Calibration({}, {}, {}, {}, {})

    def observe(layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        heads, d = k.shape[1], k.shape[3]
        grouped = q.unflatten(1, (heads, -1)).float()  # [1, H, G, T, d]
        found.query[layer] = grouped.square().mean((0, 2, 3))
        found.key[layer] = k.float().square().mean((0, 2))
        found.key_mean[layer], found.value_mean[layer] = k.float().mean((0, 2)), v.float().mean((0, 2))
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


def _over_pairs(moment: Tensor) -> Tensor:
    """The mean over the two channels of every RoPE pair, [H, d] -> [H, d]."""
    pairs = rope_pairs(moment.shape[-1]).to(moment.device)
    mean = moment[:, pairs].mean(-1)
    return torch.empty_like(moment).index_copy_(1, pairs.flatten(), mean.repeat_interleave(2, dim=1))
