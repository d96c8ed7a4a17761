"""Registries find what lies in their package, and name it when asked for something else."""

from __future__ import annotations

import pytest

from kvturbo.eval.registry import BASELINES, METRICS, TASKS, Registry


def test_built_in_entries_are_found() -> None:
    assert {"text", "retrieval"} <= set(TASKS.names())
    assert {"kl", "same_top1", "nll"} <= set(METRICS.names())
    assert "16bit" in BASELINES.names()


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown task 'perplexty'; valid: .*retrieval.*text"):
        TASKS.get("perplexty")


def test_a_name_is_registered_once() -> None:
    registry: Registry[int] = Registry("thing", "kvturbo.eval.metrics")
    registry.register("one")(1)
    assert registry.get("one") == 1
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        registry.register("one")(2)
