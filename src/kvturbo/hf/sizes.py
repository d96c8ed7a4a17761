"""What a plan's cache takes, before there is one."""

from __future__ import annotations

from kvturbo.config import PAGE_SIZE, KVFormat
from kvturbo.guard.plan import SIXTEEN_BIT, LayerPlan, Plan
from kvturbo.hf.geometry import windows_of


def windows_of_layer(layer: LayerPlan) -> tuple[int, int]:
    """Sink and recent window of a layer in tokens; none in a layer that is not packed."""
    if layer.format == SIXTEEN_BIT:
        return 0, 0
    return windows_of(KVFormat.from_name(layer.format, layer.head_dim), layer.sink, layer.recent)


def layer_bytes(layer: LayerPlan, tokens: int) -> int:
    """Bytes that one row of `tokens` tokens takes in a layer, windows and the last page's free slots included."""
    whole = 4 * layer.num_kv_heads * layer.head_dim
    if layer.format == SIXTEEN_BIT:
        return tokens * whole
    near = min(tokens, sum(windows_of_layer(layer)))
    pages = -(-(tokens - near) // PAGE_SIZE)
    fmt = KVFormat.from_name(layer.format, layer.head_dim)
    return near * whole + pages * layer.num_kv_heads * fmt.page_bytes(PAGE_SIZE)


def cache_bytes(plan: Plan, tokens: int) -> int:
    """Bytes that one row of `tokens` tokens takes in all layers: `TurboCache.bytes_used` of a cache made with the plan."""
    return sum(layer_bytes(layer, tokens) for layer in plan.layers.values())


def sixteen_bit_bytes(plan: Plan, tokens: int) -> int:
    """Bytes of the same tokens in 16 bits."""
    return sum(4 * tokens * layer.num_kv_heads * layer.head_dim for layer in plan.layers.values())


def bits_per_element(plan: Plan, tokens: int) -> float:
    """Bits per key or value element with `tokens` tokens in the cache, everything counted."""
    return 16 * cache_bytes(plan, tokens) / sixteen_bit_bytes(plan, tokens)
