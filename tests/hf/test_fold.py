"""Folding keeps the output and takes out what makes keys and values hard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf.models import prompt, tiny
from kvturbo.guard import key_excess, value_excess
from kvturbo.hf.calibration import moments_of_text
from kvturbo.hf.fold import fold, key_scales

IDS = prompt(2, 80)
TOLERANCE = 1e-4
"""Of logits of about 3, in fp32."""


def hard(family: str) -> Any:
    """A model whose keys have uneven pairs, queries the inverse, and whose values have a large mean."""
    model = tiny(family)
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        attention = layer.self_attn
        rows = torch.randn(32, generator=generator).mul(1.2).exp().repeat(2)
        with torch.no_grad():
            if hasattr(attention, "k_norm"):
                attention.k_norm.weight *= rows
                attention.q_norm.weight /= rows
            else:
                for projection, factor in ((attention.k_proj, rows), (attention.q_proj, 1 / rows)):
                    heads = projection.weight.shape[0] // 64
                    projection.weight *= factor.repeat(heads)[:, None]
                    if projection.bias is not None:
                        projection.bias *= factor.repeat(heads)
            constant = 5 * torch.randn(attention.v_proj.weight.shape[0], generator=generator)
            bias = attention.v_proj.bias
            attention.v_proj.bias = torch.nn.Parameter(constant if bias is None else bias + constant)
    model.set_attn_implementation("sdpa")
    return model


def excesses(model: Any) -> tuple[float, float]:
    moments = moments_of_text(model, IDS).values()
    return max(float(key_excess(m, "k4v4").max()) for m in moments), max(float(value_excess(m).max()) for m in moments)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_the_output_stays_and_the_excess_goes(family: str) -> None:
    model = hard(family)
    key, value = excesses(model)
    assert key > 4 and value > 4
    folded = fold(model, moments_of_text(model, IDS), limit=1.0)
    assert (folded(IDS).logits - model(IDS).logits).abs().max() < TOLERANCE
    key, value = excesses(folded)
    assert value == pytest.approx(1, abs=1e-3)
    assert key < (2 if family == "qwen3" else 1.05)  # one gain for all heads can't even each of them


@torch.no_grad()
def test_only_layers_above_the_limit_are_touched() -> None:
    model = tiny("llama")
    model.model.layers[1].self_attn.k_proj.weight[:8] *= 30
    model.model.layers[1].self_attn.k_proj.weight[32:40] *= 30
    model.set_attn_implementation("sdpa")
    folded = fold(model, moments_of_text(model, IDS))
    for i, touched in ((0, False), (1, True)):
        a, b = (m.model.layers[i].self_attn.k_proj.weight for m in (model, folded))
        assert torch.equal(a, b) is not touched
    assert folded.model.layers[0].self_attn.o_proj.bias is None
    assert folded.config.attention_bias is False


@torch.no_grad()
def test_a_folded_model_can_be_saved(tmp_path: Path) -> None:
    model = hard("llama")
    folded = fold(model, moments_of_text(model, IDS))
    folded.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (loaded(IDS).logits - model(IDS).logits).abs().max() < TOLERANCE


def test_scales_are_alike_within_a_pair_and_keep_the_level() -> None:
    moments = moments_of_text(hard("llama"), IDS)[0]
    scale = key_scales(moments)
    assert torch.equal(scale[:, :32], scale[:, 32:])
    torch.testing.assert_close(scale.log().mean(1), torch.zeros(2, dtype=torch.float64))


def test_channels_nobody_uses_stay() -> None:
    model = hard("llama")
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(model.model.layers[0].self_attn, name).weight.view(-1, 64, 64)[:, [5, 37]] = 0
    scale = key_scales(moments_of_text(model, IDS)[0])
    assert torch.isfinite(scale).all()
    assert scale[:, [5, 37]].eq(1).all()


@torch.no_grad()
def test_a_constant_that_no_query_sees_is_scaled_away() -> None:
    """As the bias of a hard case: any constant there leaves every score as it is, and quantisation pays for it."""
    model = tiny("qwen2")
    model.set_attn_implementation("sdpa")
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.unflatten(0, (-1, 64))[:, [5, 37]] = 0
        projection.bias.view(-1, 64)[:, [5, 37]] = 0
    attention.k_proj.bias.view(-1, 64)[:, [5, 37]] = 40
    before = moments_of_text(model, IDS)[0]
    assert key_excess(before, "k4v4").min() > 5
    folded = fold(model, moments_of_text(model, IDS))
    after = moments_of_text(folded, IDS)[0]
    assert key_excess(after, "k4v4").max() < 1.1
    assert after.key[:, [5, 37]].sum() < 1e-3 * after.key.sum()
    assert (folded(IDS).logits - model(IDS).logits).abs().max() < TOLERANCE


def test_fused_projections_are_refused() -> None:
    model = tiny("phi3")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="layer 0 has no q_proj, k_proj, v_proj and o_proj"):
        fold(model, moments_of_text(model, IDS), limit=1.0)
