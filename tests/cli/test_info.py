"""`kvturbo info` tells what the formats themselves say, and measures what theory predicts."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kvturbo.config import ALIASES, KVFormat, format_names


@pytest.mark.parametrize("head_dim", [80, 128])
def test_table_has_every_format_with_the_formats_own_numbers(kvturbo, head_dim: int) -> None:
    data = kvturbo("info", "--head-dim", head_dim, "--json").data
    assert [entry["name"] for entry in data["formats"]] == [n for n in format_names(head_dim) if n not in ALIASES]
    for entry in data["formats"]:
        fmt = KVFormat.from_name(entry["name"], head_dim)
        assert entry["bytes_per_token"] == fmt.bytes_per_token
        assert entry["bits_per_element"] == fmt.bytes_per_token * 8 / (2 * head_dim)
        assert entry["compression"] == 4 * head_dim / fmt.bytes_per_token


@pytest.mark.parametrize(
    "name, key, value", [("k4v4", 0.00815, 0.00815), ("k4v3", 0.00815, 0.0330), ("k2v2", 0.1306, 0.1306)]
)
def test_distortion_is_that_of_the_codebooks(kvturbo, name: str, key: float, value: float) -> None:
    entry = kvturbo("info", name, "--json").data
    assert entry["key_distortion"] == pytest.approx(key, rel=0.02)
    assert entry["value_distortion"] == pytest.approx(value, rel=0.02)


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2", "k3v2-o16"])
def test_keys_keep_the_logit_of_an_aligned_query(kvturbo, name: str) -> None:
    assert kvturbo("info", name, "--json").data["key_slope"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["k4v3", "k3v2-o16", "tq3.5", "qjl4"])
@pytest.mark.parametrize("page_size", [16, 64])
def test_planes_fill_the_page_without_gap(kvturbo, name: str, page_size: int) -> None:
    page = kvturbo("info", name, "--page-size", page_size, "--json").data["page"]
    assert page["bytes"] == page_size * KVFormat.from_name(name, 128).bytes_per_token
    planes = page["planes"]
    assert planes[0]["offset"] == 0
    assert all(a["offset"] + a["bytes"] == b["offset"] for a, b in pairwise(planes))
    assert planes[-1]["offset"] + planes[-1]["bytes"] == page["bytes"]


def test_alias_gives_the_format_it_stands_for(kvturbo) -> None:
    assert kvturbo("info", "turboquant", "--json").data["name"] == "k4v4"


def test_text_shows_bytes_and_planes(kvturbo) -> None:
    ran = kvturbo("info", "k4v2")
    assert ran.code == 0
    assert "100" in ran.out and "k.codes0.4" in ran.out and "page of 32 tokens" in ran.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("k5v5",), ("k5v5", "k4v4", "k2v2-o32", "turboquant")),
        (("--head-dim", 100), ("100", "multiple of 16", "128")),
        (("--head-dim", 48), ("48", "64, 80, 96")),
        (("k4v4-o32", "--head-dim", 64), ("k4v4-o32", "k4v4-o16")),
        (("k4v4", "--page-size", 24), ("24", "16, 32, 64")),
    ],
)
def test_bad_input_is_one_line_with_the_choices(kvturbo, arguments: tuple, words: tuple[str, ...]) -> None:
    ran = kvturbo("info", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1 and ran.err.startswith("kvturbo info: ")
    assert all(word in ran.err for word in words)


def test_a_bad_page_size_is_refused_for_the_table_too(kvturbo) -> None:
    ran = kvturbo("info", "--page-size", 7)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "kvturbo info: page_size must be one of 16, 32, 64, got 7\n"
