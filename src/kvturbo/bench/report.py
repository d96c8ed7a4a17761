"""Files and tables of benchmark results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvturbo.eval.report import commit, environment, table, write_json


def checked_commit(given: str | None, *, allow_dirty: bool) -> str:
    """The commit that results belong to.

    Args:
        given: what the caller says, for a copy of the tree that is not a git checkout.
        allow_dirty: take a changed tree, whose commit then ends in `-dirty`.

    Raises:
        ValueError: the tree is changed, or it is no checkout and no commit was given.
    """
    found = commit()
    if found is None and given is None:
        raise ValueError("this is not a git checkout: say which commit it is with --commit")
    if found is not None and given is not None and not found.startswith(given[:12]):
        raise ValueError(f"--commit {given} is not the checkout's commit {found}")
    name = found or str(given)
    if name.endswith("-dirty") and not allow_dirty:
        raise ValueError(f"src/ has changes that are in no commit ({name}): commit them, or use --allow-dirty")
    return name


def gpu_slug() -> str:
    """The GPU's name for file names: h200 for "NVIDIA H200", h100-80gb-hbm3 for "NVIDIA H100 80GB HBM3"."""
    name = torch.cuda.get_device_name().lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def write(path: Path, rows: Sequence[dict[str, Any]], commit_name: str, **facts: Any) -> None:
    """Writes results as JSON, whole or not at all: the environment, the given facts, and the rows."""
    write_json(path, environment() | {"commit": commit_name} | facts | {"rows": list(rows)})


def decode_table(rows: Sequence[dict[str, Any]], providers: Sequence[str]) -> str:
    """Times in microseconds, and kvturbo's speed over every other provider."""
    others = [name for name in providers if name != "kvturbo" and any(row.get(f"{name}_us") for row in rows)]
    header = ["batch", "context", "kv", "group", "d", "q", "page", "format", *others, "kvturbo"]
    header += [f"/{name}" for name in others] + ["error", "GB/s"]
    return table(header, [_cells(row, others) for row in rows])


def _cells(row: dict[str, Any], others: Sequence[str]) -> list[str]:
    context = f"<={row['context']}" if row["ragged"] else str(row["context"])
    shape = [
        str(row["batch"]),
        context,
        *(str(row[key]) for key in ("kv_heads", "group", "head_dim", "q_len", "page_size")),
    ]
    ours = row.get("kvturbo_us")
    times = [row.get(f"{name}_us") for name in [*others, "kvturbo"]]
    ratios = [f"{time / ours:.2f}" if time and ours else "-" for time in times[:-1]]
    figures = [f"{row['rel_err']:.1e}" if row["rel_err"] else "-", f"{row['gb_per_s']:.0f}" if row["gb_per_s"] else "-"]
    fmt = row["format"] + (f"+{row['recent']}" if row["recent"] else "")
    return [*shape, fmt, *(f"{time:.1f}" if time else "-" for time in times), *ratios, *figures]
