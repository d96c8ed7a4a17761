"""Tables and plots of the comparison that benchmarks/quality.py measures, from its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kvturbo.eval.goals import Row, check, find, over_rotations
from kvturbo.eval.report import markdown_table, not_measured

Report = dict[str, Any]
ABLATED = ("k4v4", "k4v3", "k4v2", "k3v3", "k3v2")
HARD, EASY = "hard-8k", "multikey-8k"
FOLDED, CONTROL = ", weights folded", " control"
QK_NORM = "qk-norm"
BRIEF = (
    *("fp8", "vllm-k8v4", "k8v4", "vllm-4bit_nc", "k4v4", "vllm-k3v4_nc", "k4v3", "kvarn-k4v2", "vllm-3bit_nc", "k4v2"),
    *("k3v3", "kivi2", "k3v2", "plan of at most 2.9 bits"),
)
MISSING = not_measured("benchmarks/quality.py")


def conditions(report: Report) -> str:
    """On what, with what and when it was measured."""
    sizes, versions = report["settings"], report["versions"]
    machine = report["gpu"] or report["cpu"]
    text = find(report["rows"], section="text", case="plain", name="k4v4")
    scored = f"{text['scored_tokens']:,}" if text else "no"
    return (
        f"Measured with `benchmarks/quality.py` on {machine}: model {sizes['model']}, {sizes['dtype']}, {scored} scored tokens in "
        f"rows of {sizes['length']:,} (the first {sizes['prefix']:,} tokens raw and not scored, then chunks of "
        f"{sizes['chunk']}); torch {versions['torch']}, transformers {versions['transformers']}, commit {report['commit']}."
    )


def goals(report: Report) -> str:
    """Figures to reach, reached or not."""
    rows = [(goal.text, goal.target, goal.found, goal.verdict) for goal in check(report["rows"])]
    return markdown_table(("figure", "to reach", "found", ""), rows)


def brief(report: Report) -> str:
    """A few formats and baselines, fewest bits first, for a reader in a hurry."""
    text = {row["name"]: row for row in _rows(report, section="text", case="plain")}
    hard = {row["name"]: row for row in _answers(report, "retrieval", "plain")}
    rows = sorted((text[name] for name in BRIEF if name in text), key=lambda row: row["bits_at_8k"])
    cells = [
        (f"`{r['name']}`", f"{r['bits_at_8k']:.2f}", _number(r), _number(r, "kl_p99.9"), _points(hard.get(r["name"])))
        for r in rows
    ]
    header = ("cache", "bits per element at 8k", "mean KL", "p99.9 KL", f"{HARD}, points to 16 bit")
    table = _or_missing(header, cells)
    return f"{table}\n\nWindows in 16 bits are counted; all layers are packed. {conditions(report)}" if rows else table


def formats(report: Report) -> str:
    """Every format and baseline on the plain model, fewest bits first."""
    rows = sorted(_rows(report, section="text", case="plain"), key=lambda row: (row["bits_at_8k"], row["name"]))
    header = ("format", "bits", "bits at 8k", "mean KL", "p99 KL", "p99.9 KL", "same top-1", "perplexity", HARD, EASY)
    return _or_missing(header, [_format_cells(row, report) for row in rows])


def low(report: Report) -> str:
    """Settings of few bits on the harder retrieval setting, the best first."""
    found = [r for r in _rows(report, section="retrieval", setting=HARD) if r["bits_at_8k"] <= 3.0]
    rows = sorted(found, key=lambda row: -row["difference"])
    cells = [(f"`{r['name']}`", f"{r['bits']:.3f}", f"{r['bits_at_8k']:.2f}", *_accuracy_cells(r)) for r in rows]
    return _or_missing(("setting", "bits", "bits at 8k", HARD, "to 16 bit, points", "questions"), cells)


def plans(report: Report) -> str:
    """What the plans give every layer."""
    rows = [row for row in _rows(report, section="text", case="plain") if row["name"].startswith("plan ")]
    if not rows:
        return MISSING
    layers = list(rows[0]["layers"])
    cells = []
    for row in sorted(rows, key=lambda row: row["bits_at_8k"]):
        chosen = [row["layers"][i].removeprefix("kvturbo ").removesuffix(", windows 0 + 0") for i in layers]
        cells.append((f"{row['bits_at_8k']:.2f}", _number(row), *chosen))
    return markdown_table(("bits at 8k", "mean KL", *(f"layer {i}" for i in layers)), cells)


def ablation(report: Report) -> str:
    """Mean KL of a format with one choice made otherwise, over that of the format."""
    rows = {row["name"]: row for row in _rows(report, section="ablation")}
    changes = dict.fromkeys(name.partition(" ")[2] for name in rows)
    cells = [("as it is, mean KL", *(_number(rows.get(name)) for name in ABLATED))]
    for change in [change for change in changes if change]:
        ratios = [_ratio(rows.get(f"{name} {change}"), rows.get(name)) for name in ABLATED]
        cells.append((change, *ratios))
    return _or_missing(("change", *(f"`{name}`" for name in ABLATED)), cells if rows else [])


def rotations(report: Report) -> str:
    """Mean KL over rotations: of formats as they are, and with the least-squares scale for values."""
    cells = []
    for name in dict.fromkeys(row["name"] for row in _rows(report, section="seeds")):
        found = over_rotations(report["rows"], name)
        mean = sum(found) / len(found)
        cells.append((f"`{name}`", str(len(found)), f"{mean:.3g}", f"{min(found):.3g}", f"{max(found):.3g}"))
    return _or_missing(("format", "rotations", "mean KL", "least", "most"), cells)


def cases(report: Report) -> str:
    """Divergence and retrieval on rewrites of the model that keep its function, and on a trained variant, a table each."""
    return "\n\n".join(_case(report, case) for case in _cases(report)) or MISSING


def _cases(report: Report) -> list[str]:
    """Names of the hard cases, without controls and folded ones."""
    every = dict.fromkeys(row["case"] for row in _rows(report, section="case"))
    return [case for case in every if not case.endswith((CONTROL, FOLDED))]


def _case(report: Report, case: str) -> str:
    rows = sorted(_rows(report, section="case", case=case), key=lambda row: (row["bits_at_8k"], row["name"]))
    cells = [_case_cells(report, row) for row in rows]
    cells += [_case_cells(report, row, FOLDED) for row in _rows(report, section="case", case=case + FOLDED)]
    header = ("format", "bits", "bits at 8k", "mean KL", "over plain", "p99.9 KL", "same top-1", HARD)
    exact = find(report["rows"], section="case-retrieval", case=case, name="16bit")
    control = find(report["rows"], section="case", case=case + CONTROL, name="k4v4")
    notes = []
    if exact is not None:
        notes.append(f"16 bits answer {_percent(exact)} of {HARD}.")
    if control is not None:
        notes.append(f"`k4v4` on a model of the same shape without what makes it hard: mean KL {_number(control)}.")
    if case == QK_NORM and "qk_norm" in report:
        facts = report["qk_norm"]
        notes.append(
            f"Trained for {facts['steps']:,} steps and {facts['tokens'] / 1e6:.0f} M tokens on {facts['device']}."
        )
    return "\n\n".join([f"**{case}**", markdown_table(header, cells), *notes])


def _case_cells(report: Report, row: Row, suffix: str = "") -> tuple[str, ...]:
    plain = find(report["rows"], section="text", case="plain", name=row["name"].partition(" ")[0])
    answer = find(report["rows"], section="case-retrieval", case=row["case"], name=row["name"])
    return (
        f"`{row['name']}`{suffix}", f"{row['bits']:.3f}", f"{row['bits_at_8k']:.2f}", _number(row), _ratio(row, plain),
        _number(row, "kl_p99.9"), f"{100 * row['same_top1']:.2f} %", _with_count(answer),
    )  # fmt: skip


def heads(report: Report) -> str:
    """Divergence when only sharp or only diffuse heads are packed."""
    rows = _rows(report, section="heads")
    cells = [
        (f"`{r['name']}`", r["setting"], str(r["heads"]), f"{r['effective_tokens']:.0f}", _number(r), f"{r['kl_p99.9']:.4f}")
        for r in rows
    ]  # fmt: skip
    return _or_missing(("format", "heads packed", "KV heads", "tokens attended to", "mean KL", "p99.9 KL"), cells)


def sides(report: Report) -> str:
    """Divergence when only keys or only values are packed."""
    rows = [row for row in _rows(report, section="sides") if row["setting"].endswith(" all")]
    cells = []
    for name in dict.fromkeys(row["name"] for row in rows):
        both = find(report["rows"], section="text", case="plain", name=name)
        only = [find(rows, name=name, setting=f"{side} all") for side in ("k", "v")]
        cells.append((f"`{name}`", *map(_number, (*only, both))))
    return _or_missing(("format", "keys only", "values only", "both"), cells)


def length(report: Report) -> str:
    """Retrieval by setting and length, in percent of questions answered exactly."""
    rows = _rows(report, section="length") + _rows(report, section="retrieval", case="plain")
    measured = _rows(report, section="length")
    settings = sorted({row["setting"] for row in rows}, key=_length_key)
    names = dict.fromkeys(row["name"] for row in measured)
    cells = [(f"`{name}`", *(_percent(find(rows, name=name, setting=s)) for s in settings)) for name in names]
    counts = {s: find(measured, setting=s, name="16bit") or find(rows, setting=s, name="16bit") for s in settings}
    last = ("questions (16 bit)", *(f"{row['questions']:,}" if row else "-" for row in counts.values()))
    return _or_missing(("format", *settings), [*cells, last] if cells else [])


def plot_bits(report: Report) -> str:
    """Divergence against bits."""
    drawn = _rows(report, section="text", case="plain")
    return _image("bits", "KL divergence against bits per element") if drawn else MISSING


def plot_cases(report: Report) -> str:
    """Divergence and retrieval against bits, by hard case."""
    return _image("cases", "KL divergence and retrieval against bits on hard cases") if _cases(report) else MISSING


def plot_length(report: Report) -> str:
    """Accuracy against length."""
    return _image("length", "retrieval accuracy against length") if _rows(report, section="length") else MISSING


def plot_layers(report: Report) -> str:
    """Divergence by layer, keys and values apart."""
    return _image("layers", "KL divergence by layer, keys and values apart") if _layer_rows(report) else MISSING


TABLES: dict[str, Callable[[Report], str]] = {
    "conditions": conditions,
    "goals": goals,
    "formats": formats,
    "low": low,
    "plans": plans,
    "ablation": ablation,
    "rotations": rotations,
    "cases": cases,
    "heads": heads,
    "sides": sides,
    "length": length,
    "plot-bits": plot_bits,
    "plot-cases": plot_cases,
    "plot-length": plot_length,
    "plot-layers": plot_layers,
}
"""Tables of docs/quality.md by name."""


def plots(report: Report, folder: Path) -> list[Path]:
    """Draws what the rows allow: divergence against bits, accuracy against length, divergence by layer; returns the files."""
    from kvturbo.eval import plot

    drawn = []
    text = _shown(_rows(report, section="text", case="plain"))
    if text:
        answers = _shown(_answers(report, "retrieval", "plain"))
        drawn.append(plot.divergence_by_bits(text, answers, folder / "quality-bits.svg"))
    if found := _cases(report):
        panels = {case: _panel(report, case) for case in found}
        drawn.append(plot.divergence_by_case(panels, folder / "quality-cases.svg"))
    lengths = _rows(report, section="length") + _rows(report, section="retrieval", case="plain")
    if _rows(report, section="length"):
        drawn.append(plot.accuracy_by_length(lengths, folder / "quality-length.svg"))
    if _layer_rows(report):
        drawn.append(plot.divergence_by_layer(_layer_rows(report), folder / "quality-layers.svg"))
    return drawn


def _image(name: str, text: str) -> str:
    return f"![{text}](images/quality-{name}.svg)"


def _answers(report: Report, section: str, case: str) -> list[Row]:
    """Rows of the harder retrieval setting but 16 bits' own."""
    return [row for row in _rows(report, section=section, case=case, setting=HARD) if row["name"] != "16bit"]


