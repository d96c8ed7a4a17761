"""Tables of README.md and docs/performance.md, from the results of benchmarks/decode.py and benchmarks/store.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from kvturbo.bench.registry import Case
from kvturbo.config import KVFormat
from kvturbo.eval.report import markdown_table, not_measured

Report = dict[str, Any]
Row = dict[str, Any]
DECODE_SCRIPT, STORE_SCRIPT = "benchmarks/decode.py", "benchmarks/store.py"
BASELINES = {"fa3_bf16": "FA3 bf16", "fa3_fp8": "FA3 fp8", "vllm_tq": "vLLM's TurboQuant"}
"""What other projects' columns are called."""
OTHERS = BASELINES | {"kvturbo_triton": "kvturbo's Triton"}
BASE = Case(32, 32768)
"""The shape at which formats and numbers of queries are compared."""
TELLING = (
    Case(1, 4096), Case(1, 131072), Case(8, 4096), Case(8, 32768), BASE, Case(128, 4096),
    replace(BASE, kv_heads=4, group=8), Case(64, 65536, ragged=True),
)  # fmt: skip
"""The rows of README.md."""
HOST_CALLS = {"store": "store", "decode": "decode", "decode_with_schedule": "decode with the step's schedule"}


def fast(report: Report) -> str:
    """README.md's table: a few shapes, and where they come from."""
    rows = [row for case in TELLING for row in report["rows"] if _is(row, case)]
    header = ("sequences x tokens", "KV heads x group", "kvturbo, µs", *(f"{name}, µs" for name in BASELINES.values()))
    cells = [(_tokens(row), _heads(row), _time(row, "kvturbo"), *_compared(row, BASELINES)) for row in rows]
    note = (
        f"Decode attention of one layer, `{BASE.format}`, head_dim {BASE.head_dim}; in brackets how many times as long as "
        f"kvturbo. ≤: lengths from {Case.SHORTEST} tokens up. {report['gpu']}, vLLM {report['versions']['vllm']}, commit "
        f"{report['commit']}."
    )
    return "\n\n".join([markdown_table(header, cells), note]) if cells else not_measured(DECODE_SCRIPT)


def conditions(report: Report) -> str:
    """On what and with what decode was measured, and what is missing."""
    errors = [row["rel_err"] for row in report["rows"] if row["rel_err"] is not None]
    text = (
        f"{_machine(report, DECODE_SCRIPT)} Copies within the GPU's memory run at {report['copy_gb_per_s']:,.0f} GB/s, "
        f"bytes read and bytes written counted."
    )
    if errors:
        text += f" The largest error of a row, of {len(errors)}, is {max(errors):.1e}."
    return text + _gaps(report)


def summary(report: Report) -> str:
    """Per baseline how kvturbo's default format does over all shapes."""
    cells = []
    for name, label in OTHERS.items():
        rows = [row for row in report["rows"] if row["format"] == BASE.format and not row["recent"]]
        ratios = [ratio for row in rows if (ratio := speed(row, name)) is not None]
        if ratios:
            middle = (min(ratios), statistics.median(ratios), max(ratios))
            cells.append((label, str(len(ratios)), *(f"{x:.2f}x" for x in middle), str(sum(x < 1 for x in ratios))))
    header = (f"`{BASE.format}` against", "rows", "least", "median", "most", "rows in which kvturbo is slower")
    return _or_missing(header, cells, DECODE_SCRIPT)


def decode(report: Report) -> str:
    """Every row."""
    header = (
        "sequences x tokens", "KV heads x group", "head_dim", "queries", "page", "format", "kvturbo", *OTHERS.values(),
        "GB/s", "of a copy", "error",
    )  # fmt: skip
    cells = [
        (
            _tokens(row), _heads(row), str(row["head_dim"]), str(row["q_len"]), str(row["page_size"]), _format_name(row),
            _time(row, "kvturbo"), *_compared(row, OTHERS), *_bandwidth(row, report), _error(row),
        )
        for row in report["rows"]
    ]  # fmt: skip
    return _or_missing(header, cells, DECODE_SCRIPT)


def formats(report: Report) -> str:
    """Formats at one shape, beside what their bytes would allow."""
    rows = [row for row in report["rows"] if _is(row, replace(BASE, format=row["format"]))]
    header = (
        "format",
        "bytes per token and head",
        "16 bits over it",
        "kvturbo, µs",
        *BASELINES.values(),
        "GB/s",
        "of a copy",
    )
    cells = [
        (
            f"`{row['format']}`", str(_format(row).bytes_per_token), f"{_format(row).compression:.2f}x", _time(row, "kvturbo"),
            *(_times(speed(row, name)) for name in BASELINES), *_bandwidth(row, report),
        )
        for row in rows
    ]  # fmt: skip
    return _or_missing(header, cells, DECODE_SCRIPT)


def queries(report: Report) -> str:
    """Numbers of new tokens per sequence at one shape."""
    rows = [row for row in report["rows"] if _is(row, replace(BASE, q_len=row["q_len"]))]
    one = next((row["kvturbo_us"] for row in rows if row["q_len"] == 1), None)
    header = (
        "queries",
        "kvturbo, µs",
        "over one query",
        *(f"{BASELINES[name]}, µs" for name in ("fa3_bf16", "fa3_fp8")),
    )
    cells = [
        (
            str(row["q_len"]), _time(row, "kvturbo"), _times(row["kvturbo_us"] / one if row["kvturbo_us"] and one else None),
            *_compared(row, ("fa3_bf16", "fa3_fp8")),
        )
        for row in rows
    ]  # fmt: skip
    return _or_missing(header, cells, DECODE_SCRIPT)


