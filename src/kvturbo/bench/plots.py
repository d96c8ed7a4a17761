"""Plots of docs/performance.md, from the results of benchmarks/decode.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvturbo.bench import tables
from kvturbo.eval.plot import new_figure, save_svg

Row = dict[str, Any]


def plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what the rows allow, speeds by shape and by format, as SVG; returns the files."""
    drawn = []
    if rows := tables.plain_rows(report):
        drawn.append(speed_by_shape(rows, folder / "performance-shapes.svg"))
    if rows := tables.format_rows(report):
        drawn.append(speed_by_format(rows, folder / "performance-formats.svg"))
    return drawn


def speed_by_shape(rows: list[Row], path: Path) -> Path:
    """How many times as long FA3 takes as kvturbo, a line per shape, beside the ratio of bytes."""
    figure, (axes,) = new_figure(7.5, 0.27 * len(rows) + 1.3, 1)
    places = range(len(rows))
    axes.hlines(places, 0, [tables.byte_ratio(row) for row in rows], color="0.9")
    axes.plot(
        [tables.byte_ratio(row) for row in rows],
        places,
        "|",
        color="0.3",
        markersize=9,
        label="bf16 bytes over packed bytes",
    )
    for name, marker in (("fa3_bf16", "o"), ("fa3_fp8", "s")):
        found = [(ratio, y) for y, row in enumerate(rows) if (ratio := tables.speed(row, name))]
        axes.plot(
            [ratio for ratio, _ in found], [y for _, y in found], marker, label=tables.BASELINES[name], markersize=4
        )
    axes.axvline(1, color="0.3", linewidth=0.8)
    axes.set_yticks(places, [tables.shape(row) for row in rows], fontsize=7)
    axes.set(
        xlabel="time over kvturbo's",
        xlim=(0, None),
        title="sequences x tokens, KV heads x group",
        ylim=(len(rows) - 0.5, -0.5),
    )
    axes.title.set_fontsize(8)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    return save_svg(figure, path)


def speed_by_format(rows: list[Row], path: Path) -> Path:
    """How many times as long FA3 with bf16 takes as each format, against the ratio of bytes."""
    figure, (axes,) = new_figure(6, 4.2, 1)
    ratios = [tables.byte_ratio(row) for row in rows]
    speeds = [tables.speed(row, "fa3_bf16") or 0.0 for row in rows]
    axes.plot([1, max(ratios)], [1, max(ratios)], color="0.6", linewidth=0.8, label="time in proportion to bytes")
    axes.plot(ratios, speeds, "o", label="kvturbo", markersize=4)
    for row, x, y in zip(rows, ratios, speeds, strict=True):
        above = any(x == other and y > speed for other, speed in zip(ratios, speeds, strict=True))
        place = {"xytext": (-5, 4), "ha": "right"} if above else {"xytext": (5, -8)}
        axes.annotate(row["format"], (x, y), textcoords="offset points", fontsize=7, **place)
    axes.margins(x=0.1)
    axes.set(xlabel="bf16 bytes over packed bytes", ylabel="time of FA3 bf16 over kvturbo's")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save_svg(figure, path)
