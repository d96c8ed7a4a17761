"""`kvturbo demo` writes a report whose table follows from its records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvturbo.cli import demo

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture
def ran(kvturbo, tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "NEW_TOKENS", 8)
    monkeypatch.setattr(demo, "TEXT_OPTIONS", {"prefix": 512, "scored": 64, "chunk": 32})
    return kvturbo("demo", "--model", tiny_folder, "--out", folder, "--prompts", 1, "--texts", 1, "--json")


def test_report_plot_and_table_agree(ran, folder: Path) -> None:
    assert ran.code == 0
    assert (folder / "demo.png").read_bytes()[:8] == PNG
    report = json.loads((folder / "demo.json").read_text())
    assert report == ran.data
    rows = {row["format"]: row for row in report["rows"]}
    assert list(rows) == ["16bit", "k4v4", "k4v2", "k2v2"]
    assert rows["16bit"]["kl_mean"] == 0 and rows["16bit"]["compression"] == 1
    assert all(row["kl_mean"] > 0 and row["compression"] > 1.5 for name, row in rows.items() if name != "16bit")
    assert [row["scored_tokens"] for row in report["rows"]] == [64] * 4
    for setting, found in rows["k4v4"]["retrieval"].items():
        assert found["questions"] == 16 and setting in demo.SETTINGS
    for task in report["tasks"].values():
        assert task["caches"]["16bit"]["packed_tokens_read"] == 0 < task["caches"]["k2v2"]["packed_tokens_read"]
    assert report["generation"]["k4v4"]["new_tokens"] == 8
    text = demo.report_text(report)
    assert all(cell in text for row in report["rows"] for cell in demo.cells(row))


@pytest.mark.parametrize("arguments", [("--prompts", 0), ("--texts", -1)])
def test_counts_must_be_positive(kvturbo, tiny_folder: Path, tmp_path: Path, arguments: tuple) -> None:
    ran = kvturbo("demo", "--model", tiny_folder, "--out", tmp_path / "out", *arguments)
    assert ran.code == 2 and "must be at least 1" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_named(kvturbo, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = kvturbo("demo", "--model", tiny_folder, "--out", tmp_path / "file" / "out")
    assert ran.code == 2 and str(tmp_path / "file" / "out") in ran.err
