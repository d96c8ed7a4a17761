"""What results look like: facts about the machine, JSON, tables."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import kvturbo
from kvturbo.files import whole_file

PACKAGES = ("torch", "transformers", "triton", "cuda-core", "vllm")


def environment() -> dict[str, Any]:
    """Versions (None: not installed), processor, GPU and, in a git checkout, the commit."""
    versions = {"kvturbo": kvturbo.__version__, "python": platform.python_version()}
    return {
        "versions": versions | {name: installed_version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit(),
    }


def installed_version(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's model name where the system tells, else its architecture."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that the package is imported from, with `-dirty` if src/ was changed; None outside one."""
    root = Path(kvturbo.__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    return (head + "-dirty" if git("status", "--porcelain", "--", "src") else head) or None


def to_json(data: Any) -> str:
    """Indented JSON with a newline at the end; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(_plain(data), indent=2, allow_nan=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """Writes JSON; the file appears whole or not at all, and replaces one that is there."""
    with whole_file(path) as temporary:
        temporary.write_text(to_json(data), encoding="utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: bool = False) -> str:
    """A text table with aligned columns: the first to the left, the others to the right unless `left`."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if left or i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table."""
    marks = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


def not_measured(script: str) -> str:
    """What a document says in place of rows that there are not."""
    return f"Not measured yet: `python {script}` makes the rows."


def size(nbytes: float) -> str:
    """Bytes for people: 1,234 B or 1.2 MiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:,.0f} B"


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
