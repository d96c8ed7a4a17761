"""README.md and docs/ say what benchmarks/results say."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from bench_reports import decode_report, store_report
from kvturbo.config import KVFormat

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/readme_tables.py, working on copies of the documents and the results."""
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "tools" / "readme_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "docs").mkdir()
    for document in module.DOCUMENTS:
        shutil.copy(ROOT / document, tmp_path / document)
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
    with pytest.raises(ValueError, match="one place for table 'fast', found 0"):
        tool.filled("no tables here")


def test_documents_without_results_say_what_makes_them(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(tool.RESULTS)
    assert run(tool, monkeypatch) == 0 and run(tool, monkeypatch, "--check") == 0
    for document, tables in tool.DOCUMENTS.items():
        text = (tool.ROOT / document).read_text()
        for name, (file, _) in tables.items():
            note = f"Not measured yet: `python {tool.SCRIPTS[file]}` makes the rows."
            assert f"<!-- table:{name} -->\n\n{note}\n\n<!-- /table:{name} -->" in text
    assert not (tool.ROOT / tool.IMAGES).exists()


def test_results_that_appear_fill_their_documents(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'kvturbo[eval]'")
    (tool.RESULTS / tool.DECODE).write_text(json.dumps(decode_report()))
    (tool.RESULTS / tool.STORE).write_text(json.dumps(store_report()))
    assert run(tool, monkeypatch, "--check") == 1
    assert run(tool, monkeypatch) == 0 and run(tool, monkeypatch, "--check") == 0
    text = (tool.ROOT / "docs" / "performance.md").read_text()
    assert "Not measured yet" not in text
    for image in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (tool.ROOT / "docs" / image).is_file()


def test_committed_sizes_are_the_formats_own() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "formats.json").read_text())
    for facts in report["formats"]:
        assert facts["bytes_per_token"] == KVFormat.from_name(facts["name"], report["head_dim"]).bytes_per_token


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_every_local_link_leads_somewhere(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text())
    assert links and not [link for link in links if not (path.parent / link).exists()]
