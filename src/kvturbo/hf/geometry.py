"""Which layers of a model are packed, their shapes, and the format and 16-bit windows of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvturbo.config import KVFormat, check_head_dim
from kvturbo.guard.plan import SIXTEEN_BIT, Plan

DEFAULT_SINK, DEFAULT_RECENT = 4, 128

Formats = str | Mapping[int, str] | Sequence[str | None]
Window = int | Mapping[int, int | None] | None
"""Tokens of a 16-bit window, in all layers or by layer index; None: the default of the layer's format."""


@dataclass(frozen=True)
class LayerShape:
    """KV heads and head_dim of a full-attention layer."""

    num_kv_heads: int
    head_dim: int

    @property
    def sixteen_bit_bytes(self) -> int:
        """Bytes of a token's key and value in 16 bits."""
        return 4 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class PackedSpec:
    """What decides whether layers can share pages' bookkeeping: format, KV heads and windows (in tokens)."""

    fmt: KVFormat
    num_kv_heads: int
    sink: int
    recent: int


def stock_layers(config: Any) -> list[Any]:
    """The empty layers that a stock DynamicCache has for a model.

    Raises:
        ValueError: the model is not decoder-only, uses latent attention (MLA) or shares keys and values between layers.
    """
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(f"{_name(config)} has cross attention; only decoder-only models are supported")
    text = config.get_text_config(decoder=True)
    rank = getattr(text, "kv_lora_rank", None)
    if rank:
        raise ValueError(
            f"{_name(config)} uses multi-head latent attention (kv_lora_rank {rank}), which is not supported"
        )
    shared = getattr(text, "num_kv_shared_layers", None)
    if shared:
        raise ValueError(
            f"{_name(config)} shares keys and values between layers (num_kv_shared_layers {shared}), "
            "which is not supported; only models with keys and values of their own in every layer are"
        )
    return list(DynamicCache(config=config).layers)


def full_attention_shapes(config: Any, layers: Sequence[Any]) -> dict[int, LayerShape]:
    """Shapes of the layers that a stock cache keeps whole, by layer index.

    Raises:
        ValueError: there is no such layer.
    """
    text = config.get_text_config(decoder=True)
    shapes = {
        i: _shape(text.per_layer_config[i])
        for i, layer in enumerate(layers)
        if type(layer) is DynamicLayer  # its subclasses hold a window, an index or a state beside
    }
    if not shapes:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise ValueError(
            f"{_name(config)} has no full_attention layer to pack: its cache layers are {kinds}; "
            "use transformers' DynamicCache for it"
        )
    return shapes


def choose_formats(
    formats: Formats, shapes: Mapping[int, LayerShape], num_layers: int, seed: int
) -> dict[int, KVFormat]:
    """The format of every packed layer, by layer index; layers given as `16bit` are left out.

    Raises:
        ValueError: a head_dim is not supported, a name is unknown, or the layers named are not the full-attention ones.
    """
    names = _names(formats, shapes, num_layers)
    chosen = {}
    for i, name in names.items():
        if name == SIXTEEN_BIT:
            continue
        try:
            check_head_dim(shapes[i].head_dim)
            chosen[i] = KVFormat.from_name(name, shapes[i].head_dim, seed=seed)
        except ValueError as error:
            raise ValueError(f"layer {i}: {error}") from error
    return chosen


def windows_of(fmt: KVFormat, sink: int | None, recent: int | None) -> tuple[int, int]:
    """Sink and recent window in tokens: as given, by default 0 for keys of 4 bits or more, else 4 and 128.

    Raises:
        ValueError: a window is negative or no number of tokens.
    """
    given: dict[str, object] = {"sink": sink, "recent": recent}
    for name, value in given.items():
        if value is None:
            continue
        if not isinstance(value, Integral):
            raise ValueError(f"{name} must be a number of tokens, got {value!r}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    coarse = min(part.bits for part in fmt.k.parts) < 4
    sink = (DEFAULT_SINK if coarse else 0) if sink is None else sink
    return sink, (DEFAULT_RECENT if coarse else 0) if recent is None else recent


def check_window(name: str, window: Window, shapes: Mapping[int, LayerShape]) -> None:
    """Raises ValueError if windows by layer name one that has none."""
    extra = sorted(set(window) - set(shapes)) if isinstance(window, Mapping) else []
    if extra:
        raise ValueError(f"{name} names layers {extra}; the full_attention layers are {sorted(shapes)}")


def window_of_layer(window: Window, layer: int) -> int | None:
    """A layer's window."""
    return window.get(layer) if isinstance(window, Mapping) else window


def check_plan(plan: Plan, shapes: Mapping[int, LayerShape]) -> None:
    """Raises ValueError unless a plan is for a model with these full-attention layers."""
    planned = {i: LayerShape(layer.num_kv_heads, layer.head_dim) for i, layer in plan.layers.items()}
    if planned != dict(shapes):
        wrong = sorted(i for i in {*planned, *shapes} if planned.get(i) != shapes.get(i))
        raise ValueError(
            f"the plan is for another model: layers {wrong} are {[planned.get(i) for i in wrong]} in the plan, "
            f"{[shapes.get(i) for i in wrong]} in the model"
        )


def _names(formats: Formats, shapes: Mapping[int, LayerShape], num_layers: int) -> dict[int, str]:
    if isinstance(formats, str):
        return dict.fromkeys(shapes, formats)
    if isinstance(formats, Mapping):
        given = dict(formats)
    else:
        if not isinstance(formats, Sequence):
            raise ValueError(
                f"format must be a name, a list over all layers or a mapping by layer, got {formats!r:.80}"
            )
        if len(formats) != num_layers:
            raise ValueError(f"format must have one entry for each of the {num_layers} layers, got {len(formats)}")
        given = {i: name for i, name in enumerate(formats) if name is not None}
    extra = sorted(i for i, name in given.items() if i not in shapes and name != SIXTEEN_BIT)
    missing = sorted(set(shapes) - set(given))
    if extra or missing:
        raise ValueError(
            f"format must name the full_attention layers {sorted(shapes)} ('{SIXTEEN_BIT}' for one that is not packed); "
            f"missing: {missing}, not full_attention: {extra}"
        )
    return {i: given[i] for i in shapes}


def _shape(config: Any) -> LayerShape:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return LayerShape(getattr(config, "num_key_value_heads", None) or heads, head_dim)


def _name(config: Any) -> str:
    return f"a model of type {getattr(config, 'model_type', type(config).__name__)!r}"