def _shown(rows: Iterable[Row]) -> list[Row]:
    """Rows of plots: plans and what the guard chooses, but no other change of a format, for which there are tables."""
    return [
        row for row in rows if " " not in row["name"] or row["name"].startswith("plan ") or "guarded" in row["name"]
    ]


def _panel(report: Report, case: str) -> tuple[list[Row], list[Row]]:
    """Divergence and answers of a case, those with its weights folded beside the others."""
    folded = _rows(report, section="case", case=case + FOLDED), _answers(report, "case-retrieval", case + FOLDED)
    own = _rows(report, section="case", case=case), _answers(report, "case-retrieval", case)
    named = [[row | {"name": f"{row['name']}, folded"} for row in rows] for rows in folded]
    return _shown(own[0]) + named[0], _shown(own[1]) + named[1]


def _layer_rows(report: Report) -> list[Row]:
    return [row for row in _rows(report, section="sides") if not row["setting"].endswith(" all")]


def _rows(report: Report, **wanted: Any) -> list[Row]:
    return [row for row in report["rows"] if all(row[name] == value for name, value in wanted.items())]


def _or_missing(header: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    listed = list(cells)
    return markdown_table(header, listed) if listed else MISSING


def _format_cells(row: Row, report: Report) -> tuple[str, ...]:
    answers = [
        find(report["rows"], section="retrieval", case="plain", name=row["name"], setting=s) for s in (HARD, EASY)
    ]
    return (
        f"`{row['name']}`", f"{row['bits']:.3f}", f"{row['bits_at_8k']:.2f}", _number(row), _number(row, "kl_p99"),
        _number(row, "kl_p99.9"), f"{100 * row['same_top1']:.2f} %", f"{row['perplexity']:.4f}", *map(_with_count, answers),
    )  # fmt: skip


def _accuracy_cells(row: Row) -> tuple[str, str, str]:
    return f"{100 * row['accuracy']:.1f} %", _points(row), f"{row['questions']:,}"


def _points(row: Row | None) -> str:
    if row is None:
        return "-"
    interval = f"{100 * row['difference_low']:+.1f} to {100 * row['difference_high']:+.1f}"
    return f"{100 * row['difference']:+.1f} ({interval})"


def _number(row: Row | None, name: str = "kl_mean") -> str:
    if row is None:
        return "-"
    return "NaN" if row[name] is None else f"{row[name]:.3g}" if row[name] < 0.1 else f"{row[name]:.2f}"


def _ratio(row: Row | None, base: Row | None) -> str:
    if row is None or base is None or row["kl_mean"] is None:
        return "-"
    return f"{row['kl_mean'] / base['kl_mean']:.2f}x"


def _percent(row: Row | None) -> str:
    return "-" if row is None else f"{100 * row['accuracy']:.1f} %"


def _with_count(row: Row | None) -> str:
    return "-" if row is None else f"{100 * row['difference']:+.1f} ({row['questions']:,})"


def _length_key(setting: str) -> tuple[str, int]:
    task, _, size = setting.rpartition("-")
    return task, int(size.removesuffix("k"))
