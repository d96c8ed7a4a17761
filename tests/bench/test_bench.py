"""The benchmark's cases, providers and reports; what needs a GPU is run by the benchmark itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvturbo import KVFormat
from kvturbo.bench import report
from kvturbo.bench.decode import CASES, Runner
from kvturbo.bench.registry import PROVIDERS, Case
from kvturbo.bench.running import checked_commit, run

SHAPE = {"batch", "context", "kv_heads", "group", "head_dim", "q_len", "format", "ragged", "page_size", "recent"}
KEYS = SHAPE | {"rel_err", "gb_per_s"}


def test_providers_are_the_columns_of_the_results() -> None:
    assert set(PROVIDERS.names()) >= {"fa3_bf16", "fa3_fp8", "vllm_tq", "kvturbo", "kvturbo_triton"}
    with pytest.raises(ValueError, match="unknown provider 'fa4'; valid: .*fa3_bf16"):
        PROVIDERS.get("fa4")


def test_every_case_is_a_shape_and_a_format_there_is() -> None:
    cases = [case for group in CASES.values() for case in group]
    assert len(set(cases)) == len(cases)
    for case in cases:
        assert KVFormat.from_name(case.format, case.head_dim)
        assert len(case.lengths()) == case.batch and max(case.lengths()) <= case.context


def test_ragged_lengths_are_spread_over_the_decades_and_always_the_same() -> None:
    case = Case(64, 65536, ragged=True)
    lengths = case.lengths()
    assert lengths == case.lengths() and min(lengths) >= case.SHORTEST
    assert 10 <= sum(length < 1024 for length in lengths) <= 35


def test_other_providers_are_measured_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(self: Runner, name: str, inputs: Any) -> float:
        measured.append((name, inputs.case.format, inputs.case.recent))
        return 10.0

    class FakeInputs:
        def __init__(self, case: Case) -> None:
            self.case, self.lengths = case, case.lengths()
            self.fmt = KVFormat.from_name(case.format, case.head_dim)

        def error(self, backend: str) -> float:
            return 1e-5

    monkeypatch.setattr(Runner, "_measured", measure)
    monkeypatch.setattr("kvturbo.bench.decode.Inputs", FakeInputs)
    rows: list[dict[str, Any]] = []
    runner = Runner(["fa3_bf16", "kvturbo"])
    assert run([Case(2, 100), Case(2, 100, format="k2v2"), Case(2, 100, recent=8)], runner.row, 100, rows.append)
    ours = [("kvturbo", "k4v4", 0), ("kvturbo", "k2v2", 0), ("kvturbo", "k4v4", 8)]
    assert measured == [("fa3_bf16", "k4v4", 0), *ours]
    assert all(set(row) == KEYS | {"fa3_bf16_us", "kvturbo_us"} for row in rows)
    assert rows[0]["gb_per_s"] == pytest.approx(2 * 100 * 8 * 132 / 10e3)
    assert not run([Case(2, 100)], runner.row, -1.0, rows.append) and len(rows) == 3
    table = report.decode_table(rows, ["fa3_bf16", "kvturbo"])
    assert "k2v2" in table and "k4v4+8" in table


def test_a_wrong_result_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class WrongInputs:
        def __init__(self, case: Case) -> None:
            self.case = case

        def error(self, backend: str) -> float:
            return float("nan")

    monkeypatch.setattr(Runner, "_measured", lambda *_: 1.0)
    monkeypatch.setattr("kvturbo.bench.decode.Inputs", WrongInputs)
    with pytest.raises(RuntimeError, match="relative error nan is above 1e-03"):
        Runner(["kvturbo"]).row(Case(1, 10))


@pytest.mark.parametrize(
    "found,given,dirty,wanted",
    [
        ("abc", None, False, "abc"), (None, "def", False, "def"), ("abc-dirty", None, True, "abc-dirty"),
        (None, None, False, "say which commit"), ("abc-dirty", None, False, "has changes that are in no commit"),
        ("abc", "def", False, "is not the checkout's commit abc"),
    ],
)  # fmt: skip
def test_results_name_the_commit_they_belong_to(
    monkeypatch: pytest.MonkeyPatch, found: str | None, given: str | None, dirty: bool, wanted: str
) -> None:
    monkeypatch.setattr(report, "commit", lambda: found)
    if " " in wanted:
        with pytest.raises(ValueError, match=wanted):
            report.checked_commit(given, allow_dirty=dirty)
    else:
        assert report.checked_commit(given, allow_dirty=dirty) == wanted


def test_a_written_file_holds_environment_facts_and_rows(tmp_path: Path) -> None:
    report.write(tmp_path / "x.json", [{"batch": 1}], "abc", copy_gb_per_s=4.0)
    data = json.loads((tmp_path / "x.json").read_text())
    assert data["commit"] == "abc" and data["copy_gb_per_s"] == 4.0 and data["rows"] == [{"batch": 1}]
    assert data["versions"]["torch"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_benchmark_without_a_gpu_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        checked_commit(argparse.Namespace(commit=None, allow_dirty=True))
