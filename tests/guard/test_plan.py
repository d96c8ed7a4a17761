"""A plan file holds what was written, and a file that is not one is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvturbo.guard import PLAN_FILE, LayerPlan, Plan, read_plan, write_plan

CHANNELS = [list(range(0, 32, 2)), list(range(16))]
PLAN = Plan(
    {
        0: LayerPlan("k4v4-o16", 2, 64, channels={16: CHANNELS}, key_excess=12.5, value_excess=1.0),
        2: LayerPlan("16bit", 2, 64, channels={16: CHANNELS}),
        10: LayerPlan("k3v2", 2, 64, sink=4, recent=32, channels={16: CHANNELS}),
    },
    "weights",
)


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_plan(tmp_path, PLAN)
    assert [path.name for path in tmp_path.iterdir()] == [PLAN_FILE]
    assert read_plan(tmp_path) == read_plan(tmp_path / PLAN_FILE) == PLAN


def test_channels_by_layer() -> None:
    assert PLAN.formats == {0: "k4v4-o16", 2: "16bit", 10: "k3v2"}
    assert {i: x.tolist() for i, x in PLAN.own_channels().items()} == {0: CHANNELS}
    assert {i: x.tolist() for i, x in PLAN.own_channels({2: "k2v2-o16", 10: "k4v4"}).items()} == {2: CHANNELS}
    assert sorted(PLAN.channels(16)) == [0, 2, 10]
    with pytest.raises(ValueError, match=r"layers \[0, 2, 10\] have no 32 outlier channels"):
        PLAN.channels(32)


def altered(**change: Any) -> dict[str, Any]:
    entry = {"format": "k4v4-o16", "num_kv_heads": 2, "head_dim": 64, "channels": {"16": CHANNELS}} | change
    return {"version": 1, "layers": {"3": {key: value for key, value in entry.items() if value != "none"}}}


@pytest.mark.parametrize(
    "data, words",
    [
        ("no json", "is not JSON"),
        ([1], "is no plan of kvturbo: it has no 'layers'"),
        ({"version": 2, "layers": {}}, "version 2; this release reads 1"),
        ({"version": 1, "layers": {"first": {}}}, "layer first: .*missing: .*format"),
        ({"version": 1, "layers": {"3": "k4v4"}}, "layer 3: must be an object, got 'k4v4'"),
        (altered(format="k5v5"), "layer 3: unknown format 'k5v5'.*valid formats: k4v4"),
        (altered(format=4), "layer 3: .*4"),
        (altered(head_dim=100), "layer 3: .*multiple of 16.*100"),
        (altered(head_dim="none"), "layer 3: .*missing: .*head_dim"),
        (altered(head_dim="64"), "layer 3: head_dim must be a positive number, got '64'"),
        (
            altered(format="16bit", num_kv_heads=0, channels={}),
            "layer 3: num_kv_heads must be a positive number, got 0",
        ),
        (
            {"version": 1, "layers": {"-1": altered()["layers"]["3"]}},
            "layer -1: a layer's index must be a number, got '-1'",
        ),
        (altered(channels=None), "layer 3: channels must be an object, got None"),
        (altered(channels={"some": CHANNELS}), "layer 3: a number of channels must be a number, got 'some'"),
        (altered(windows=4), "layer 3: unknown: .*windows.*fields: .*recent"),
        (altered(recent=-1), "layer 3: recent must be a number of tokens or null, got -1"),
        (altered(sink=1.5), "layer 3: sink must be a number of tokens or null, got 1.5"),
        (altered(channels={}), "layer 3: format 'k4v4-o16' needs channels for 16"),
        (altered(channels={"16": CHANNELS, "17": []}), "layer 3: channels must be for one of 16, 32, got 17"),
        (altered(channels={"16": CHANNELS[:1]}), "layer 3: channels for 16 must be lists for 2 KV heads"),
        (altered(channels={"16": [CHANNELS[0], [*range(15), 64]]}), "16 ascending numbers below 64"),
        (altered(channels={"16": [CHANNELS[0], [*range(15), 3]]}), "16 ascending numbers below 64"),
        (altered(channels={"16": [CHANNELS[0], "x"]}), "16 ascending numbers below 64, got 'x'"),
    ],
)
def test_files_that_are_no_plan(tmp_path: Path, data: Any, words: str) -> None:
    path = tmp_path / PLAN_FILE
    path.write_text(data if data == "no json" else json.dumps(data))
    with pytest.raises(ValueError, match=words) as raised:
        read_plan(path)
    assert str(path) in str(raised.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no plan .*kvturbo.json; kvturbo check and kvturbo plan write one"):
        read_plan(tmp_path)
