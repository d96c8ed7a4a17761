"""`kvturbo eval` runs tasks over formats, and picks up where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvturbo.cli.eval import build_tasks, plot_rows
from kvturbo.eval.registry import TASKS

SMALL = ("--set", "text.texts=1", "--set", "text.prefix=64", "--set", "text.scored=16", "--set", "text.chunk=8")


@pytest.fixture
def evaluate(kvturbo, tiny_folder: Path, tmp_path: Path):
    def command(*arguments: object):
        return kvturbo("eval", "--model", tiny_folder, "--out", tmp_path / "results.json", *arguments)

    return command


def test_results_are_printed_and_written(evaluate, tmp_path: Path) -> None:
    ran = evaluate("--tasks", "text", "--formats", "16bit", "k4v4", *SMALL, "--json")
    assert ran.code == 0
    assert json.loads((tmp_path / "results.json").read_text()) == ran.data
    caches = ran.data["tasks"]["text"]["caches"]
    assert caches["16bit"]["kl_mean"] == 0 < caches["k4v4"]["kl_mean"] <= caches["k4v4"]["kl_p99.9"]
    assert caches["k4v4"]["scored_tokens"] == 16
    assert caches["k4v4"]["bytes_per_token"] < caches["16bit"]["bytes_per_token"]
    assert ran.data["tasks"]["text"]["options"] == {"texts": 1, "prefix": 64, "scored": 16, "chunk": 8}


def test_a_second_run_adds_only_what_is_new(evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate("--tasks", "text", "--formats", "16bit", "k4v4", *SMALL, "--json").data
    task, asked = type(TASKS.get("text")()), []
    measure = task.measure

    def noted(self: Any, loaded: Any, index: int, specs: Any) -> Any:
        asked.append([spec.name for spec in specs])
        return measure(self, loaded, index, specs)

    monkeypatch.setattr(task, "measure", noted)
    second = evaluate("--tasks", "text", "--formats", "16bit", "k4v4", "k2v2", *SMALL, "--json").data
    assert asked == [["k2v2"]]
    assert second["tasks"]["text"]["caches"]["k4v4"] == first["tasks"]["text"]["caches"]["k4v4"]


def test_text_output_has_a_row_per_cache(evaluate) -> None:
    out = evaluate("--tasks", "text", "--formats", "16bit", "k3v3", *SMALL).out
    assert "kl_mean" in out and "k3v3" in out and "results.json" in out


def test_a_plot_is_drawn_from_text_and_retrieval(evaluate, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'kvturbo[eval]'")
    setting = ("--set", "retrieval.setting=multikey-1k", "--set", "retrieval.prompts=1")
    plot = tmp_path / "plot.png"
    arguments = (
        "--tasks",
        "text",
        "retrieval",
        "--formats",
        "16bit",
        "kivi2",
        *SMALL,
        *setting,
        "--plot",
        plot,
        "--json",
    )
    ran = evaluate(*arguments)
    assert ran.code == 0 and plot.read_bytes().startswith(b"\x89PNG")
    rows = {row["format"]: row for row in plot_rows(ran.data)}
    assert rows["kivi2"]["retrieval"]["multikey-1k"]["questions"] == 8
    assert rows["kivi2"]["bytes_per_token"] == ran.data["tasks"]["text"]["caches"]["kivi2"]["bytes_per_token"]


def test_tasks_are_listed_with_their_options(kvturbo) -> None:
    assert kvturbo("eval", "--list", "--json").data["text"]["chunk"] == 64
    assert "--set text.chunk=64" in kvturbo("eval", "--list").out


def test_options_are_converted_to_the_type_of_their_default() -> None:
    tasks = build_tasks(["retrieval"], ["retrieval.setting=needle-4k", "retrieval.prompts=3"])
    assert (tasks["retrieval"].setting, tasks["retrieval"].prompts) == ("needle-4k", 3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--tasks", "spelling"), ("spelling", "retrieval", "text")),
        (("--formats", "k9v9"), ("k9v9", "16bit", "k4v4")),
        (("--set", "text.chunk"), ("TASK.OPTION=VALUE", "text.chunk")),
        (("--set", "text.size=3"), ("text.size=3", "texts, prefix, scored, chunk")),
        (("--set", "song.size=3"), ("song.size=3", "task must be one of")),
        (("--set", "text.chunk=many"), ("many", "64")),
        (("--set", "text.chunk=0"), ("chunk must be at least 1", "got 0")),
        (("--set", "retrieval.setting=easy"), ("easy", "multikey-4k")),
        (("--set", "text.prefix=9000"), ("context of 8192", "10024")),
        (("--text", "/no/such/text"), ("/no/such/text",)),
        (("--set", "retrieval.seed=-1"), ("seed must not be negative, got -1",)),
        (("--set", "frequent.seed=-1"), ("seed must not be negative, got -1",)),
        (("--sink", "-1"), ("sink", "-1")),
        (("--plans", "/no/plan.json"), ("no plan /no/plan.json",)),
        (("--dtype", "int8"), ("eval: dtype must be one of auto, float32, bfloat16, float16, got 'int8'",)),
        (("--plot", "plot.jpeg2000"), ("--plot must end in one of", ".png", "plot.jpeg2000")),
        (("--plot", "/dev/null/plot.png"), ("--plot: /dev/null is not a folder",)),
        (("--tasks", "text", "--plot", "p.png"), ("--plot needs the tasks text and retrieval", "missing: retrieval")),
    ],
)
def test_bad_input_ends_with_2_before_anything_is_written(
    evaluate, tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    ran = evaluate(*arguments)
    assert (ran.code, ran.out) == (2, "")
    last = ran.err.splitlines()[-1]
    assert last.startswith("kvturbo eval: ") and all(word in last for word in words)
    assert list(tmp_path.glob("*.json*")) == []


def test_results_of_another_model_are_not_mixed_in(evaluate, tmp_path: Path) -> None:
    evaluate("--tasks", "text", "--formats", "16bit", *SMALL)
    ran = evaluate("--tasks", "text", "--formats", "16bit", *SMALL, "--dtype", "bfloat16")
    assert ran.code == 2 and "dtype was 'float32', is 'bfloat16'" in ran.err


@pytest.fixture
def plain_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model as others have them: without retrieval.json."""
    folder = tmp_path / "plain"
    shutil.copytree(tiny_folder, folder)
    (folder / "retrieval.json").unlink()
    return folder


