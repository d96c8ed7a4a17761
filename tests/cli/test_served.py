"""`kvturbo eval --server` asks servers, continues where it was cut, and says in one line what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import FakeVllm, Refused, serving
from kvturbo.cli.eval import _text
from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import load_model

CHUNK = ("--server-chunk", "64")
SMALL = ("--set", "text.texts=2", "--set", "text.prefix=64", "--set", "text.scored=40")


@pytest.fixture
def packed(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    loaded = load_model(str(tiny_folder), device="cpu")
    return FakeVllm(loaded, CacheSpec("k2v2", recent=0, sink=0), 64, 64, "turboquant")


@pytest.fixture
def urls(packed: FakeVllm) -> Iterator[tuple[str, str]]:
    with serving(packed) as url, serving(FakeVllm(packed.loaded, CacheSpec("16bit"), 64, 64)) as reference:
        yield url, reference


@pytest.fixture
def evaluate(kvturbo: Any, tiny_folder: Path, tmp_path: Path) -> Any:
    def command(*arguments: object) -> Any:
        return kvturbo("eval", "--model", tiny_folder, "--out", tmp_path / "results.json", *arguments)

    return command


def test_two_servers_are_compared(evaluate: Any, urls: tuple[str, str], tmp_path: Path) -> None:
    url, reference = urls
    ran = evaluate("--server", url, "--reference", reference, "--tasks", "text", *CHUNK, *SMALL, "--json")
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "results.json").read_text()) == ran.data
    task = ran.data["tasks"]["text"]
    assert task["options"] == {"texts": 2, "prefix": 64, "scored": 40, "chunk": 64}
    rows = task["caches"]
    assert rows["16bit"]["kl_lower_bound_mean"] == 0 < rows["turboquant"]["kl_lower_bound_mean"]
    assert (
        rows["turboquant"]["packed_tokens_read_per_layer"] == 2 * 64
        and rows["turboquant"]["sources"][0]["server"] == url
    )


def test_one_server_after_another_fills_one_table(evaluate: Any, urls: tuple[str, str]) -> None:
    url, reference = urls
    first = evaluate("--server", reference, "--tasks", "text", *CHUNK, *SMALL)
    assert first.code == 0 and "turboquant" not in first.out
    out = evaluate("--server", url, "--tasks", "text", *CHUNK, *SMALL).out
    header, _, *rows = [line.split() for line in out.splitlines()[1:5]]
    assert "kl_lower_bound_p99.9" in header and "packed_tokens_read_per_layer" in header and "sources" not in header
    assert sorted(row[0] for row in rows) == ["16bit", "turboquant"]
    assert all(len(row) == len(header) for row in rows) and "results.json" in out


def test_a_row_without_some_figures_has_dashes() -> None:
    rows = {
        "turboquant": {"nll": 1.5, "prompts": 1, "sources": []},
        "16bit": {"nll": 1.25, "same_top1": 1.0, "prompts": 2},
    }
    lines = _text({"tasks": {"text": {"options": {}, "caches": rows}}}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["cache", "nll", "same_top1"],
        ["----------", "----", "---------"],
        ["turboquant", "1.5", "-"],
        ["16bit", "1.25", "1"],
    ]


def test_what_a_server_says_is_one_line(evaluate: Any, urls: tuple[str, str], packed: FakeVllm) -> None:
    packed.refuse = {1: Refused(500, "out of\nmemory")}
    ran = evaluate("--server", urls[0], "--tasks", "text", *CHUNK, *SMALL)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == f"kvturbo eval: {urls[0]}/v1/completions: HTTP 500: out of memory"


def test_a_run_that_failed_is_continued(evaluate: Any, urls: tuple[str, str], packed: FakeVllm, tmp_path: Path) -> None:
    packed.refuse = {2: Refused(503, "busy")}
    arguments = ("--server", urls[0], "--tasks", "text", *CHUNK, *SMALL, "--json")
    assert evaluate(*arguments).code == 1
    assert json.loads((tmp_path / "results.json").read_text())["tasks"]["text"]["caches"]["turboquant"]["prompts"] == 1
    ran = evaluate(*arguments)
    assert ran.code == 0 and ran.data["tasks"]["text"]["caches"]["turboquant"]["prompts"] == 2
    assert len(packed.requests) == 3


def test_a_server_that_is_not_there_fails(evaluate: Any, urls: tuple[str, str], tmp_path: Path) -> None:
    ran = evaluate("--server", "http://127.0.0.1:9", "--tasks", "generation")
    assert (ran.code, ran.out) == (1, "") and "http://127.0.0.1:9 can't be reached" in ran.err.splitlines()[-1]
    assert list(tmp_path.glob("*.json*")) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--tasks", "text"), ("task text needs --server-chunk N", "--max-num-batched-tokens")),
        (("--served-model", "other"), ("serves no model 'other'", "served/model")),
        (("--server-dtype", "fp8"), ("has --kv-cache-dtype turboquant, not fp8",)),
        (("--formats", "k4v4"), ("--formats can't be given with --server",)),
        (("--dtype", "bfloat16"), ("--dtype can't be given with --server",)),
        (("--plot", "p.png"), ("--plot can't be given with --server",)),
        (("--timeout", "0"), ("--timeout must be a number of seconds above 0, got 0",)),
        (("--timeout", "nan"), ("--timeout must be a number of seconds above 0, got nan",)),
        (("--concurrency", "0"), ("concurrency must be at least 1, got 0",)),
        (("--tasks", "text", *CHUNK, "--set", "text.chunk=32"), ("chunk is what --server-chunk says, 64, got 32",)),
        (("--tasks", "song"), ("unknown task 'song'", "retrieval")),
        (("--tasks", "generation", "--set", "generation.prefix=9000"), ("context of 8192",)),
    ],
)
def test_bad_input_ends_with_2_before_anything_is_asked(
    evaluate: Any, urls: tuple[str, str], packed: FakeVllm, tmp_path: Path, arguments: Any, words: Any
) -> None:
    ran = evaluate("--server", urls[0], *arguments)
    assert (ran.code, ran.out) == (2, "")
    last = ran.err.splitlines()[-1]
    assert last.startswith("kvturbo eval: ") and all(word in last for word in words), last
    assert list(tmp_path.glob("*.json*")) == [] and packed.requests == []


def test_options_of_servers_need_one(evaluate: Any) -> None:
    ran = evaluate("--reference", "http://localhost:8001")
    assert ran.code == 2 and "--reference needs --server" in ran.err
    assert "--server-chunk needs --server" in evaluate(*CHUNK).err


def test_tasks_that_the_tokenizers_folder_has_no_files_for_are_left_out(
    evaluate: Any, urls: tuple[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(tiny_folder, folder)
    (folder / "retrieval.json").unlink()
    options = ("--set", "generation.texts=1", "--set", "generation.prefix=64", "--set", "generation.new=2")
    ran = evaluate("--model", folder, "--server", urls[0], *CHUNK, *SMALL, *options, "--json")
    assert ran.code == 0 and sorted(ran.data["tasks"]) == ["generation", "text"], ran.err
    assert f"left out frequent, retrieval: model '{folder}' has no retrieval.json" in ran.err
