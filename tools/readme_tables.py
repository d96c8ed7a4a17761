"""Fills README.md's tables from benchmarks/results/*.json, so that no figure in it is typed by hand.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`.

    python tools/readme_tables.py            # rewrite README.md
    python tools/readme_tables.py --check    # exit code 1 if it differs from what the results say
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


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "demo": ("demo-cpu.json", demo_table),
    "formats": ("formats.json", formats_table),
}


def filled(text: str) -> str:
    """The text with every table made anew.

    Raises:
        ValueError: a table has no place in the text, or more than one.
    """
    for name, (file, render) in TABLES.items():
        report = json.loads((RESULTS / file).read_text())
        block = f"<!-- table:{name} -->\n\n{render(report)}\n\n<!-- /table:{name} -->"
        pattern = f"<!-- table:{name} -->.*?<!-- /table:{name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README.md must have one place for table {name!r}, found {count}")
    return text


def main() -> int:
    """Rewrites or checks README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = filled(before)
    if not check:
        readme.write_text(after)
        return 0
    if before != after:
        print("README.md differs from benchmarks/results: run python tools/readme_tables.py", file=sys.stderr)
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main())
