"""Tables of docs/vllm.md and the README, from the results of benchmarks/vllm_serving.py, vllm_retrieval.py and recent.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from kvturbo.bench.vllm_rows import BASELINES, LENGTHS, LOADS, MODELS, STEPS
from kvturbo.eval.report import markdown_table, not_measured

Report = dict[str, Any]
Row = dict[str, Any]
Cache = tuple[str, int | None]
"""A cache dtype, and tokens of a ring: None where there are no rings, or a file is from before there were any."""
SERVING_SCRIPT, RETRIEVAL_SCRIPT = "benchmarks/vllm_serving.py", "benchmarks/vllm_retrieval.py"
RECENT_SCRIPT = "benchmarks/recent.py"
NAMES = {"auto": "16 bits", "fp8": "`fp8`"}
"""What baselines are called; other cache dtypes by their flag."""
OURS = "turboquant"
SMALLER_IS_BETTER = ("ms", "GiB")
OTHER_RUN = " ¹"
"""Marks figures of another commit than those that `turboquant` is compared with."""
ORDER = (
    "capacity", "graph pool", "8 sequences", "first token,", "first tokens",
    *(f"decode step {batch} x {tokens}" for batch, tokens in STEPS),
    *(f"memory of a prompt of {tokens}" for tokens in LENGTHS),
    *(load.name.partition(",")[2] for load in LOADS.values()),
)  # fmt: skip
"""How the names of rows begin, or go on behind the number of prompts, in the order of the table."""
BRIEF = ("capacity", "8 sequences", "decode step", "first token")
"""How the names of the README's rows begin, beside those of throughputs."""


def conditions(report: Report) -> str:
    """On what and with what an engine was measured."""
    if not report["rows"]:
        return not_measured(SERVING_SCRIPT)
    versions, commits = report["versions"], sorted({value["commit"] for value in report["values"]})
    text = (
        f"Measured with `{SERVING_SCRIPT}` on an {report['gpu']} ({report['cpu']}): vLLM {versions['vllm']} on torch "
        f"{versions['torch']}, Python {versions['python']}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}."
    )
    most = max(_runs(report).values())
    text += f" {'Single runs' if most == 1 else f'Medians of up to {most} runs'}."
    if OTHER_RUN in serving(report):
        text += f"{OTHER_RUN} Of another commit than the row's other figures, so of another run."
    for cache, model in dict.fromkeys((_cache(failure), failure["model"]) for failure in report["failed"]):
        text += f" {_flag(cache)} failed with {model}."
    return text


def _runs(report: Report) -> Mapping[tuple[str, str, Cache], int]:
    counts: dict[tuple[str, str, Cache], int] = {}
    for value in report["values"]:
        key = value["what"], value["model"], _cache(value)
        counts[key] = counts.get(key, 0) + 1
    return counts


def brief(report: Report) -> str:
    """The figures that users look at first, and on what and with what they were measured."""
    rows = [row for row in report["rows"] if row["what"].startswith(BRIEF) or " prompts, " in row["what"]]
    shown = report | {"rows": rows}
    return "\n\n".join([serving(shown), conditions(shown)]) if rows else not_measured(SERVING_SCRIPT)


def serving(report: Report) -> str:
    """Every figure of every model, a column per cache dtype and size of rings, and how much better `turboquant` is than 16 bits and
    fp8; with its largest rings, if there are several sizes.
    """
    rows = report["rows"]
    if not rows:
        return not_measured(SERVING_SCRIPT)
    caches = sorted(dict.fromkeys(_cache(row) for row in rows), key=_column)
    ours = max((cache for cache in caches if cache[0] == OURS), key=lambda cache: cache[1] or 0, default=(OURS, None))
    header = (
        "model",
        "what",
        *(NAMES.get(cache[0], _flag(cache)) for cache in caches),
        *(f"over {NAMES[name]}" for name in BASELINES.values()),
    )
    cells = []
    # Engines that run at once give their figures in any order.
    for model, what in sorted(dict.fromkeys((row["model"], row["what"]) for row in rows), key=_line):
        found = {_cache(row): row for row in rows if (row["model"], row["what"]) == (model, what)}
        times = (_better(found.get(ours), name) for name in BASELINES)
        commits = {found[cache]["commit"] for cache in (ours, *((name, None) for name in NAMES)) if cache in found}
        here = (_value(found.get(cache), commits) for cache in caches)
        cells.append((model, what, *here, *times))
    return markdown_table(header, cells)


