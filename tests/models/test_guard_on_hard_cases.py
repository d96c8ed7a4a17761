"""The guard against the hard cases: without it the failure shows, with it the loss is that of a model without outliers."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import load_model
from kvturbo.eval.planning import PlanSpec
from kvturbo.eval.runner import Evaluation
from kvturbo.eval.tasks.text import TextTask
from kvturbo.guard import Plan, make_plan
from kvturbo.hf.calibration import moments_of_model, moments_of_text
from kvturbo.hf.fold import fold

TEXT = TextTask(texts=4, prefix=384, scored=192, chunk=64)
CALIBRATION = 1024
MOST = 1.2
"""Of the mean KL divergence that k4v4 has on a model without outliers."""


@lru_cache(maxsize=8)
def model(name: str) -> Any:
    """The embedded model or a hard case, loaded as for an evaluation."""
    loaded = load_model(device="cpu")
    if name == "plain":
        return loaded
    path = Path(__file__).resolve().parents[2] / "models" / "hard_cases.py"
    spec = importlib.util.spec_from_file_location("hard_cases", path)
    assert spec is not None and spec.loader is not None
    script = sys.modules.setdefault("hard_cases", importlib.util.module_from_spec(spec))
    if not hasattr(script, "CASES"):
        spec.loader.exec_module(script)
    return replace(loaded, model=(script.CASES | {"widen": script.widen})[name](loaded.model), name=name)


@lru_cache(maxsize=2)
def calibration_ids() -> torch.Tensor:
    return torch.from_numpy(model("plain").text[-CALIBRATION:].copy())[None]


def kl(loaded: Any, spec: CacheSpec) -> float:
    return Evaluation(loaded, {"text": TEXT}, [spec]).run()["tasks"]["text"]["caches"][spec.name]["kl_mean"]


@lru_cache(maxsize=8)
def unguarded(name: str) -> float:
    return kl(model(name), CacheSpec("k4v4"))


def plan_of(name: str, source: str) -> Plan:
    own = model(name).model
    return make_plan(moments_of_model(own) if source == "weights" else moments_of_text(own, calibration_ids()))


@pytest.mark.parametrize("source", ["weights", "text"])
def test_a_model_without_outliers_keeps_its_format(source: str) -> None:
    assert set(plan_of("plain", source).formats.values()) == {"k4v4"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, control, factor, source",
    [("key-bias", "widen", 5, "weights"), ("key-bias", "widen", 5, "text"), ("key-scale", "plain", 100, "weights")],
)
def test_the_guard_repairs_keys(name: str, control: str, factor: float, source: str) -> None:
    assert unguarded(name) > factor * unguarded(control)
    assert kl(model(name), PlanSpec("guarded", plan=plan_of(name, source))) < MOST * unguarded(control)


def test_only_the_biased_layers_get_more() -> None:
    formats = plan_of("key-bias", "weights").formats
    assert {i for i, name in formats.items() if name != "k4v4"} == {0, 5}
    assert all("-o" in formats[i] for i in (0, 5))


@pytest.mark.parametrize("name, factor", [("key-bias", 5), ("key-scale", 100), ("value-mean", 4)])
def test_folding_repairs_what_the_format_cannot(name: str, factor: float) -> None:
    assert unguarded(name) > factor * unguarded("plain")
    own = model(name)
    folded = replace(own, model=fold(own.model, moments_of_text(own.model, calibration_ids())))
    assert kl(folded, CacheSpec("k4v4")) < MOST * unguarded("plain")


def test_values_with_a_mean_are_kept_in_16_bits() -> None:
    for source in ("weights", "text"):
        assert set(plan_of("value-mean", source).formats.values()) == {"16bit"}
