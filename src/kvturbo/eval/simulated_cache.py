"""A transformers cache around a codec: it holds 16 bits, and what came before a chunk is read through the codec."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvturbo.config import SIDES
from kvturbo.eval.baselines import sixteen_bit
from kvturbo.eval.baselines.sixteen_bit import SixteenBitCache
from kvturbo.eval.codec import Codec
from kvturbo.eval.registry import Baseline


class SimulatedCache(SixteenBitCache):
    """Shows what a codec does; it saves no memory, and `nbytes` says what the codec would take.

    Args:
        codec: for layers with full attention; other layers are left alone.
        config: the model's configuration.
    """

    def __init__(self, codec: Codec, config: Any = None) -> None:
        super().__init__(config=config)
        self.codec = codec
        self.packed_tokens_read = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length(layer_idx)
        raw = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        first, stop = self.codec.packed_range(before, layer_idx)
        if type(self.layers[layer_idx]) is not DynamicLayer or first == stop:
            return raw
        self.packed_tokens_read += len(key_states) * (stop - first)
        k, v = (self._read(x, i, layer_idx, before) for i, x in enumerate(raw))
        return k, v

    def nbytes(self) -> int:
        """Bytes that the codec would take for what is held, windows in 16 bits."""
        return round(sum(self._layer_bytes(layer) for layer in self.layers))

    def sixteen_bit_nbytes(self) -> int:
        """Bytes of the same tokens in 16 bits."""
        return sum(2 * (layer.keys.numel() + layer.values.numel()) for layer in self.layers if layer.get_seq_length())

    def _read(self, x: Tensor, side: int, layer: int, before: int) -> Tensor:
        first, stop = self.codec.packed_range(before, layer)
        restored = self.codec.restore(x[:, :, :before].float(), SIDES[side], layer).to(x.dtype)
        return torch.cat((x[:, :, :first], restored[:, :, first:stop], x[:, :, stop:]), 2)

    def _layer_bytes(self, layer: Any) -> float:
        tokens = layer.get_seq_length()
        if not tokens:
            return 0.0
        batch, heads, _, d = layer.keys.shape
        if type(layer) is not DynamicLayer:
            return 4.0 * batch * heads * tokens * d
        return batch * heads * tokens * 2 * d * self.codec.bits_at(d, tokens) / 8


def baseline(codec: Codec) -> Baseline:
    """A baseline whose caches read through a codec."""

    def from_raw(raw: DynamicCache) -> SimulatedCache:
        cache = SimulatedCache(codec)
        held = sixteen_bit.from_raw(raw)
        cache.layers, cache.layer_class_to_replicate = held.layers, held.layer_class_to_replicate
        return cache

    return Baseline(lambda config: SimulatedCache(codec, config), from_raw, codec)
