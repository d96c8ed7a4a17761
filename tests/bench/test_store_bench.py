"""The store benchmark's cases, checks and reports, on the CPU; what needs a GPU is run by the benchmark itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvturbo import KVFormat
from kvturbo.bench import report, timing
from kvturbo.bench import store as bench
from kvturbo.bench.running import run
from kvturbo.bench.store import CASES, Case, Inputs, Runner, eager_calls, store_table

SHAPE = {"what", "tokens", "format", "rotated", "kv_heads", "head_dim", "page_size"}
KEYS = SHAPE | {"kvturbo_us", "kvturbo_triton_us", "vllm_us", "equal_vectors", "rel_err"}
SMALL = {"kv_heads": 2, "head_dim": 64}


@pytest.fixture
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "POOL_PAGES", 12)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, small_pool: None) -> Runner:
    """One that runs the reference in the first column and nothing in the second, and whose clock always says 5."""
    monkeypatch.setattr(bench, "BACKENDS", {"kvturbo": "reference", "kvturbo_triton": "cuda"})
    monkeypatch.setattr(bench, "graph_us", lambda call, milliseconds: [call(), 5.0][1])
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    return Runner("cpu", log=lambda line: None)


def test_every_case_is_there_once_and_has_a_format_there_is() -> None:
    assert len(set(CASES)) == len(CASES)
    stores = {(case.format, case.tokens) for case in CASES if case.what == "store"}
    formats = ("k4v4", "k3v3", "k2v2", "k8v4", "k4v4-o16")
    assert stores == {(name, tokens) for name in formats for tokens in (1, 8, 32, 128, 1024, 8192)}
    assert {(case.format, case.rotated) for case in CASES if case.what == "gather"} >= {("k4v4", False), ("k4v4", True)}
    for case in CASES:
        assert KVFormat.from_name(case.format, case.head_dim)
        assert case.tokens <= bench.POOL_PAGES * case.page_size


def test_small_stores_are_of_many_sequences_and_large_ones_of_one(small_pool: None) -> None:
    few = Inputs(Case("store", 10, **SMALL), "cpu").slots
    assert len(set((few // 32).tolist())) == 10 and len(set((few % 32).tolist())) > 3
    many = Inputs(Case("store", 200, **SMALL), "cpu")
    assert many.slots.tolist() == [int(many.block_table[0, i // 32]) * 32 + i % 32 for i in range(200)]
    assert many.block_table.tolist() != [sorted(many.block_table[0].tolist())]


def test_rows_have_the_same_keys_and_name_what_is_missing(runner: Runner) -> None:
    rows: list[dict[str, Any]] = []
    cases = [
        Case("store", 8, **SMALL), Case("store", 200, "k4v4-o16", **SMALL), Case("gather", 200, rotated=True, **SMALL)
    ]  # fmt: skip
    assert run(cases, runner.row, 100, rows.append)
    assert all(set(row) == KEYS for row in rows)
    assert all(row["kvturbo_us"] == 5.0 and row["kvturbo_triton_us"] is row["vllm_us"] is None for row in rows)
    assert [row["equal_vectors"] for row in rows] == [1.0, 1.0, None] and rows[2]["rel_err"] == 0
    assert "NVIDIA GPU" in runner.skipped["kvturbo_triton"][0]
    assert "vLLM is not installed" in runner.skipped["vllm"][0] and len(runner.skipped["vllm"]) == 1
    assert not run(cases, runner.row, -1.0, rows.append) and len(rows) == 3
    text = store_table(rows)
    assert "gather rotated" in text and "100.0000%" in text and "k4v4-o16" in text


def spoilt(amount: float, times: int) -> Any:
    """A store that changes the first `times` keys by a factor before it stores them, unless it is the reference."""

    def store(k: torch.Tensor, v: torch.Tensor, *args: Any, backend: str, **options: Any) -> None:
        if backend != "reference":
            k = k.clone()
            k.flatten(0, 1)[:times, : k.shape[2] // 2] *= amount
        bench_store(k, v, *args, backend="reference", **options)

    bench_store = bench.store
    return store


@pytest.mark.parametrize("tokens,times,passes", [(8, 1, True), (8, 2, False), (250, 2, True), (250, 3, False)])
def test_a_store_may_differ_in_one_vector_and_in_one_of_a_thousand(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tokens: int, times: int, passes: bool
) -> None:
    monkeypatch.setattr(bench, "store", spoilt(3.0, times))
    inputs = Inputs(Case("store", tokens, **SMALL), "cpu")
    assert inputs.unequal_vectors("cuda") == times
    if passes:
        assert runner._check("cuda", inputs) == 1 - times / (4 * tokens)
    else:
        with pytest.raises(RuntimeError, match=f"{times} of {4 * tokens} vectors of the cuda store differ"):
            runner._check("cuda", inputs)


def test_a_store_into_other_slots_is_no_result(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, right = Inputs(Case("store", 8, **SMALL), "cpu"), bench.store

    def elsewhere(
        k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, *, backend: str, **options: Any
    ) -> None:
        right(k, v, pages, slots if backend == "reference" else slots ^ 1, backend="reference", **options)

    monkeypatch.setattr(bench, "store", elsewhere)
    with pytest.raises(RuntimeError, match="the cuda store changed the k of a slot that is not its own"):
        runner._check("cuda", inputs)


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_a_wrong_gather_is_no_result(runner: Runner, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    right = bench.gather

    def wrong(*args: Any, backend: str, **options: Any) -> Any:
        k, v = right(*args, backend="reference", **options)
        return (k, v if backend == "reference" else v * value)

    monkeypatch.setattr(bench, "gather", wrong)
    with pytest.raises(RuntimeError, match="of the cuda gather is above 1e-03"):
        runner._check("cuda", Inputs(Case("gather", 40, **SMALL), "cpu"))


def test_vllm_is_measured_once_per_number_of_tokens_and_must_store(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def reshape_and_cache_flash(k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any, *_: Any) -> None:
        calls.append(len(slots))
        k_cache.flatten(0, 1)[slots] = k
        if len(slots) > 1:
            v_cache.flatten(0, 1)[slots] = v

    operations = SimpleNamespace(reshape_and_cache_flash=reshape_and_cache_flash)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(_custom_ops=operations))
    monkeypatch.setattr(torch.ops, "_C_cache_ops", operations, raising=False)
    rows = [
        runner.row(Case("store", tokens, name, **SMALL)) for tokens, name in ((8, "k4v4"), (8, "k2v2"), (1, "k4v4"))
    ]
    assert [row["vllm_us"] for row in rows] == [5.0, 5.0, None]
    assert calls == [8, 8, 1]  # a check and a measurement, then a check that fails
    assert runner.skipped["vllm"] == ["vLLM's reshape_and_cache_flash did not store the keys and values it was given"]


def test_host_time_is_a_median_of_calls_that_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits, made = [0], [], []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(len(made)))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: clock[0])

    def call() -> None:
        made.append(1)
        clock[0] += 900_000 if len(made) <= 40 else 7_500  # slow while it warms up, and a little after

    assert timing.host_us({"store": call}) == {"store": 7.5}
    assert waits == [0, timing.HOST_CALLS + timing.HOST_WARMUP_CALLS]


def test_host_time_needs_the_cuda_backend(runner: Runner) -> None:
    assert runner.host_us(eager_calls, "cpu") is None and "NVIDIA GPU" in runner.skipped["host_us"][0]


def test_results_are_written_with_facts_and_rows(runner: Runner, tmp_path: Path) -> None:
    rows = [runner.row(Case("store", 2, **SMALL))]
    report.write(tmp_path / "store.json", rows, "abc", host_us={"store": 9.0}, skipped=runner.skipped, complete=True)
    data = json.loads((tmp_path / "store.json").read_text())
    assert data["commit"] == "abc" and data["host_us"] == {"store": 9.0} and data["rows"] == rows