def _column(cache: Cache) -> tuple[int, bool]:
    """Baselines, `turboquant`, other formats of kvturbo, and others, in the order in which they come."""
    first = (*NAMES, OURS)
    return first.index(cache[0]) if cache[0] in first else len(first), not cache[0].startswith("kvturbo")


def _line(measured: tuple[str, str]) -> tuple[int, int]:
    model, what = measured
    place = (i for i, text in enumerate(ORDER) if what.startswith(text) or what.endswith(text))
    models = [*MODELS, model]  # a file may have one that is not measured any more
    return models.index(model), next(place, len(ORDER))


def _cache(row: Row) -> Cache:
    return row["kv_cache_dtype"], row.get("recent")


def _flag(cache: Cache) -> str:
    name, recent = cache
    return f"`{name}`" + ("" if recent is None else f", `recent` {recent}")


def _value(row: Row | None, commits: Collection[str]) -> str:
    """A figure, with a mark if it is of none of these commits."""
    if row is None:
        return "-"
    mark = "" if row["commit"] in commits else OTHER_RUN
    return f"{row['value']:,.{2 if row['unit'] in SMALLER_IS_BETTER else 0}f} {row['unit']}{mark}"


def _better(ours: Row | None, name: str) -> str:
    """How many times as good ours is by a ratio of its row: more tokens, or less time or memory."""
    ratio = ours and ours[name]
    if not ours or not ratio:
        return "-"
    return f"{1 / ratio if ours['unit'] in SMALLER_IS_BETTER else ratio:.2f}x"


def retrieval(report: Report) -> str:
    """Right answers by setting, cache dtype and, where the file says it, size of rings; and how they were measured."""
    rings = any("recent" in row for row in report["rows"])
    cells = [
        (
            row["setting"], f"{row['chunk']:,}", NAMES.get(row["kv_cache_dtype"], f"`{row['kv_cache_dtype']}`"),
            *(("-" if row["recent"] is None else str(row["recent"]),) if rings else ()), f"{row['questions']:,}",
            f"{100 * row['accuracy']:.1f} %", _points(row), _split(row),
        )
        for row in report["rows"]
    ]  # fmt: skip
    if not cells:
        return not_measured(RETRIEVAL_SCRIPT)
    header = (
        "setting",
        "chunk",
        "cache",
        *(("`recent`",) if rings else ()),
        "questions",
        "right",
        "points from 16 bits",
        "right in 16 bits only, here only",
    )
    note = (
        f"Measured with `{RETRIEVAL_SCRIPT}` on an {report['gpu']}, vLLM {report['versions']['vllm']} on torch "
        f"{report['versions']['torch']}, model {report['model']}, commit {report['commit']}."
    )
    return "\n\n".join([markdown_table(header, cells), note])


def recent(report: Report) -> str:
    """Divergence by how many of the newest tokens are raw."""
    rows = [row for row in report["rows"] if row["what"] == "mean KL"]
    packed = {row["format"]: row["value"] for row in rows if row["newest"] == 0}
    cells = [
        (
            f"`{row['format']}`", str(row["newest"]), f"{row['value']:.5f}", f"{row['value'] / packed[row['format']]:.2f}x",
            f"{row['p99']:.4f}",
        )
        for row in rows
    ]  # fmt: skip
    if not cells:
        return not_measured(RECENT_SCRIPT)
    versions = report["versions"]
    note = (
        f"Made by `{RECENT_SCRIPT}` on {report['cpu']}: a simulation of model {report['model']} in {report['dtype']}, "
        f"{rows[0]['n']:,} tokens of text decoded one by one after packed contexts of {report['prefix']:,}; torch "
        f"{versions['torch']}, transformers "
        f"{versions['transformers']}, commit {report['commit']}."
    )
    header = ("format", "newest tokens raw", "mean KL to 16 bits", "to none raw", "p99 KL")
    return "\n\n".join([markdown_table(header, cells), note])


def _points(row: Row) -> str:
    return "-" if row["difference_points"] is None else f"{row['difference_points']:+.1f}"


def _split(row: Row) -> str:
    return "-" if row["only_16bit_right"] is None else f"{row['only_16bit_right']}, {row['only_this_right']}"


SERVING_TABLES: dict[str, Callable[[Report], str]] = {"serving-conditions": conditions, "serving": serving}
RETRIEVAL_TABLES: dict[str, Callable[[Report], str]] = {"retrieval": retrieval}
RECENT_TABLES: dict[str, Callable[[Report], str]] = {"recent": recent}
