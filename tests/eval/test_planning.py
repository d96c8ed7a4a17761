"""The plan within a budget is the best one, and a plan is measured as the cache that it makes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import load_model
from kvturbo.eval.planning import (
    BUCKETS,
    CHOICES,
    Choice,
    PlanSpec,
    best_within,
    choices_of,
    measure_losses,
    retrieval_passages,
    text_passages,
    uniform_plans,
)
from kvturbo.eval.retrieval import Setting
from kvturbo.eval.runner import Evaluation
from kvturbo.eval.simulated_plans import PlanSearch, question_rows, text_rows
from kvturbo.eval.tasks.text import TextTask
from kvturbo.guard import LayerPlan, Plan, make_plan, write_plan
from kvturbo.hf import TurboCache
from kvturbo.hf.calibration import moments_of_model
from kvturbo.hf.sizes import bits_per_element, cache_bytes

TOKENS = 1000


def test_the_best_sum_is_found() -> None:
    plan = Plan({i: LayerPlan("k4v4", heads, 64) for i, heads in enumerate((1, 2, 1, 4))})
    options = [Choice("16bit"), Choice("k4v4"), Choice("k3v2", 4, 32), Choice("k2v2", 4, 8)]
    rng = np.random.default_rng(0)
    losses = {i: dict(zip(options, [0.0, *sorted(rng.random(3))], strict=True)) for i in plan.layers}
    every = [
        (sum(losses[i][choice] for i, choice in enumerate(chosen)), cache_bytes(_plan(plan, chosen), TOKENS))
        for chosen in itertools.product(options, repeat=4)
    ]
    smallest, largest = min(size for _, size in every), max(size for _, size in every)
    for budget in np.linspace(smallest, largest, 7).astype(int) + 4 * largest // BUCKETS:
        found = best_within(plan, losses, int(budget), TOKENS)
        assert found is not None
        chosen = [Choice(x.format, x.sink or 0, x.recent or 0) for x in found.layers.values()]
        loss = sum(losses[i][choice] for i, choice in enumerate(chosen))
        assert cache_bytes(found, TOKENS) <= budget
        # Bytes are rounded up by at most a bucket per layer: what fits with that to spare is not missed.
        spare = int(budget) - 4 * (int(budget) // BUCKETS + 1)
        assert loss <= min(other for other, size in every if size <= spare) + 1e-12
    assert best_within(plan, losses, smallest - 1, TOKENS) is None


def _plan(plan: Plan, chosen: tuple[Choice, ...]) -> Plan:
    return Plan({i: choice.of(plan.layers[i]) for i, choice in enumerate(chosen)})


def test_layers_with_an_excess_may_have_outlier_channels() -> None:
    names = {choice.format for choice in choices_of(LayerPlan("k4v4", 1, 128, key_excess=9.0))}
    assert {"k4v4-o16", "k4v4-o32"} <= names
    assert {choice.format for choice in choices_of(LayerPlan("k4v4", 1, 128, key_excess=1.1))} == {
        choice.format for choice in CHOICES
    }


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(str(tiny_folder), device="cpu")


def test_a_loss_is_what_the_text_task_measures(loaded, tmp_path) -> None:
    base = make_plan(moments_of_model(loaded.model))
    write_plan(tmp_path / "a.json", _plan(base, (Choice("k2v2", 2, 8), Choice("16bit"))))
    spec = PlanSpec.read(tmp_path / "a.json")
    assert spec.name.startswith("a.json@")
    results = Evaluation(loaded, {"text": TextTask(1, 96, 32, 8)}, [CacheSpec("16bit"), spec]).run()
    measured = results["tasks"]["text"]["caches"][spec.name]["kl_mean"]
    passage = next(text_passages(loaded, 1, 96, 32, 8))
    assert measured > 0
    assert passage.loss(spec.plan) == pytest.approx(measured, rel=0.02)  # there the 16-bit cache rounds to bf16


def test_losses_of_layers_alone(loaded) -> None:
    base = make_plan(moments_of_model(loaded.model))
    setting = Setting("multikey", 160, records=6, questions=2, key_tokens=2, value_tokens=2)
    passages = [*text_passages(loaded, 1, 96, 16, 8), *retrieval_passages(loaded, setting, 1, 8)]
    options = [Choice("16bit"), Choice("k4v4"), Choice("k2v2")]
    seen: list[int] = []
    assert all(passage.loss(_plan(base, (Choice("16bit"),) * 2)) == 0 for passage in passages)
    losses = measure_losses(passages, base, dict.fromkeys(base.layers, options), lambda: seen.append(1))
    assert len(seen) == 4
    for own in losses.values():
        assert 0 == own[options[0]] < own[options[1]] < own[options[2]]
    assert list(uniform_plans(base, losses)) == ["16bit", "k4v4", "k2v2"]


def test_windows_given_beside_a_plan_count(loaded) -> None:
    plan = _plan(make_plan(moments_of_model(loaded.model)), (Choice("k3v2", 4, 8), Choice("k4v4")))
    own, given = PlanSpec("p", plan=plan), PlanSpec("p", recent=5, sink=1, plan=plan)
    assert own.packed_tokens(loaded.model.config, 100) == 88 + 100
    assert given.packed_tokens(loaded.model.config, 100) == 2 * 94
    for spec, wanted in ((own, 188), (given, 188)):
        cache = spec.new(loaded)
        assert isinstance(cache, TurboCache)
        _fill(loaded, cache)
        assert cache.packed_tokens == wanted == spec.packed_tokens(loaded.model.config, 100)


@torch.inference_mode()
def _fill(loaded, cache: TurboCache) -> None:
    loaded.model.set_attn_implementation("kvturbo")
    loaded.model(torch.from_numpy(loaded.text[:100])[None], past_key_values=cache, use_cache=True)
    loaded.model.set_attn_implementation("sdpa")


def test_a_text_that_is_too_short(loaded) -> None:
    with pytest.raises(ValueError, match="at least prefix . scored = 100100 tokens"):
        next(text_passages(loaded, 1, 100_000, 100, 8))


def test_simulated_rows_have_the_losses_of_packed_caches(loaded) -> None:
    """The same tokens through codecs and through caches; a simulation rounds raw keys and values to bf16, which is the rest."""
    base = make_plan(moments_of_model(loaded.model))
    plan = _plan(base, (Choice("k3v2", 2, 8), Choice("k2v2")))
    passage = next(text_passages(loaded, 1, 96, 32, 8))
    ids = loaded.text[:128].copy()
    ids[0] = loaded.tokenizer.bos_token_id
    rows = text_rows(loaded.model, torch.from_numpy(ids)[None], 96, 8)
    assert rows.loss(plan) == pytest.approx(passage.loss(plan), rel=0.02)
    setting = Setting("multikey", 160, records=6, questions=2, key_tokens=2, value_tokens=2)
    passages = list(retrieval_passages(loaded, setting, 3, 1 << 10))
    together = question_rows(loaded, setting, 3)
    assert together.loss(plan) == pytest.approx(sum(p.loss(plan) for p in passages) / 3, rel=0.05)
    assert together.loss(_plan(base, (Choice("16bit"),) * 2)) == 0


def test_a_plan_is_found_by_simulation(loaded) -> None:
    base = make_plan(moments_of_model(loaded.model))
    rows = [text_rows(loaded.model, torch.from_numpy(loaded.text[None, :800].copy()), 600, 64)]
    search = PlanSearch(rows, base)
    plan = search.find(4.5, 800)
    assert bits_per_element(plan, 800) <= 4.5
    others = [Plan({i: Choice(name).of(layer) for i, layer in base.layers.items()}) for name in ("k4v4", "k4v3")]
    assert rows[0].loss(plan) <= min(rows[0].loss(other) for other in others)
    with pytest.raises(ValueError, match="no plan takes at most 1.5 bits per element at 800 tokens"):
        search.find(1.5, 800)
