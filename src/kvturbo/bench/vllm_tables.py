"""Tables of docs/vllm.md and the README, from the results of benchmarks/vllm_serving.py, vllm_retrieval.py and recent.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kvturbo.eval.report import markdown_table, not_measured

Report = dict[str, Any]
Row = dict[str, Any]
SERVING_SCRIPT, RETRIEVAL_SCRIPT = "benchmarks/vllm_serving.py", "benchmarks/vllm_retrieval.py"
RECENT_SCRIPT = "benchmarks/recent.py"
NAMES = {"auto": "16 bits", "fp8": "`fp8`"}
"""What baselines are called; other cache dtypes by their flag."""
OURS = "turboquant"
SMALLER_IS_BETTER = ("ms", "GiB")
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
    for name, model in dict.fromkeys((failure["kv_cache_dtype"], failure["model"]) for failure in report["failed"]):
        text += f" `{name}` failed with {model}."
    return text


def _runs(report: Report) -> Mapping[tuple[str, str, str], int]:
    counts: dict[tuple[str, str, str], int] = {}
    for value in report["values"]:
        key = value["what"], value["model"], value["kv_cache_dtype"]
        counts[key] = counts.get(key, 0) + 1
    return counts


def brief(report: Report) -> str:
    """The figures that users look at first, and on what and with what they were measured."""
    rows = [row for row in report["rows"] if row["what"].startswith(BRIEF) or " prompts, " in row["what"]]
    return "\n\n".join([serving(report | {"rows": rows}), conditions(report)]) if rows else not_measured(SERVING_SCRIPT)


def serving(report: Report) -> str:
    """Every figure of every model, a column per cache dtype, and how much better `turboquant` is than 16 bits and fp8."""
    rows = report["rows"]
    if not rows:
        return not_measured(SERVING_SCRIPT)
    dtypes = list(dict.fromkeys(row["kv_cache_dtype"] for row in rows))
    dtypes = [name for name in NAMES if name in dtypes] + [name for name in dtypes if name not in NAMES]
    header = (
        "model",
        "what",
        *(NAMES.get(name, f"`{name}`") for name in dtypes),
        *(f"over {x}" for x in NAMES.values()),
    )
    cells = []
    for model, what in dict.fromkeys((row["model"], row["what"]) for row in rows):
        found = {row["kv_cache_dtype"]: row for row in rows if (row["model"], row["what"]) == (model, what)}
        times = (_better(found, name) for name in NAMES)
        cells.append((model, what, *(_value(found.get(name)) for name in dtypes), *times))
    return markdown_table(header, cells)


def _value(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row['value']:,.{2 if row['unit'] in SMALLER_IS_BETTER else 0}f} {row['unit']}"


def _better(found: Mapping[str, Row], baseline: str) -> str:
    """How many times as good ours is: more tokens, or less time or memory."""
    if OURS not in found or baseline not in found:
        return "-"
    ours, base = found[OURS]["value"], found[baseline]["value"]
    return f"{base / ours if found[OURS]['unit'] in SMALLER_IS_BETTER else ours / base:.2f}x"


def retrieval(report: Report) -> str:
    """Right answers by setting and cache dtype, and what is said of how they were measured."""
    cells = [
        (
            row["setting"], f"{row['chunk']:,}", NAMES.get(row["kv_cache_dtype"], f"`{row['kv_cache_dtype']}`"),
            f"{row['questions']:,}",
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
