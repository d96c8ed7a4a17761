"""Sliding-window layers stay on vLLM's own backend, in 16 bits: their cache does not grow with the context.

vLLM keeps one cache dtype per layer, and a layer has it before a backend is chosen. The classes made here are the engine's backend
for a layer whose dtype says "packed": they turn the layer's cache back into a 16-bit one.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVQuantMode

from kvturbo.vllm.backend import PackedBackend
from kvturbo.vllm.formats import format_of


def engine_backend(packed: type[PackedBackend], configuration: dict[str, Any]) -> type[AttentionBackend]:
    """The engine's choice for a sliding-window layer, as a class that keeps 16 bits.

    Args:
        packed: the backend of the other layers.
        configuration: arguments of vLLM's `validate_configuration`.

    Raises:
        ValueError: no backend of vLLM takes the layer.
    """
    options = {name: value for name, value in configuration.items() if name != "device_capability"}
    selector = AttentionSelectorConfig(**(options | {"kv_cache_dtype": "auto"}))
    name = current_platform.get_attn_backend_cls(None, attn_selector_config=selector)
    return sixteen_bit(resolve_obj_by_qualname(name), packed, configuration["dtype"])


def sixteen_bit(engine: type[AttentionBackend], packed: Any, dtype: torch.dtype) -> type[AttentionBackend]:
    """A subclass of the engine's backend whose layers have a 16-bit cache although their cache dtype is a packed one.

    Args:
        engine: a backend of vLLM.
        packed: the backend of the full-attention layers, whose pages share the pool.
        dtype: of the cache.
    """
    name = f"{engine.__name__}_16bit_{str(dtype).removeprefix('torch.')}_beside_{packed.__name__}"
    if name in globals():
        known: type[AttentionBackend] = globals()[name]
        return known
    implementation = engine.get_impl_cls()
    builder = engine.get_builder_cls()

    class Layer(implementation):  # type: ignore[misc, valid-type]
        """The engine's attention, told that the cache dtype is "auto"."""

        def __init__(
            self,
            num_heads: int,
            head_size: int,
            scale: float,
            num_kv_heads: int | None = None,
            alibi_slopes: list[float] | None = None,
            sliding_window: int | None = None,
            kv_cache_dtype: str = "auto",
            *arguments: Any,
            **options: Any,
        ) -> None:
            super().__init__(
                num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, "auto", *arguments, **options
            )

    class Builder(builder):  # type: ignore[misc, valid-type]
        """The engine's metadata builder, told the same."""

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any, **options: Any):
            config = copy.copy(vllm_config)
            config.cache_config = copy.copy(vllm_config.cache_config)
            config.cache_config.cache_dtype = "auto"
            super().__init__(kv_cache_spec, layer_names, config, device, **options)

    class Backend(engine):
        @staticmethod
        def get_impl_cls() -> type:
            return Layer

        @staticmethod
        def get_builder_cls() -> type:
            return Builder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            dense = replace(spec, dtype=dtype, kv_quant_mode=KVQuantMode.NONE)
            return _padded(super().customize_spec(dense), packed)

    Backend.__name__ = Backend.__qualname__ = name
    Layer.__name__, Builder.__name__ = f"{name}_Layer", f"{name}_Builder"
    globals()[name] = Backend  # vLLM looks the class up by this name
    return Backend


def _padded(spec: AttentionSpec, packed: type[PackedBackend]) -> AttentionSpec:
    """The spec with its page padded to whole packed pages, so that one pool serves both kinds of layer without waste.

    vLLM gives all groups of a hybrid cache the same page size: it makes the blocks of the smaller page longer if that comes out
    even, and pads them otherwise, which would undo the packing.
    """
    page = spec.block_size * spec.num_kv_heads * format_of(packed.cache_dtype, spec.head_size).bytes_per_token
    return replace(spec, page_size_padded=-(-spec.unpadded_page_size_bytes // page) * page)
