"""`kvturbo plan` keeps to its budget, measures what it says, and writes a plan that a cache takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvturbo.guard import read_plan
from kvturbo.hf.sizes import bits_per_element, cache_bytes
from tiny_model import LAYERS

SMALL = ("--prompts", 1, "--prefix", 192, "--scored", 16, "--retrieval", 4096)


@pytest.fixture(scope="module")
def without_retrieval(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    target = tmp_path_factory.mktemp("plain") / "model"
    shutil.copytree(tiny_folder, target)
    (target / "retrieval.json").unlink()
    return target


def test_a_plan_within_the_budget(kvturbo, without_retrieval: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    ran = kvturbo("plan", without_retrieval, "--bits", 4.5, "--context", 4000, "--out", path, "--json", *SMALL)
    assert ran.code == 0
    plan, data = read_plan(path), ran.data
    assert bits_per_element(plan, 4000) <= 4.5
    assert data["bits_per_element"] == bits_per_element(plan, 4000) and data["cache_bytes"] == cache_bytes(plan, 4000)
    assert [layer["format"] for layer in data["layers"]] == list(plan.formats.values())
    assert len(data["layers"]) == LAYERS
    for entry in data["compared"]:
        assert entry["bits"] <= 4.5 and entry["kl_mean"] >= data["compared"][0]["kl_mean"]
    assert data["chosen"] == data["compared"][0]["name"]
    assert {"by layer", "k4v4", "k3v2, windows 4 + 128"} <= {entry["name"] for entry in data["compared"]}


def test_more_bits_are_never_worse(kvturbo, without_retrieval: Path, tmp_path: Path) -> None:
    found = []
    for bits in (3, 16):
        ran = kvturbo("plan", without_retrieval, "--bits", bits, "--out", tmp_path / "p.json", "--json", *SMALL)
        found.append(ran.data["compared"][0]["kl_mean"])
    assert found[0] >= found[1] == 0
    assert set(read_plan(tmp_path / "p.json").formats.values()) == {"16bit"}


def test_text_shows_layers_and_what_was_compared(kvturbo, without_retrieval: Path, tmp_path: Path) -> None:
    ran = kvturbo("plan", without_retrieval, "--bits", 3.5, "--out", tmp_path, *SMALL)
    assert ran.code == 0
    assert "at most 3.5 bits per element at 8,192 tokens" in ran.out
    assert "within the budget" in ran.out and f"plan in {tmp_path}" in ran.out
    assert read_plan(tmp_path).layers.keys() == {0, 1}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--bits", 1), "--bits must be at least 2."),
        (("--bits", 17), "--bits must be above 0 and at most 16, got 17"),
        (("--bits", 3, "--prompts", 0), "--prompts must be at least 1, got 0"),
        (("--bits", 3, "--prefix", 9000), "calibration takes at most 8192 tokens, the model's context, got 9000"),
        (("--bits", 3, "--prefix", 32, "--scored", 9000), "prefix + scored = 9032 tokens"),
        (("--bits", 3, "--text", "/no/file"), "can't read /no/file"),
        (("--bits", 3, "--out", "/dev/null/p.json"), "--out: /dev/null is not a folder"),
    ],
)
def test_bad_input(kvturbo, without_retrieval: Path, tmp_path: Path, arguments: tuple, words: str) -> None:
    ran = kvturbo("plan", without_retrieval, "--out", tmp_path / "p.json", *arguments)
    assert (ran.code, ran.out) == (2, "") and words in ran.err
    assert not (tmp_path / "p.json").exists()


def test_a_plan_that_can_not_be_written_is_seen_before_the_model_is_loaded(kvturbo, tmp_path: Path) -> None:
    ran = kvturbo("plan", tmp_path / "no model", "--bits", 3, "--out", "/dev/null/p.json")
    assert ran.code == 2 and "--out: /dev/null is not a folder" in ran.err


def test_the_plan_s_folder_is_made(kvturbo, without_retrieval: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "plan.json"
    assert kvturbo("plan", without_retrieval, "--bits", 16, "--out", path, *SMALL).code == 0
    assert read_plan(path).formats


@pytest.mark.parametrize(
    "length, words",
    [
        (10, "length must be at least 1093 for 16 chains"),
        (9000, "--retrieval must be at most 8192, the model's context, got 9000"),
    ],
)
def test_lengths_of_retrieval_prompts(kvturbo, tiny_folder: Path, tmp_path: Path, length: int, words: str) -> None:
    arguments = ("--bits", 3, "--prompts", 1, "--prefix", 64, "--scored", 16, "--retrieval", length)
    ran = kvturbo("plan", tiny_folder, *arguments, "--out", tmp_path / "p.json")
    assert (ran.code, ran.out) == (2, "") and words in ran.err
