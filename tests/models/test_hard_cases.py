"""The hard cases are hard, and give what the model gives that they are made from."""

from __future__ import annotations

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kvturbo.eval.model import embedded_folder

TOLERANCE = 2e-3
"""Largest difference of a logit in fp32: sums of other numbers, with keys ten times as large, over six layers."""


def script(name: str) -> Any:
    """A script of `models/`, which is no package."""
    folder = Path(__file__).resolve().parents[2] / "models"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


hard_cases = script("hard_cases")


@lru_cache(maxsize=1)
def embedded() -> Any:
    return AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()


@lru_cache(maxsize=4)
@torch.no_grad()
def outputs(name: str) -> tuple[Any, torch.Tensor]:
    """The cache and the logits of a case on 600 tokens."""
    model = embedded() if name == "plain" else (hard_cases.CASES | {"widen": hard_cases.widen})[name](embedded())
    ids = torch.randint(10, 1024, (1, 600), generator=torch.Generator().manual_seed(1))
    out = model(ids, use_cache=True)
    return out.past_key_values, out.logits


@pytest.mark.parametrize("name", ["key-bias", "key-scale", "value-mean", "widen"])
def test_the_output_is_the_models_own(name: str) -> None:
    plain = outputs("plain")[1]
    assert plain.std() > 1
    assert (outputs(name)[1] - plain).abs().max() < TOLERANCE


def test_keys_of_two_layers_are_ten_times_their_size_with_the_bias() -> None:
    biased, plain = outputs("key-bias")[0], outputs("widen")[0]
    ratios = [
        float(a.keys.square().sum(-1).mean() / b.keys.square().sum(-1).mean())
        for a, b in zip(biased.layers, plain.layers, strict=True)
    ]
    assert min(ratios[0], ratios[-1]) > 20
    assert ratios[1:-1] == pytest.approx([1.0] * 4)


def test_key_energy_is_in_few_channels_of_the_scaled_model() -> None:
    def share(name: str) -> float:
        moments = torch.stack([layer.keys.square().mean((0, 2)) for layer in outputs(name)[0].layers])
        top = moments.sort(-1, descending=True).values[..., :16].sum(-1) / moments.sum(-1)
        return float(top.min())

    assert share("key-scale") > 0.65 > 0.45 > share("plain")


def test_values_have_a_mean() -> None:
    for layer in outputs("value-mean")[0].layers:
        mean = layer.values.mean(2).norm(dim=-1)
        assert (mean > 2 * (layer.values - layer.values.mean(2, keepdim=True)).norm(dim=-1).mean(-1)).all()


def test_a_saved_case_gives_the_same(tmp_path: Path) -> None:
    case = hard_cases.CASES["key-bias"](embedded())
    case.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(10, 300)[None]
    with torch.no_grad():
        assert (loaded(ids).logits - case(ids).logits).abs().max() < TOLERANCE


def test_other_models_are_refused() -> None:
    options = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(head_dim=256, intermediate_size=32, **options))
    with pytest.raises(ValueError, match="head_dim must be less than 256 to be widened, got 256"):
        hard_cases.CASES["key-bias"](model)
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    model = LlamaForCausalLM(LlamaConfig(head_dim=64, intermediate_size=32, rope_parameters=scaled, **options))
    with pytest.raises(ValueError, match="must be a Llama with default RoPE, got .*'linear'"):
        hard_cases.CASES["key-scale"](model)
