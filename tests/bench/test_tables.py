"""Tables and plots of docs/performance.md and README.md show what the rows of the benchmarks hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench_reports import decode_report, decode_row, store_report, store_row
from kvturbo.bench import decode, plots, store, tables
from kvturbo.bench.registry import Case


def lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.startswith("| ")][2:]


def test_every_row_is_in_the_table_with_times_ratios_and_its_share_of_a_copy() -> None:
    shown = lines(tables.decode(decode_report()))
    assert len(shown) == sum(map(len, decode.CASES.values()))
    assert shown[0] == (
        "| 1 x 128 | 8 x 4 | 128 | 1 | 32 | `k4v4` | 100.0 | 300.0 (3.00x) | 200.0 (2.00x) | 1,600.0 (16.00x) | 450.0 (4.50x) "
        "| 2,000 | 50% | 5.0e-05 |"
    )
    assert any(line.startswith("| 64 x ≤65,536 |") for line in shown)


def test_what_was_not_measured_is_a_dash_and_never_a_ratio() -> None:
    rows = [decode_row(Case(1, 128), vllm_tq=None), decode_row(Case(2, 128), kvturbo=None)]
    first, second = lines(tables.decode(decode_report(rows)))
    assert "| 200.0 (2.00x) | - | 450.0 (4.50x) |" in first
    assert "| `k4v4` | - | 300.0 | 200.0 | 1,600.0 | 450.0 | - | - |" in second


def test_readme_has_telling_cases_that_are_measured() -> None:
    cases = [case for group in decode.CASES.values() for case in group]
    assert 6 <= len(tables.TELLING) <= 8 and set(tables.TELLING) <= set(cases)
    text = tables.fast(decode_report())
    assert len(lines(text)) == len(tables.TELLING)
    assert "| 32 x 32,768 | 4 x 8 | 100.0 | 300.0 (3.00x) | 200.0 (2.00x) | 1,600.0 (16.00x) |" in text
    assert "NVIDIA H200" in text and "0123456789ab" in text and "vLLM 0.33.0" in text


def test_summary_counts_the_rows_that_are_lost() -> None:
    cases = [Case(1, 128), Case(2, 128), Case(3, 128)]
    rows = [
        decode_row(case, fa3_bf16=time, vllm_tq=None) for case, time in zip(cases, (90.0, 250.0, 310.0), strict=True)
    ]
    rows.append(decode_row(Case(1, 128, format="k2v2"), fa3_bf16=900.0, vllm_tq=None))
    text = tables.summary(decode_report(rows))
    assert "| FA3 bf16 | 3 | 0.90x | 2.50x | 3.10x | 1 |" in text
    assert "vLLM" not in text


def test_formats_are_compared_at_one_shape_beside_their_bytes() -> None:
    other = decode_row(Case(1, 128, format="k2v2"))
    report = decode_report([*decode_report()["rows"], other])
    shown = lines(tables.formats(report))
    assert len(shown) == 1 + len(decode.CASES["formats"])
    assert shown[0].startswith("| `k4v4` | 132 | 3.88x | 100.0 | 3.00x | 2.00x | 16.00x |")


def test_queries_are_compared_with_one() -> None:
    rows = [
        decode_row(tables.BASE),
        decode_row(replace(tables.BASE, q_len=4), kvturbo=150.0),
        decode_row(Case(1, 128, q_len=2)),
    ]
    assert lines(tables.queries(decode_report(rows))) == [
        "| 1 | 100.0 | 1.00x | 300.0 (3.00x) | 200.0 (2.00x) |",
        "| 4 | 150.0 | 1.50x | 300.0 (2.00x) | 200.0 (1.33x) |",
    ]


def test_stores_and_gathers_show_their_checks_and_host_times() -> None:
    report = store_report()
    shown = lines(tables.store(report))
    assert len(shown) == len(store.CASES)
    assert shown[0] == "| store | 1 | `k4v4` | 8.0 | 12.0 (1.50x) | 6.0 (0.75x) | 99.990% equal |"
    gather = store_row(store.Case("gather", 8192, rotated=True))
    wanted = ["| gather, rotated | 8,192 | `k4v4` | 8.0 | 12.0 (1.50x) | - | 2.0e-05 |"]
    assert lines(tables.store(store_report([gather]))) == wanted
    assert lines(tables.host(report)) == [
        "| store | 11.2 |", "| decode | 30.0 |", "| decode with the step's schedule | 14.0 |"
    ]  # fmt: skip
    assert tables.STORE_SCRIPT in tables.host(store_report(host_us=None))


def test_conditions_say_what_is_missing() -> None:
    text = tables.conditions(decode_report(skipped={"vllm_tq": ["it is not installed"]}, complete=False))
    assert "NVIDIA H200" in text and "vLLM 0.33.0" in text and "4,000 GB/s" in text and "is 5.0e-05" in text
    assert "`vllm_tq`, where it has no time: it is not installed." in text and "rows are missing" in text
    whole = tables.conditions(decode_report())
    assert "missing" not in whole and "no time" not in whole


def test_tables_without_rows_say_that_nothing_was_measured() -> None:
    for name, render in tables.DECODE_TABLES.items():
        assert tables.DECODE_SCRIPT in render(decode_report([])), name
    assert tables.STORE_SCRIPT in tables.store(store_report([]))
    assert tables.DECODE_SCRIPT in tables.fast(decode_report([]))


def test_plots_are_drawn_from_the_rows_and_are_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'kvturbo[eval]'")
    first, second = (plots.plots(decode_report(), tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == ["performance-shapes.svg", "performance-formats.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    changed = decode_report()
    for row in changed["rows"]:
        row["fa3_bf16_us"] = 350.0 + row["batch"]
    others = plots.plots(changed, tmp_path / "c")
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(first, others, strict=True))
    assert plots.plots(decode_report([]), tmp_path / "d") == []