def test_tasks_that_a_model_has_no_files_for_are_left_out_by_name(evaluate, plain_folder: Path) -> None:
    small = (*SMALL, "--set", "generation.texts=1", "--set", "generation.prefix=64", "--set", "generation.new=2")
    ran = evaluate("--model", plain_folder, "--formats", "16bit", "k4v4", *small, "--json")
    assert ran.code == 0 and list(ran.data["tasks"]) == ["generation", "text"]
    assert f"left out frequent, retrieval: model '{plain_folder}' has no retrieval.json" in ran.err


@pytest.mark.parametrize(
    "arguments", [("--tasks", "text", "retrieval"), ("--set", "retrieval.prompts=1"), ("--plot", "plot.png")]
)
def test_a_task_that_was_asked_for_is_not_left_out(evaluate, plain_folder: Path, arguments: tuple[str, ...]) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'kvturbo[eval]'")
    ran = evaluate("--model", plain_folder, *arguments)
    assert ran.code == 2 and ran.err.splitlines()[-1].endswith("has no retrieval.json, which the retrieval task needs")


@pytest.mark.parametrize(
    "out, words", [("", "--out must be a file, got the folder"), ("file/x.json", "file is not a folder")]
)
def test_results_that_can_not_be_written_are_seen_before_the_work(
    evaluate, tmp_path: Path, out: str, words: str
) -> None:
    (tmp_path / "file").write_text("mine")
    ran = evaluate("--out", tmp_path / out)
    assert ran.code == 2 and ran.err.count("\n") == 1 and words in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
