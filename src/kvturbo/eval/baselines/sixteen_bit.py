"""The 16-bit cache: what every packed cache is compared with."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvturbo.eval.registry import BASELINES, Baseline


class SixteenBitCache(DynamicCache):
    """The stock transformers cache, with keys and values held in 16 bits whatever the model computes in.

    A model that runs in fp32, as on a CPU, would otherwise hold 32 bits; its keys and values become bf16 here and are
    widened when they are read.
    """

    packed_tokens_read = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(_sixteen(key_states), _sixteen(value_states), layer_idx, *args, **kwargs)
        return keys.to(key_states.dtype), values.to(value_states.dtype)

    def nbytes(self) -> int:
        """Bytes of all tensors in the cache."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors(vars(layer)))

    def sixteen_bit_nbytes(self) -> int:
        """The same: this is the 16-bit cache."""
        return self.nbytes()


def from_raw(raw: DynamicCache) -> SixteenBitCache:
    """A 16-bit copy of a raw cache."""
    cache = SixteenBitCache()
    cache.layers = [copy.deepcopy(layer) for layer in raw.layers]
    cache.layer_class_to_replicate = raw.layer_class_to_replicate
    for layer in cache.layers:
        if isinstance(getattr(layer, "keys", None), Tensor):
            layer.keys, layer.values = _sixteen(layer.keys), _sixteen(layer.values)
            layer.dtype = layer.keys.dtype
    return cache


BASELINES.register("16bit")(Baseline(lambda config: SixteenBitCache(config=config), from_raw))


def _tensors(attributes: dict[Any, Any]) -> Iterator[Tensor]:
    for value in attributes.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from _tensors(value)


def _sixteen(x: Tensor) -> Tensor:
    """At most 16 bits per element; a copy only where the type changes."""
    return x.to(torch.bfloat16) if x.dtype in (torch.float32, torch.float64) else x
