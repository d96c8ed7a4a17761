"""JSON is JSON, files appear whole, tables line up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvturbo.eval.report import environment, markdown_table, size, table, to_json, write_json


def test_json_has_null_where_a_number_is_not_finite() -> None:
    assert json.loads(to_json({"a": float("nan"), "b": [1.5, float("inf")], "c": (1,)})) == {
        "a": None,
        "b": [1.5, None],
        "c": [1],
    }


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_tables_line_up() -> None:
    assert (
        table(("name", "n"), [("a", "10"), ("long one", "5")])
        == "name       n\n--------  --\na         10\nlong one   5"
    )
    assert markdown_table(("name", "n"), [("a", "10")]) == "| name | n |\n| --- | ---: |\n| a | 10 |"


def test_sizes_for_people() -> None:
    assert [size(n) for n in (1234, 3 * 2**20, 5 * 2**29)] == ["1,234 B", "3.00 MiB", "2.50 GiB"]


def test_environment_says_what_ran() -> None:
    facts = environment()
    assert facts["versions"]["torch"] and facts["cpu"] and facts["threads"] >= 1
