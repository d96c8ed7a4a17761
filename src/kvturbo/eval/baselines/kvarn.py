"""KVarN k4v2 (Muller et al., arXiv 2606.03458): variance-normalised tiles of 128 tokens.

Keys and values of a tile are turned by a Hadamard matrix over the channels. The tile is then divided by a factor per token
and a factor per channel, found by turns so that all tokens and all channels have nearly the same standard deviation; of
all rounds the most even one is taken. What is left is rounded to nearest: keys with a range per channel, values with a
range per token. Stored per tile of keys: codes, a step and a lowest value per channel (which take in the channel's factor),
a factor per token; per tile of values the same with tokens and channels swapped: 108 bytes a token for k4v2 at d = 128. The
first tile and the one being filled stay in 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import Side
from kvturbo.eval.affine import STEP_BYTES
from kvturbo.eval.codec import Codec
from kvturbo.eval.hadamard import hadamard, inverse_hadamard
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.simulated_cache import baseline

TILE = 128
ROUNDS = 16
LARGEST = 1e4
TOKENS, CHANNELS = -2, -1


def evened(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Factors per token [..., T, 1] and per channel [..., 1, d] that even out the standard deviations of tiles [..., T, d]."""
    token = tiles.std(dim=(TOKENS, CHANNELS), keepdim=True).clamp(min=1e-12).expand_as(tiles[..., :1])
    channel = torch.ones_like(tiles[..., :1, :])
    best, best_spread = (token, channel), _spread(tiles / token)
    for _ in range(ROUNDS):
        token = token * _deviation(tiles / token / channel, CHANNELS)
        channel = (channel * _deviation(tiles / token / channel, TOKENS)).clamp(1 / LARGEST, LARGEST)
        spread = _spread(tiles / token / channel)
        better = spread < best_spread
        best = torch.where(better, token, best[0]), torch.where(better, channel, best[1])
        best_spread = torch.where(better, spread, best_spread)
    shared = best[1].log().mean(CHANNELS, keepdim=True).exp()  # of a product of two factors only one size is free
    return best[0] * shared, best[1] / shared


def restore_tiles(tiles: Tensor, bits: int, side: Side) -> Tensor:
    """What reading gives back for rotated tiles [..., T, d]."""
    token, channel = evened(tiles)
    even = tiles / token / channel
    shared, own, other = (TOKENS, channel, token) if side == "k" else (CHANNELS, token, channel)
    low = even.amin(shared, keepdim=True)
    step = ((even.amax(shared, keepdim=True) - low) / (2**bits - 1)).clamp(min=1e-10)
    codes = ((even - low) / step).round()
    return (codes * (step * own).half().float() + (low * own).half().float()) * other.half().float()


def codec(k_bits: int, v_bits: int) -> Codec:
    """Keys with k_bits, values with v_bits."""

    def restore(x: Tensor, side: Side, layer: int) -> Tensor:
        whole = x.shape[2] // TILE * TILE
        back = x.clone()
        tiles = hadamard(x[:, :, :whole].unflatten(2, (-1, TILE)))
        restored = restore_tiles(tiles, k_bits if side == "k" else v_bits, side)
        back[:, :, :whole] = inverse_hadamard(restored).flatten(2, 3)
        return back

    def size(d: int) -> float:
        keys = d * k_bits / 8 + d * STEP_BYTES / TILE + 2
        values = d * v_bits / 8 + STEP_BYTES + 2 * d / TILE
        return keys + values

    return Codec(f"KVarN k{k_bits}v{v_bits}, arXiv 2606.03458", restore, size, sink=TILE, group=TILE)


def _deviation(x: Tensor, dim: int) -> Tensor:
    return x.std(dim=dim, keepdim=True).clamp(1e-3, 1e3)


def _spread(x: Tensor) -> Tensor:
    """Largest over smallest deviation, of tokens and of channels: [..., 1, 1]."""
    over_channels, over_tokens = _deviation(x, CHANNELS), _deviation(x, TOKENS)
    ratios = [s.amax((-2, -1), keepdim=True) / s.amin((-2, -1), keepdim=True) for s in (over_channels, over_tokens)]
    return ratios[0] + ratios[1]


BASELINES.register("kvarn-k4v2")(baseline(codec(4, 2)))
