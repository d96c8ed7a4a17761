"""A plan decides formats, windows and channels by layer; moments of a text are those of the keys that a cache gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf.models import feed, prompt, tiny
from kvturbo.guard import LayerPlan, Plan, make_plan, write_plan
from kvturbo.hf import TurboCache
from kvturbo.hf.calibration import moments_of_model, moments_of_text

FAMILIES = ["llama", "qwen2", "qwen3", "gemma3", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_of_a_text_are_those_of_the_cached_keys_and_values(family: str) -> None:
    model, ids = tiny(family), prompt(2, 7)
    model.set_attn_implementation("sdpa")
    moments = moments_of_text(model, ids)
    assert model.config._attn_implementation == "sdpa"
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    assert sorted(moments) == [i for i in range(len(cache.layers)) if not cache.layers[i].is_sliding]
    for i, own in moments.items():
        k, v = cache.layers[i].keys.double(), cache.layers[i].values.double()
        torch.testing.assert_close(own.key, k.square().mean((0, 2)))
        torch.testing.assert_close(own.value, v.square().mean((0, 2)))
        torch.testing.assert_close(own.value_mean, v.mean((0, 2)))


def test_queries_of_a_group_are_averaged() -> None:
    model = tiny("llama")
    for layer in model.model.layers:
        weight = layer.self_attn.q_proj.weight.data.view(4, 64, 64)
        weight[1], weight[3] = 0, 2 * weight[2]
    model.set_attn_implementation("sdpa")
    query = moments_of_text(model, prompt(1, 40))[0].query
    weights = moments_of_model(model)[0].query
    for moment in (query, weights):
        assert moment.shape == (2, 64)
    with torch.no_grad():
        hidden = model.model.layers[0].input_layernorm(model.model.embed_tokens(prompt(1, 40)))
        q = model.model.layers[0].self_attn.q_proj(hidden).double().view(-1, 4, 64).square().mean(0)
    torch.testing.assert_close(query.sum(1), q.view(2, 2, 64).mean(1).sum(1), rtol=1e-4, atol=0)


def test_formats_windows_and_channels_are_the_plans(tmp_path: Path) -> None:
    model = tiny("llama")
    moments = moments_of_model(model)
    planned = make_plan(moments).layers
    plan = Plan({
        0: replace(planned[0], format="k3v2-o16", sink=2, recent=8),
        1: replace(planned[1], format="k4v4", sink=0, recent=16),
    })  # fmt: skip
    write_plan(tmp_path, plan)
    cache = TurboCache(model.config, plan=tmp_path)
    specs = {group.layers[0]: group.spec for group in cache.store.groups}
    assert {i: (spec.fmt.name, spec.sink, spec.recent) for i, spec in specs.items()} == {
        0: ("k3v2-o16", 2, 8),
        1: ("k4v4", 0, 16),
    }
    assert cache.store.groups[0].outlier_channels[0].tolist() == planned[0].channels[16]
    model.set_attn_implementation("kvturbo")
    by_plan = feed(model, cache, prompt(1, 60), [40, 1, 1, 18])
    by_hand = TurboCache(
        model.config, {0: "k3v2-o16", 1: "k4v4"}, sink={0: 2, 1: 0}, recent={0: 8, 1: 16}, outlier_channels=plan.own_channels()
    )  # fmt: skip
    assert torch.equal(feed(model, by_hand, prompt(1, 60), [40, 1, 1, 18]), by_plan)


def test_what_is_given_beside_the_plan_counts() -> None:
    model = tiny("llama")
    plan = make_plan(moments_of_model(model))
    cache = TurboCache(model.config, "k2v2-o16", plan=plan, sink=1, recent=2)
    assert [(g.layers, g.spec.fmt.name, g.spec.sink, g.spec.recent) for g in cache.store.groups] == [
        ([0, 1], "k2v2-o16", 1, 2)
    ]


def test_layers_in_16_bits_and_a_saved_cache(tmp_path: Path) -> None:
    model = tiny("llama")
    planned = make_plan(moments_of_model(model)).layers
    plan = Plan({0: replace(planned[0], format="16bit"), 1: replace(planned[1], format="k3v2", sink=1, recent=5)})
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, plan=plan)
    ids = prompt(1, 50)
    feed(model, cache, ids[:, :40], [40])
    assert cache.packed_tokens == 34
    cache.save(tmp_path / "cache.safetensors")
    loaded = TurboCache.load(tmp_path / "cache.safetensors", model.config)
    assert [(g.spec.fmt.name, g.spec.sink, g.spec.recent) for g in loaded.store.groups] == [("k3v2", 1, 5)]
    assert torch.equal(feed(model, loaded, ids[:, 40:], [1, 9]), feed(model, cache, ids[:, 40:], [1, 9]))


@pytest.mark.parametrize(
    "layers, words",
    [
        ({0: LayerPlan("k4v4", 2, 64)}, r"another model: layers \[1\]"),
        ({0: LayerPlan("k4v4", 2, 64), 1: LayerPlan("k4v4", 4, 64)}, r"layers \[1\] .*num_kv_heads=4.*num_kv_heads=2"),
        ({i: LayerPlan("k4v4", 2, 64) for i in range(3)}, r"layers \[2\]"),
    ],
)
def test_a_plan_for_another_model_is_refused(layers: dict[int, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TurboCache(tiny("llama").config, plan=Plan(layers))


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no plan"):
        TurboCache(tiny("llama").config, plan=tmp_path / "kvturbo.json")


def test_ids_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"input_ids must be \[rows, tokens\].*\[5\]"):
        moments_of_text(tiny("llama"), prompt(1, 5)[0])
