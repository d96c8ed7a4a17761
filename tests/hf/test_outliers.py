"""Outlier channels chosen from a model: where a constant key bias is, whole RoPE pairs, the same count in every head."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf.models import feed, prompt, tiny
from kvturbo.hf import TurboCache
from kvturbo.hf.outliers import channels_from_text, channels_from_weights


def biased(pairs: list[int]) -> torch.nn.Module:
    """A Qwen2 whose keys have a large constant bias on some RoPE pairs (i, i + 32) of every head."""
    model = tiny("qwen2")
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.view(2, 64)
        bias[:] = 0
        bias[:, pairs] = 60.0
    return model


@pytest.mark.parametrize("source", ["weights", "text"])
def test_a_constant_bias_is_found(source: str) -> None:
    pairs = [3, 7, 11, 15, 16, 20, 25, 30]
    model = biased(pairs)
    if source == "weights":
        channels = channels_from_weights(model, "k4v4-o16")
    else:
        channels = channels_from_text(model, prompt(2, 64), "k4v4-o16")
    assert sorted(channels) == [0, 1]
    for chosen in channels.values():
        assert chosen.tolist() == [pairs + [i + 32 for i in pairs]] * 2


def test_outlier_channels_repair_what_the_bias_breaks() -> None:
    model, ids, sizes = biased(list(range(0, 32, 4))), prompt(1, 60), [40, 1, 1, 9, 9]
    model.set_attn_implementation("sdpa")
    raw = feed(model, DynamicCache(config=model.config), ids, sizes)
    model.set_attn_implementation("kvturbo")
    errors = []
    for name in ("k4v4", "k4v4-o16"):
        cache = TurboCache(model.config, name, outlier_channels=channels_from_weights(model, "k4v4-o16"))
        errors.append((feed(model, cache, ids, sizes) - raw).square().mean().sqrt())
    assert errors[1] < 0.5 * errors[0]


def test_normalised_keys_follow_the_norm() -> None:
    model = tiny("qwen3")
    pairs = [1, 5, 8, 9, 17, 22, 27, 31]
    for layer in model.model.layers:
        layer.self_attn.k_norm.weight.data[pairs] = 5.0
    for chosen in channels_from_weights(model, "k4v4-o16").values():
        assert chosen.tolist() == [pairs + [i + 32 for i in pairs]] * 2


def test_a_format_without_outlier_channels() -> None:
    with pytest.raises(ValueError, match="format 'k4v4' has no outlier channels"):
        channels_from_weights(tiny("llama"), "k4v4")


def test_weights_without_a_key_projection() -> None:
    with pytest.raises(ValueError, match=r"layers \[0, 1\] have no k_proj.*calibration text"):
        channels_from_weights(tiny("phi3"), "k4v4-o16")
    assert channels_from_text(tiny("phi3"), prompt(1, 32), "k4v4-o16")[1].shape == (1, 16)
