"""An evaluation continues where it stopped, and never mixes settings."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.runner import Evaluation


@dataclass
class CountingTask:
    """Gives the prompt's number and remembers what it was asked; stops at `stop_at`."""

    prompts: int = 4

    def __post_init__(self) -> None:
        self.asked: list[tuple[int, tuple[str, ...]]] = []
        self.stop_at: int | None = None

    def count(self) -> int:
        return self.prompts

    def check(self, loaded: LoadedModel) -> None:
        assert loaded.name

    def measure(self, loaded: LoadedModel, index: int, specs: list[CacheSpec]) -> dict[str, Any]:
        if index == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((index, tuple(spec.name for spec in specs)))
        facts = {"cache_tokens": 10, "cache_bytes": 100 * (index + 1), "packed_tokens_read": 5}
        return {spec.name: {"number": index} | facts for spec in specs}

    def summarise(self, records: list[Any]) -> dict[str, Any]:
        return {"numbers": [record["number"] for record in records]}


SPECS = [CacheSpec("16bit"), CacheSpec("k4v4")]


def run(tiny: LoadedModel, task: CountingTask, specs: list[CacheSpec], path: Path | None) -> dict[str, Any]:
    return Evaluation(tiny, {"counting": task}, specs, path).run()


def test_an_interrupted_run_continues_with_the_next_prompt(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    cut = CountingTask()
    cut.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        run(tiny, cut, SPECS, path)
    assert json.loads(path.read_text())["tasks"]["counting"]["caches"]["k4v4"]["numbers"] == [0, 1]
    again = CountingTask()
    results = run(tiny, again, SPECS, path)
    assert [index for index, _ in again.asked] == [2, 3]
    figures = results["tasks"]["counting"]["caches"]["k4v4"]
    assert figures == {"numbers": [0, 1, 2, 3], "prompts": 4, "bytes_per_token": 25.0, "packed_tokens_read": 20}
    assert json.loads(path.read_text())["tasks"] == results["tasks"]


def test_a_finished_run_measures_nothing_again(tiny: LoadedModel, tmp_path: Path) -> None:
    run(tiny, CountingTask(), SPECS, tmp_path / "out.json")
    again = CountingTask()
    run(tiny, again, SPECS, tmp_path / "out.json")
    assert again.asked == []


def test_a_new_cache_is_measured_alone(tiny: LoadedModel, tmp_path: Path) -> None:
    run(tiny, CountingTask(), SPECS, tmp_path / "out.json")
    again = CountingTask()
    results = run(tiny, again, [*SPECS, CacheSpec("k2v2")], tmp_path / "out.json")
    assert again.asked == [(i, ("k2v2",)) for i in range(4)]
    assert list(results["tasks"]["counting"]["caches"]) == ["16bit", "k4v4", "k2v2"]


def test_other_options_of_a_task_are_measured_afresh(tiny: LoadedModel, tmp_path: Path) -> None:
    run(tiny, CountingTask(), SPECS, tmp_path / "out.json")
    again = CountingTask(prompts=3)
    run(tiny, again, SPECS, tmp_path / "out.json")
    assert [index for index, _ in again.asked] == [0, 1, 2]


def test_a_line_cut_in_the_middle_is_measured_again(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run(tiny, CountingTask(), SPECS, path)
    journal = path.with_suffix(".records.jsonl")
    journal.write_bytes(journal.read_bytes()[:-20])
    again = CountingTask()
    run(tiny, again, SPECS, path)
    assert [index for index, _ in again.asked] == [3]
    last = CountingTask()
    run(tiny, last, SPECS, path)
    assert last.asked == []


def test_results_of_other_settings_are_refused_with_the_difference(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run(tiny, CountingTask(), SPECS, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="written with other settings: model was .*, is 'another'"):
        run(replace(tiny, name="another"), CountingTask(), SPECS, path)
    with pytest.raises(ValueError, match="windows was"):
        run(tiny, CountingTask(), [SPECS[0], CacheSpec("k4v4", recent=64)], path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_journal_is_left_alone(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    other = path.with_suffix(".records.jsonl")
    other.write_text("notes of mine\n")
    with pytest.raises(ValueError, match="not a journal"):
        run(tiny, CountingTask(), SPECS, path)
    assert other.read_text() == "notes of mine\n"


def test_without_a_path_nothing_is_written(tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tiny, CountingTask(), SPECS, None)["tasks"]["counting"]["caches"]["16bit"]["numbers"] == [0, 1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_packed_formats_are_added_to_a_run_without_any(tiny: LoadedModel, tmp_path: Path) -> None:
    run(tiny, CountingTask(), SPECS[:1], tmp_path / "out.json")
    again = CountingTask()
    run(tiny, again, SPECS, tmp_path / "out.json")
    assert again.asked == [(i, ("k4v4",)) for i in range(4)]


@pytest.mark.parametrize("line", ['{"task": "counting"}', "[1, 2]", '{"task": "a", "index": 0, "records": 3}', "null"])
def test_a_line_that_is_no_record_is_shown(tiny: LoadedModel, tmp_path: Path, line: str) -> None:
    path = tmp_path / "out.json"
    run(tiny, CountingTask(prompts=1), SPECS, path)
    journal = path.with_suffix(".records.jsonl")
    before = journal.read_text() + line + "\n"
    journal.write_text(before)
    with pytest.raises(ValueError, match="out.records.jsonl is not a journal of kvturbo eval: line 3 is ") as raised:
        run(tiny, CountingTask(), SPECS, path)
    assert line in str(raised.value) and journal.read_text() == before


@pytest.mark.parametrize("text", ["", "[1]\n", "{}\n"])
def test_a_journal_without_settings_is_refused(tiny: LoadedModel, tmp_path: Path, text: str) -> None:
    (tmp_path / "out.records.jsonl").write_text(text)
    with pytest.raises(ValueError, match="not a journal of kvturbo eval: its first line has no settings"):
        run(tiny, CountingTask(), SPECS, tmp_path / "out.json")


def test_results_can_not_be_a_folder(tiny: LoadedModel, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    task = CountingTask()
    with pytest.raises(IsADirectoryError, match="results must go to a file, got the folder .*results"):
        run(tiny, task, SPECS, folder)
    assert task.asked == [] and list(tmp_path.iterdir()) == [folder]
