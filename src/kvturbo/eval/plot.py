"""Plots of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def divergence_by_bits(rows: Sequence[Row], answers: Sequence[Row], path: Path) -> Path:
    """Mean and 99.9 % KL divergence and retrieval against bits per element with windows, kvturbo's formats and others apart.

    Args:
        rows: `name`, `source`, `bits_at_8k`, `kl_mean`, `kl_p99.9` of every format.
        answers: `name`, `source`, `bits_at_8k` and `difference` to 16 bits with its interval, of one retrieval setting.
        path: the SVG to write.
    """
    figure, panels = new_figure(18, 6, 3)
    for axes, key, label in zip(panels, ("kl_mean", "kl_p99.9"), ("mean", "99.9 % quantile of"), strict=False):
        _by_bits(axes, [row for row in rows if row[key]], key)
        axes.set(ylabel=f"{label} KL [nats/token]", yscale="log")
    _lost(panels[2], answers)
    return save_svg(figure, path)


def divergence_by_case(cases: Mapping[str, tuple[Sequence[Row], Sequence[Row]]], path: Path) -> Path:
    """Mean KL divergence (above) and retrieval (below) against bits per element, a column per hard case.

    Args:
        cases: name -> rows and answers as for `divergence_by_bits`.
        path: the SVG to write.
    """
    figure, panels = new_figure(5.5 * len(cases), 11, len(cases), 2)
    for i, (case, (rows, answers)) in enumerate(cases.items()):
        _by_bits(panels[i], [row for row in rows if row["kl_mean"]], "kl_mean")
        panels[i].set(ylabel="mean KL [nats/token]", yscale="log", title=case)
        _lost(panels[len(cases) + i], answers)
    return save_svg(figure, path)


def _by_bits(axes: Any, rows: Sequence[Row], key: str, factor: float = 1.0) -> None:
    for ours in (True, False):
        chosen = [row for row in rows if str(row["source"]).startswith("kvturbo") == ours]
        marker, name = ("o", "kvturbo") if ours else ("s", "others")
        axes.plot([r["bits_at_8k"] for r in chosen], [factor * r[key] for r in chosen], marker, label=name)
        for row in chosen:
            place = (row["bits_at_8k"], factor * row[key])
            axes.annotate(row["name"], place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("bits per element at 8k, windows counted")
    axes.grid(alpha=0.3)
    axes.legend()


def _lost(axes: Any, answers: Sequence[Row]) -> None:
    for row in answers:
        ends = [100 * row[name] for name in ("difference_low", "difference_high")]
        axes.plot([row["bits_at_8k"]] * 2, ends, color="0.7", linewidth=0.8, zorder=0)
    _by_bits(axes, answers, "difference", 100.0)
    setting = f"{answers[0]['setting']}, " if answers else ""
    axes.set(ylabel=f"{setting}difference to 16 bits [points]", yscale="symlog")


def accuracy_by_length(rows: Sequence[Row], path: Path) -> Path:
    """Retrieval accuracy with 95 % intervals against the length of the context, a panel per kind of task, as SVG.

    Args:
        rows: `name`, `setting` (such as `hops-4k`), `accuracy`, `low`, `high`.
        path: the file to write.
    """
    kinds = list(dict.fromkeys(row["setting"].rpartition("-")[0] for row in rows))
    figure, panels = new_figure(3.2 * len(kinds), 3.6, len(kinds))
    names = list(dict.fromkeys(row["name"] for row in rows if row["section"] == "length"))
    for axes, kind in zip(panels, kinds, strict=True):
        for shift, name in enumerate(names):
            found = {
                int(r["setting"].rpartition("-")[2].removesuffix("k")): r
                for r in rows if r["name"] == name and r["setting"].rpartition("-")[0] == kind
            }  # fmt: skip
            sizes = sorted(found)
            values = [100 * found[size]["accuracy"] for size in sizes]
            below = [max(0.0, value - 100 * found[size]["low"]) for size, value in zip(sizes, values, strict=True)]
            above = [max(0.0, 100 * found[size]["high"] - value) for size, value in zip(sizes, values, strict=True)]
            places = [size * (1 + 0.01 * shift) for size in sizes]
            axes.errorbar(
                places, values, yerr=[below, above], fmt="o-", capsize=2, label=name, linewidth=1, markersize=3
            )
        axes.set(title=kind, xlabel="context [k tokens]")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("answered exactly [%]")
    panels[-1].legend(fontsize=6)
    return save_svg(figure, path)


def divergence_by_layer(rows: Sequence[Row], path: Path) -> Path:
    """Mean KL divergence when only one layer's keys or only its values are packed, as SVG.

    Args:
        rows: `name`, `setting` (such as `k 3`: keys of layer 3), `kl_mean`.
        path: the file to write.
    """
    figure, (axes,) = new_figure(7, 3.6, 1)
    for side, label, shift in (("k", "keys", -0.2), ("v", "values", 0.2)):
        found = {int(r["setting"].split()[1]): r["kl_mean"] for r in rows if r["setting"].startswith(side)}
        layers = sorted(found)
        axes.bar([layer + shift for layer in layers], [found[layer] for layer in layers], width=0.4, label=label)
    axes.set(xlabel="layer", ylabel="mean KL [nats/token]", yscale="log", title=f"{rows[0]['name']} in one layer only")
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    return save_svg(figure, path)


def new_figure(width: float, height: float, panels: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure of that many inches with panels side by side in each row, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, panels, squeeze=False).flatten())


def save_svg(figure: Any, path: Path) -> Path:
    """SVG without a date and with ids that depend on the content only, so that the same rows give the same file."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "kvturbo"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path