def plot_shapes(report: Report) -> str:
    """The plot of speeds by shape."""
    return _image("shapes", "speed over FA3 by shape") if plain_rows(report) else not_measured(DECODE_SCRIPT)


def plot_formats(report: Report) -> str:
    """The plot of speeds by format."""
    return _image("formats", "speed over FA3 bf16 by format") if format_rows(report) else not_measured(DECODE_SCRIPT)


def store_conditions(report: Report) -> str:
    """On what and with what store and gather were measured."""
    return _machine(report, STORE_SCRIPT) + _gaps(report)


def store(report: Report) -> str:
    """Stores and gathers with the check of each."""
    header = (
        "operation",
        "tokens",
        "format",
        "kvturbo, µs",
        "kvturbo's Triton, µs",
        "vLLM's 16-bit store, µs",
        "check",
    )
    cells = [
        (
            f"{row['what']}, rotated" if row["rotated"] else row["what"], f"{row['tokens']:,}", f"`{row['format']}`",
            _time(row, "kvturbo"), *_compared(row, ("kvturbo_triton", "vllm")), _check(row),
        )
        for row in report["rows"]
    ]  # fmt: skip
    return _or_missing(header, cells, STORE_SCRIPT)


def host(report: Report) -> str:
    """Host time per eager call."""
    found = report["host_us"] or {}
    cells = [(label, f"{found[name]:.1f}") for name, label in HOST_CALLS.items() if name in found]
    return _or_missing(("eager call", "host time, µs"), cells, STORE_SCRIPT)


DECODE_TABLES: Mapping[str, Callable[[Report], str]] = {
    "decode-conditions": conditions,
    "decode-summary": summary,
    "decode-plot-shapes": plot_shapes,
    "decode-formats": formats,
    "decode-plot-formats": plot_formats,
    "decode-queries": queries,
    "decode": decode,
}
"""Tables of docs/performance.md from the results of benchmarks/decode.py."""
STORE_TABLES: Mapping[str, Callable[[Report], str]] = {
    "store-conditions": store_conditions,
    "store": store,
    "store-host": host,
}
"""Those from the results of benchmarks/store.py."""


def speed(row: Row, other: str) -> float | None:
    """The other's time over that of kvturbo's fastest kernel, or None if one of them was not measured."""
    mine, time = row["kvturbo_us"], row.get(f"{other}_us")
    return time / mine if mine and time else None


def plain_rows(report: Report) -> list[Row]:
    """Rows of the default format, page size and one query, with FA3's bf16 time: one per shape."""
    default = {name: getattr(Case, name) for name in ("format", "page_size", "q_len", "recent")}
    return [r for r in report["rows"] if speed(r, "fa3_bf16") and default.items() <= r.items()]


def format_rows(report: Report) -> list[Row]:
    """One row per format, with FA3's bf16 time."""
    return [r for r in report["rows"] if speed(r, "fa3_bf16") and _is(r, replace(BASE, format=r["format"]))]


def shape(row: Row) -> str:
    """A row's shape in one line."""
    dim = "" if row["head_dim"] == BASE.head_dim else f", d {row['head_dim']}"
    return f"{_tokens(row)}, {_heads(row)}{dim}"


def byte_ratio(row: Row) -> float:
    """Bytes of a 16-bit cache over those of the row's format."""
    return _format(row).compression


def _is(row: Row, case: Case) -> bool:
    return asdict(case).items() <= row.items()


def _format_name(row: Row) -> str:
    return f"`{row['format']}`" + (f", {row['recent']} raw" if row["recent"] else "")


def _format(row: Row) -> KVFormat:
    return KVFormat.from_name(row["format"], row["head_dim"])


def _tokens(row: Row) -> str:
    return f"{row['batch']} x {'≤' if row['ragged'] else ''}{row['context']:,}"


def _heads(row: Row) -> str:
    return f"{row['kv_heads']} x {row['group']}"


def _time(row: Row, name: str) -> str:
    time = row.get(f"{name}_us")
    return f"{time:,.1f}" if time else "-"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _compared(row: Row, names: Sequence[str] | Mapping[str, str]) -> list[str]:
    ratios = {name: speed(row, name) for name in names}
    return [_time(row, name) + (f" ({ratio:.2f}x)" if ratio else "") for name, ratio in ratios.items()]


def _bandwidth(row: Row, report: Report) -> tuple[str, str]:
    if not row["kvturbo_us"]:
        return "-", "-"
    return f"{row['gb_per_s']:,.0f}", f"{row['gb_per_s'] / report['copy_gb_per_s']:.0%}"


def _error(row: Row) -> str:
    return "-" if row["rel_err"] is None else f"{row['rel_err']:.1e}"


def _check(row: Row) -> str:
    return _error(row) if row["equal_vectors"] is None else f"{row['equal_vectors']:.3%} equal"


def _machine(report: Report, script: str) -> str:
    versions = report["versions"]
    names = {"torch": "torch", "triton": "Triton", "vllm": "vLLM", "python": "Python"}
    found = ", ".join(f"{label} {versions[name]}" for name, label in names.items() if versions[name])
    return f"Measured with `{script}` on an {report['gpu']} ({report['cpu']}), {found}, commit {report['commit']}."


def _gaps(report: Report) -> str:
    text = "" if report["complete"] else " The run was cut before its last case, so rows are missing."
    for name, reasons in report["skipped"].items():
        text += f" `{name}`, where it has no time: {'; '.join(reasons)}."
    return text


def _image(name: str, text: str) -> str:
    return f"![{text}](images/performance-{name}.svg)"


def _or_missing(header: Sequence[str], cells: Sequence[Sequence[str]], script: str) -> str:
    return markdown_table(header, cells) if cells else not_measured(script)
