"""README.md and docs/quality.md say what benchmarks/results say."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from kvturbo.config import KVFormat

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/readme_tables.py, working on copies of the README and the results."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "quality.md", tmp_path / "docs")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["readme_tables.py", *arguments])
    return tool.main()


def test_tables_are_those_of_the_results(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tool, monkeypatch, "--check") == 0


def test_a_changed_figure_is_noticed_and_repaired(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tool.ROOT / "README.md"
    before = readme.read_text()
    readme.write_text(before.replace("3.88x", "4.88x", 1))
    assert run(tool, monkeypatch, "--check") == 1
    assert run(tool, monkeypatch) == 0
    assert readme.read_text() == before


def test_a_missing_place_is_an_error(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="one place for table 'demo', found 0"):
        tool.filled("no tables here")


def test_committed_sizes_are_the_formats_own() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "formats.json").read_text())
    for facts in report["formats"]:
        assert facts["bytes_per_token"] == KVFormat.from_name(facts["name"], report["head_dim"]).bytes_per_token


def test_every_local_link_leads_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text())
    assert links and not [link for link in links if not (ROOT / link).exists()]
