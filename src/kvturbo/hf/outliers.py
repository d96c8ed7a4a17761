"""Outlier channels of a model's keys, for the `-o` formats: from its weights, or from a text.

Both look at the second moment of every channel, mean included: a constant key bias is what makes outliers (Qwen2), and RoPE
keeps a pair's second moment. They return what `TurboCache(outlier_channels=...)` takes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvturbo.config import KVFormat
from kvturbo.hf.geometry import LayerShape, full_attention_shapes, stock_layers
from kvturbo.outliers import Pairing, choose_outlier_channels


def channels_from_weights(model: nn.Module, format: str, *, pairing: Pairing = "half") -> dict[int, Tensor]:
    """Chooses channels from the weights of the key projections.

    The second moment of a channel of k = W x + b is taken as b^2 + |row of W|^2, as for white x with unit variance (what a
    norm makes); where keys are normalised afterwards (Qwen3), as the square of the norm's weight.

    Args:
        model: a decoder-only model with `k_proj` in its attention modules.
        format: a format's name.
        pairing: which channels the model's RoPE turns together, see `kvturbo.outliers.rope_pairs`.

    Returns:
        Layer index -> [num_kv_heads, channels] int64.

    Raises:
        ValueError: the format has no outlier channels for the model, or a layer has no `k_proj`.
    """
    modules = {getattr(m, "layer_idx", None): m for m in model.modules() if hasattr(m, "k_proj")}
    moments = {}
    for i, shape in _shapes(model).items():
        if i not in modules:
            raise ValueError(
                f"layer {i} has no k_proj; use kvturbo.hf.outliers.channels_from_text(model, input_ids, format)"
            )
        moments[i] = _moment_of_weights(modules[i], shape)
    return _choose(model, moments, format, pairing)


@torch.no_grad()
def channels_from_text(
    model: nn.Module, input_ids: Tensor, format: str, *, pairing: Pairing = "half"
) -> dict[int, Tensor]:
    """Chooses channels from the keys of a calibration text, in one forward pass over a 16-bit cache.

    Args:
        model: a decoder-only model.
        input_ids: [rows, tokens] int64 without padding; some thousand tokens of ordinary text are plenty.
        format: a format's name.
        pairing: which channels the model's RoPE turns together, see `kvturbo.outliers.rope_pairs`.

    Returns:
        Layer index -> [num_kv_heads, channels] int64.

    Raises:
        ValueError: the format has no outlier channels for the model.
    """
    cache = DynamicCache(config=model.config)
    shapes = _shapes(model)
    _check(format, shapes)
    model(input_ids=input_ids.to(next(model.parameters()).device), past_key_values=cache, use_cache=True)
    moments = {i: cache.layers[i].keys.double().square().mean((0, 2)) for i in shapes}
    return _choose(model, moments, format, pairing)


def _moment_of_weights(module: Any, shape: LayerShape) -> Tensor:
    """[num_kv_heads, head_dim] fp64."""
    norm = getattr(module, "k_norm", None)
    if norm is not None and norm.weight.shape[0] == shape.head_dim:
        gain = norm(torch.ones_like(norm.weight)[None])[0]  # some norms multiply by 1 + weight
        return gain.double().square().expand(shape.num_kv_heads, -1)
    moment = module.k_proj.weight.double().square().sum(1)
    if module.k_proj.bias is not None:
        moment = moment + module.k_proj.bias.double().square()
    return moment.view(shape.num_kv_heads, shape.head_dim)


def _shapes(model: Any) -> dict[int, LayerShape]:
    return full_attention_shapes(model.config, stock_layers(model.config))


def _check(format: str, shapes: dict[int, LayerShape]) -> None:
    for i, shape in shapes.items():
        if not KVFormat.from_name(format, shape.head_dim).channel_count:
            raise ValueError(f"format {format!r} has no outlier channels (layer {i}, head_dim {shape.head_dim})")


def _choose(model: Any, moments: dict[int, Tensor], format: str, pairing: Pairing) -> dict[int, Tensor]:
    shapes = _shapes(model)
    _check(format, shapes)
    text = model.config.get_text_config(decoder=True)
    chosen = {}
    for i, moment in moments.items():
        head_dim = shapes[i].head_dim
        count = KVFormat.from_name(format, head_dim).channel_count
        rotary = _rotary_dim(text.per_layer_config[i], head_dim)
        chosen[i] = choose_outlier_channels(moment.detach(), count, pairing=pairing, rotary_dim=rotary).cpu()
    return chosen


def _rotary_dim(config: Any, head_dim: int) -> int:
    """Channels that RoPE turns."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)  # some models have them by kind of layer
    factor = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim * factor)
