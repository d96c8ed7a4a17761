"""Plots of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def tradeoff(rows: Sequence[Row], path: Path, title: str) -> None:
    """KL divergence and retrieval accuracy against measured bytes per token, as a PNG.

    Args:
        rows: per cache `format`, `bytes_per_token`, `kl_mean` and `retrieval`: by setting `accuracy`, `low` and `high`.
        path: the file to write.
        title: over both panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _divergence(left, [row for row in rows if row["kl_mean"] > 0])
    _accuracy(right, rows)
    for axes in (left, right):
        axes.set_xlabel("measured cache bytes per token")
        axes.set_xlim(0, 1.15 * max(row["bytes_per_token"] for row in rows))
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def _divergence(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_ylabel("mean KL to the 16-bit cache [nats/token]")
    axes.set_yscale("log")
    axes.plot([row["bytes_per_token"] for row in rows], [row["kl_mean"] for row in rows], "o")
    for row in rows:
        _label(axes, row, row["kl_mean"])


def _accuracy(axes: Any, rows: Sequence[Row]) -> None:
    axes.set_ylabel("retrieval accuracy, 95 % interval [%]")
    size = [row["bytes_per_token"] for row in rows]
    for setting in rows[0]["retrieval"]:
        found = [row["retrieval"][setting] for row in rows]
        accuracy = [100 * f["accuracy"] for f in found]
        below = [100 * (f["accuracy"] - f["low"]) for f in found]
        above = [100 * (f["high"] - f["accuracy"]) for f in found]
        axes.errorbar(size, accuracy, yerr=[below, above], fmt="o", capsize=3, label=setting)
    for row, value in zip(rows, accuracy, strict=True):
        _label(axes, row, value)
    axes.legend(loc="lower right")


def _label(axes: Any, row: Row, y: float) -> None:
    axes.annotate(row["format"], (row["bytes_per_token"], y), xytext=(6, 6), textcoords="offset points")
