"""A small PagedKVCache and what tests do with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvturbo import KVFormat, PagedKVCache
from support import channels_for, same_bits

HEADS, LAYERS = 2, 2


def make(name: str = "k4v4", num_pages: int = 8, page_size: int = 16, **options: Any) -> PagedKVCache:
    fmt = KVFormat.from_name(name, 64)
    if fmt.channel_count:
        channels = torch.stack([channels_for(fmt, HEADS, seed) for seed in range(LAYERS)])  # type: ignore[misc]
        options.setdefault("outlier_channels", channels)
    return PagedKVCache(fmt, num_layers=LAYERS, num_kv_heads=HEADS, num_pages=num_pages, page_size=page_size, **options)


def vectors(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, count, HEADS, 64, generator=torch.Generator().manual_seed(seed))
    return k, v


def extend(cache: PagedKVCache, sequence: int, k: Tensor, v: Tensor) -> None:
    slots = cache.append([sequence], [len(k)])
    for layer in range(LAYERS):
        cache.store(layer, (k * (layer + 1)).to(cache.device), v.to(cache.device), slots)


def contents(cache: PagedKVCache, sequence: int) -> list[Tensor]:
    length = cache.length(sequence)
    return [x for layer in range(LAYERS) for x in cache.gather(layer, sequence, 0, length, dtype=torch.float32)]


def same_contents(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
