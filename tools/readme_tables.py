"""Fills the tables of README.md and docs/quality.md from benchmarks/results/*.json, so that no figure is typed by hand.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`. A results file of docs/quality.md may be missing:
its tables then say so.

    python tools/readme_tables.py            # rewrite the documents, and draw docs/images/quality-*.svg
    python tools/readme_tables.py --check    # exit code 1 if a document differs from what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvturbo.cli import demo, info
from kvturbo.eval import comparison
from kvturbo.eval.report import markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def demo_table(report: dict[str, Any]) -> str:
    """Table, notes and machine of a demo report."""
    facts = report["environment"]
    versions = facts["versions"]
    machine = (
        f"Made by `kvturbo demo` on {facts['cpu']}, {facts['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, Python {versions['python']}, commit {facts['commit']}."
    )
    rows = [demo.cells(row) for row in report["rows"]]
    return "\n\n".join([markdown_table(demo.HEADER, rows), demo.notes(report), machine])


def formats_table(report: dict[str, Any]) -> str:
    """The table of `kvturbo info`."""
    rows = [(f"`{name}`", *rest) for name, *rest in (info.cells(facts) for facts in report["formats"])]
    note = (
        f"head_dim {report['head_dim']}. Everything stored is counted. D is the sum of |x - x^|² over the sum of |x|² on "
        f"{report['vectors']:,} standard normal vectors; key slope is the mean of <k, k^> / |k|²."
    )
    return "\n\n".join([markdown_table(info.HEADER, rows), note])


Tables = dict[str, tuple[str, Callable[[dict[str, Any]], str]]]
TABLES: Tables = {
    "demo": ("demo-cpu.json", demo_table),
    "formats": ("formats.json", formats_table),
}
QUALITY_TABLES: Tables = {name: ("quality.json", render) for name, render in comparison.TABLES.items()}
DOCUMENTS = {"README.md": TABLES, "docs/quality.md": QUALITY_TABLES}
IMAGES = "docs/images"


def filled(text: str, tables: Tables = TABLES, document: str = "README.md") -> str:
    """The text with every table made anew.

    Raises:
        ValueError: a table has no place in the text, or more than one.
    """
    for name, (file, render) in tables.items():
        block = f"<!-- table:{name} -->\n\n{rendered(file, render)}\n\n<!-- /table:{name} -->"
        pattern = f"<!-- table:{name} -->.*?<!-- /table:{name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{document} must have one place for table {name!r}, found {count}")
    return text


def rendered(file: str, render: Callable[[dict[str, Any]], str]) -> str:
    """A table of a results file; of docs/quality.md's, what stands in its place while the file is missing."""
    path = RESULTS / file
    if file == "quality.json" and not path.is_file():
        return comparison.MISSING
    return render(json.loads(path.read_text()))


def main() -> int:
    """Rewrites or checks the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    different = []
    for name, tables in DOCUMENTS.items():
        before = (ROOT / name).read_text()
        after = filled(before, tables, name)
        if check and before != after:
            different.append(name)
        elif not check:
            (ROOT / name).write_text(after)
    for name in different:
        print(f"{name} differs from benchmarks/results: run python tools/readme_tables.py", file=sys.stderr)
    if not check and (RESULTS / "quality.json").is_file():
        comparison.plots(json.loads((RESULTS / "quality.json").read_text()), ROOT / IMAGES)
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
