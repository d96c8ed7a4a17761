"""Outlier channels of a model's keys, for the `-o` formats: from its weights, or from a text.

Both look at the second moment of every channel, mean included: a constant key bias is what makes outliers (Qwen2), and RoPE
keeps a pair's second moment. They return what `TurboCache(outlier_channels=...)` takes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kvturbo.config import KVFormat
from kvturbo.guard.merit import channels_for
from kvturbo.guard.moments import LayerMoments
from kvturbo.hf.calibration import moments_of_model, moments_of_text
from kvturbo.hf.geometry import full_attention_shapes, stock_layers
from kvturbo.outliers import Pairing


def channels_from_weights(model: nn.Module, format: str, *, pairing: Pairing = "half") -> dict[int, Tensor]:
    """Chooses channels from the weights of the key projections, see `kvturbo.guard.moments`.

    Args:
        model: a decoder-only model with `k_proj` in its attention modules.
        format: a format's name.
        pairing: which channels the model's RoPE turns together, see `kvturbo.outliers.rope_pairs`.

    Returns:
        Layer index -> [num_kv_heads, channels] int64.

    Raises:
        ValueError: the format has no outlier channels for the model, or a layer has no `k_proj`.
    """
    _check(model, format)
    return _choose(moments_of_model(model, pairing=pairing), format)


def channels_from_text(
    model: nn.Module, input_ids: Tensor, format: str, *, pairing: Pairing = "half"
) -> dict[int, Tensor]:
    """Chooses channels from the keys of a calibration text, in one forward pass.

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
    _check(model, format)
    return _choose(moments_of_text(model, input_ids, pairing=pairing), format)


def _check(model: Any, format: str) -> None:
    for i, shape in full_attention_shapes(model.config, stock_layers(model.config)).items():
        if not KVFormat.from_name(format, shape.head_dim).channel_count:
            raise ValueError(f"format {format!r} has no outlier channels (layer {i}, head_dim {shape.head_dim})")


def _choose(moments: dict[int, LayerMoments], format: str) -> dict[int, Tensor]:
    return {i: channels_for(own, KVFormat.from_name(format, own.head_dim).channel_count) for i, own in moments.items()}
