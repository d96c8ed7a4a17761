"""Fills the tables of README.md and docs/ from benchmarks/results/*.json, so that no figure is typed by hand.

A table stands between `<!-- table:NAME -->` and `<!-- /table:NAME -->`. Where a results file is missing its tables say so.

    python tools/readme_tables.py            # rewrite the documents, and draw docs/images/*.svg
    python tools/readme_tables.py --check    # exit code 1 if a document differs from what the results say
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvturbo.bench import plots as bench_plots
from kvturbo.bench import tables as bench_tables
from kvturbo.bench import vllm_tables
from kvturbo.cli import demo, info
from kvturbo.eval import comparison
from kvturbo.eval.report import markdown_table, not_measured

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = "docs/images"

Report = dict[str, Any]
Render = Callable[[Report], str]
Tables = Mapping[str, tuple[str, Render]]


def demo_table(report: Report) -> str:
    """Table, notes and machine of a demo report."""
    facts = report["environment"]
    versions = facts["versions"]
    machine = (
        f"Made by `kvturbo demo` on {facts['cpu']}, {facts['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, Python {versions['python']}, commit {facts['commit']}."
    )
    rows = [demo.cells(row) for row in report["rows"]]
    return "\n\n".join([markdown_table(demo.HEADER, rows), demo.notes(report), machine])


def formats_table(report: Report) -> str:
    """The table of `kvturbo info`."""
    rows = [(f"`{name}`", *rest) for name, *rest in (info.cells(facts) for facts in report["formats"])]
    note = (
        f"head_dim {report['head_dim']}. Everything stored is counted. D is the sum of |x - x^|² over the sum of |x|² on "
        f"{report['vectors']:,} standard normal vectors; key slope is the mean of <k, k^> / |k|²."
    )
    return "\n\n".join([markdown_table(info.HEADER, rows), note])


def of_file(file: str, tables: Mapping[str, Render]) -> Tables:
    """Tables that are all made from one file of results."""
    return {name: (file, render) for name, render in tables.items()}


DECODE, STORE, QUALITY = "decode-h200.json", "store-h200.json", "quality.json"
SERVING, RETRIEVAL, RECENT = "vllm-h200.json", "vllm-retrieval-h200.json", "recent.json"
SCRIPTS = {
    "demo-cpu.json": "-m kvturbo demo",
    "formats.json": "-m kvturbo info --json",
    DECODE: bench_tables.DECODE_SCRIPT,
    STORE: bench_tables.STORE_SCRIPT,
    QUALITY: "benchmarks/quality.py",
    SERVING: vllm_tables.SERVING_SCRIPT,
    RETRIEVAL: vllm_tables.RETRIEVAL_SCRIPT,
    RECENT: vllm_tables.RECENT_SCRIPT,
}
"""What makes each file of results."""
DOCUMENTS: dict[str, Tables] = {
    "README.md": {
        "fast": (DECODE, bench_tables.fast),
        "engine": (SERVING, vllm_tables.brief),
        "quality": (QUALITY, comparison.brief),
        "demo": ("demo-cpu.json", demo_table),
        "formats": ("formats.json", formats_table),
    },
    "docs/quality.md": of_file(QUALITY, comparison.TABLES),
    "docs/vllm.md": of_file(SERVING, vllm_tables.SERVING_TABLES)
    | of_file(RETRIEVAL, vllm_tables.RETRIEVAL_TABLES)
    | of_file(RECENT, vllm_tables.RECENT_TABLES),
    "docs/performance.md": of_file(DECODE, bench_tables.DECODE_TABLES) | of_file(STORE, bench_tables.STORE_TABLES),
}
PLOTS: dict[str, Callable[[Report, Path], list[Path]]] = {QUALITY: comparison.plots, DECODE: bench_plots.plots}


def filled(text: str, document: str = "README.md") -> str:
    """The text of a document with every table made anew.

    Raises:
        ValueError: a table has no place in the text, or more than one.
    """
    for name, (file, render) in DOCUMENTS[document].items():
        block = f"<!-- table:{name} -->\n\n{rendered(file, render)}\n\n<!-- /table:{name} -->"
        pattern = f"<!-- table:{name} -->.*?<!-- /table:{name} -->"
        text, count = re.subn(pattern, lambda _, block=block: block, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{document} must have one place for table {name!r}, found {count}")
    return text


def rendered(file: str, render: Render) -> str:
    """A table of a results file, or what stands in its place while the file is missing."""
    report = results(file)
    return not_measured(SCRIPTS[file]) if report is None else render(report)


def results(file: str) -> Report | None:
    """What a file of results holds, or None if it is missing."""
    path = RESULTS / file
    return json.loads(path.read_text()) if path.is_file() else None


def draw() -> None:
    """Draws the plots of the files that there are."""
    for file, plots in PLOTS.items():
        if (report := results(file)) is not None:
            plots(report, ROOT / IMAGES)


def main() -> int:
    """Rewrites or checks the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    different = []
    for name in DOCUMENTS:
        before = (ROOT / name).read_text()
        after = filled(before, name)
        if check and before != after:
            different.append(name)
        elif not check and before != after:
            (ROOT / name).write_text(after)
    for name in different:
        print(f"{name} differs from benchmarks/results: run python tools/readme_tables.py", file=sys.stderr)
    if not check:
        draw()
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
