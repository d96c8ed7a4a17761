"""The comparison's script continues where it stopped and mixes nothing; its tables and plots show what the rows hold."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvturbo.eval import comparison

ROOT = Path(__file__).parents[2]
SMALL = (
    "--device", "cpu", "--tokens", "60", "--length", "320", "--prefix", "288", "--chunk", "32", "--calibration", "100",
    "--questions", "8", "--few", "8", "--batch", "2", "--allow-dirty",
)  # fmt: skip


@pytest.fixture
def script(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/quality.py with retrieval settings that fit the tiny model's text."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("kvturbo.bench.report.commit", lambda: "0" * 12)
    rows = importlib.import_module("quality_rows")
    monkeypatch.setattr(rows, "RETRIEVAL", ("multikey-1k",))
    monkeypatch.setattr(rows, "BY_LENGTH", ("multikey-1k",))
    yield importlib.import_module("quality")
    for name in ("quality", "quality_rows", "quality_codecs"):
        sys.modules.pop(name, None)


def measured(
    script: ModuleType, folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> list[dict[str, Any]]:
    monkeypatch.setattr("sys.argv", ["quality.py", "--model", str(folder), "--out", str(out), *SMALL, *more])
    assert script.main() == 0
    return json.loads(out.read_text())["rows"] if out.is_file() else []


def test_every_row_can_be_measured(
    script: ModuleType, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """All sections on a model of two layers; names are unique, so that a continued run repeats none."""
    trained = tmp_path / "trained"
    shutil.copytree(tiny_folder, trained)
    (trained / "training.json").write_text('{"steps": 7}')
    rows = measured(script, tiny_folder, tmp_path / "q.json", monkeypatch, "--qk-norm", str(trained))
    names = {(row["section"], row["name"]) for row in rows}
    assert {"text", "retrieval", "ablation", "heads", "sides", "length", "case", "case-retrieval", "seeds"} == {
        s for s, _ in names
    }
    for wanted in ("k4v4", "tq3.5", "tq2.5", "qjl4", "qjl3", "k4v4-o16", "vllm-4bit_nc", "kvarn-k4v2", "pr38280"):
        assert ("text", wanted) in names
    assert len({script.key(row) for row in rows}) == len(rows)
    cases = {row["case"] for row in rows}
    assert {"key-bias", "key-bias control", "key-bias, weights folded", "value-mean", "qk-norm"} <= cases
    written = json.loads((tmp_path / "q.json").read_text())
    assert written["qk_norm"] == {"steps": 7, "weights": written["settings"]["weights"]}
    (trained / "model.safetensors").write_bytes(b"other weights")
    kept = script.with_trained(written, trained)["rows"]
    assert kept == [row for row in rows if not row["case"].startswith("qk-norm")]
    plan = next(row for row in rows if row["name"] == "plan of at most 2.9 bits")
    assert plan["bits_at_8k"] <= 2.9 and list(plan["layers"]) == ["0", "1"]
    assert all(row["packed_tokens_read"] > 0 for row in rows if "kl_mean" in row)
    assert all(row["commit"] == "0" * 12 and row["seconds"] >= 0 for row in rows)
    assert "reached" in capsys.readouterr().out.replace("to reach", "")


def test_a_run_that_was_cut_continues(
    script: ModuleType, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q.json"
    assert measured(script, tiny_folder, out, monkeypatch, "--only", "text", "--seconds", "0") == []
    all_rows = measured(script, tiny_folder, out, monkeypatch, "--only", "text")
    cut = json.loads(out.read_text())
    cut["rows"] = cut["rows"][:5]
    out.write_text(json.dumps(cut))
    again = measured(script, tiny_folder, out, monkeypatch, "--only", "text")
    same = [{name: value for name, value in row.items() if name != "seconds"} for row in all_rows]
    assert [{name: value for name, value in row.items() if name != "seconds"} for row in again] == same
    assert again[:5] == all_rows[:5] and [r["seconds"] for r in again[:5]] == [r["seconds"] for r in all_rows[:5]]


def test_rows_of_other_settings_are_not_mixed(
    script: ModuleType, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q.json"
    measured(script, tiny_folder, out, monkeypatch, "--only", "heads")
    before = out.read_text()
    with pytest.raises(ValueError, match=r"other settings \(chunk\)"):
        measured(script, tiny_folder, out, monkeypatch, "--only", "heads", "--chunk", "16")
    assert out.read_text() == before


LAYERS = {"0": "kvturbo k3v2, windows 4 + 32", "1": "kvturbo k4v4, windows 0 + 0"}


def report(**extra: Any) -> dict[str, Any]:
    """A report made by hand."""
    text = {
        "section": "text", "case": "plain", "setting": None, "bits": 4.125, "bits_at_8k": 4.125, "kl_mean": 0.0021,
        "kl_p99": 0.02, "kl_p99.9": 0.04, "same_top1": 0.9812, "perplexity": 7.5, "scored_tokens": 50_176,
        "packed_tokens_read": 1, "commit": "c",
    }  # fmt: skip
    hit = {
        "section": "retrieval", "case": "plain", "setting": "hard-8k", "bits": 4.125, "bits_at_8k": 4.125, "accuracy": 0.93,
        "source": "kvturbo", "low": 0.92, "high": 0.94, "questions": 2048, "difference": -0.0025,
        "difference_low": -0.01, "difference_high": 0.005,
    }  # fmt: skip
    rows = [
        text | {"name": "k4v4", "source": "kvturbo k4v4"},
        text | {"name": "vllm-4bit_nc", "source": "vLLM", "kl_mean": 0.0030, "bits_at_8k": 4.19},
        text | {"name": "plan of 3", "source": "kvturbo k3v2 and kvturbo k4v4", "layers": LAYERS},
        hit | {"name": "k4v4"},
        hit
        | {
            "name": "16bit",
            "section": "length",
            "setting": "hops-4k",
            "difference": 0.0,
            "accuracy": 1.0,
            "high": 1 - 1e-16,
        },
        hit | {"name": "k4v4", "section": "length", "setting": "hops-4k"},
        text | {"name": "k4v4", "section": "ablation"},
        text | {"name": "k4v4 without search", "section": "ablation", "kl_mean": 0.0042},
        text | {"name": "k4v4", "section": "seeds", "setting": "1", "kl_mean": 0.0025},
        text | {"name": "k3v3", "section": "sides", "setting": "k 0"},
        text | {"name": "k3v3", "section": "sides", "setting": "v 0"},
        text | {"name": "k4v4", "section": "case", "case": "key-bias", "kl_mean": None, "source": "kvturbo k4v4"},
        text | {"name": "k4v4", "section": "case", "case": "key-bias control"},
        text
        | {
            "name": "k4v4",
            "section": "case",
            "case": "key-bias, weights folded",
            "kl_mean": 0.0025,
            "source": "kvturbo",
        },
        hit | {"name": "k4v4", "section": "case-retrieval", "case": "key-bias"},
    ]
    settings = {"model": "m", "dtype": "float32", "length": 4096, "prefix": 1024, "chunk": 128}
    versions = {"torch": "2", "transformers": "5"}
    return {"settings": settings, "versions": versions, "gpu": "H200", "cpu": "x", "commit": "c", "rows": rows} | extra


def test_tables_show_the_rows() -> None:
    tables = {name: make(report()) for name, make in comparison.TABLES.items()}
    assert "on H200" in tables["conditions"] and "50,176 scored tokens" in tables["conditions"]
    assert "| mean KL of k4v4 over vllm-4bit_nc | <= 0.88 | 0.700 | reached |" in tables["goals"]
    row = "| `k4v4` | 4.125 | 4.12 | 0.0021 | 0.02 | 0.04 | 98.12 % | 7.5000 | -0.2 (2,048) | - |"
    assert row in tables["formats"]
    assert "| the same, mean of 2 rotations | <= 0.88 | 0.767 | reached |" in tables["goals"]
    assert "| `k4v4` | 2 | 0.0023 | 0.0021 | 0.0025 |" in tables["rotations"]
    assert "| without search | 2.00x | - | - | - | - |" in tables["ablation"]
    assert "**key-bias**" in tables["cases"] and "same shape without" in tables["cases"]
    assert "| `k4v4` | 4.125 | 4.12 | NaN | - | 0.04 | 98.12 % | -0.2 (2,048) |" in tables["cases"]
    assert "| `k4v4`, weights folded | 4.125 | 4.12 | 0.0025 | 1.19x |" in tables["cases"]
    assert "**key-bias, weights folded**" not in tables["cases"]
    assert "| `k4v4` | 93.0 % |" in tables["length"].replace(" - |", "").replace("| 93.0 % | 93.0 % |", "| 93.0 % |")
    assert "| 4.12 | 0.0021 | k3v2, windows 4 + 32 | k4v4 |" in tables["plans"]
    short = comparison.brief(report())
    assert "| `k4v4` | 4.12 | 0.0021 | 0.04 | -0.2 (-1.0 to +0.5) |" in short and "50,176 scored tokens" in short
    assert (
        "| `vllm-4bit_nc` | 4.19 | 0.003 | 0.04 | - |" in short
        and comparison.brief(report(rows=[])) == comparison.MISSING
    )
    assert "quality-layers.svg" in tables["plot-layers"]


def test_tables_without_rows_say_that_nothing_was_measured() -> None:
    empty = report(rows=[])
    for name, make in comparison.TABLES.items():
        shown = make(empty)
        assert comparison.MISSING in shown or name in ("conditions", "goals")
    assert comparison.goals(empty).count("not measured") == comparison.goals(empty).count("\n") - 1


NAMES = ("bits", "cases", "length", "layers")


def test_plots_are_drawn_from_the_rows_and_are_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'kvturbo[eval]'")
    first, second = (comparison.plots(report(), tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == [f"quality-{name}.svg" for name in NAMES]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    changed = report()
    changed["rows"][0]["kl_mean"] = 0.5
    assert comparison.plots(changed, tmp_path / "c")[0].read_bytes() != first[0].read_bytes()
    assert comparison.plots(report(rows=[]), tmp_path / "d") == []
