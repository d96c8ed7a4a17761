"""Teacher-forced decoding after a packed context, all tokens in one forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.config import SIDES
from kvturbo.eval.codec import Codec
from kvturbo.eval.simulation import Prefix, Simulation


class Decoded(Simulation):
    """Attention of tokens that are decoded one by one, in one pass: each reads all but the newest tokens from the cache.

    A token whose own chunk is itself reads what `Simulation` with chunks of one token gives it; there is no loop over tokens here,
    and a step's own token may come from the cache too, as it does where tokens are stored before they are read.

    Args:
        codec: of the cache.
        newest: tokens that a step reads raw, its own included.
        context: layer -> raw keys and values [1, heads, tokens, d] before the tokens.
        packed: the same as the codec gives them back.
    """

    def __init__(self, codec: Codec, newest: int, context: Prefix, packed: Prefix) -> None:
        super().__init__(codec, prefix=context)
        self._codec, self._newest, self._context, self._packed = codec, newest, context, packed

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """As `Simulation.attend`."""
        near = min(self._newest, self._context[layer][0].shape[2])  # of the context, these may be raw to some step
        batch, heads, count, d = q.shape
        rows = q.reshape(batch, k.shape[1], -1, count, d) * scale
        age = (torch.arange(count)[:, None] + near - torch.arange(near + count)[None]).to(q.device)
        young = age < self._newest
        old, raw, back = self._parts(layer, 0, self._rounded(k), near)
        late = torch.where(young, _scores(rows, raw), _scores(rows, back)).masked_fill(age < 0, -torch.inf)
        weights = torch.cat((torch.einsum("bhgld,hnd->bhgln", rows, old), late), -1).softmax(-1)
        early, late = weights[..., : -near - count], weights[..., -near - count :]
        old, raw, back = self._parts(layer, 1, self._rounded(v), near)
        out = torch.einsum("bhgln,hnd->bhgld", early, old) + _sum(late * young, raw) + _sum(late * ~young, back)
        return out.reshape(batch, heads, count, d)

    def _parts(self, layer: int, side: int, new: Tensor, near: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys or values: those always packed [heads, n, d]; the `near` last of the context and the new ones, raw and packed."""
        raw, packed = self._context[layer][side].float(), self._packed[layer][side].float()
        old = raw.shape[2] - near
        back = self._codec.restore(new, SIDES[side], layer)
        late = (torch.cat((x[:, :, old:].expand(len(new), -1, -1, -1), y), 2) for x, y in ((raw, new), (packed, back)))
        in_16_bits, in_codes = late
        return packed[0, :, :old], in_16_bits, in_codes


def _scores(rows: Tensor, keys: Tensor) -> Tensor:
    return torch.einsum("bhgld,bhnd->bhgln", rows, keys)


def _sum(weights: Tensor, values: Tensor) -> Tensor:
    return torch.einsum("bhgln,bhnd->bhgld", weights, values)
