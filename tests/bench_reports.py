"""Reports of the benchmarks with invented times, in the form in which benchmarks/decode.py and benchmarks/store.py write them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kvturbo.bench import decode, store
from kvturbo.bench.registry import PROVIDERS, Case

FACTS = {
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "vllm": "0.33.0", "python": "3.12.3"},
    "cpu": "Xeon", "gpu": "NVIDIA H200", "commit": "0123456789ab", "complete": True, "skipped": {},
}  # fmt: skip
TIMES = {"kvturbo": 100.0, "fa3_bf16": 300.0, "fa3_fp8": 200.0, "vllm_tq": 1600.0, "kvturbo_triton": 450.0}


def decode_row(case: Case, **times: float | None) -> dict[str, Any]:
    """A row with `TIMES`, or others."""
    assert set(TIMES) == set(PROVIDERS.names())
    row = asdict(case) | {f"{name}_us": value for name, value in (TIMES | times).items()}
    return row | {"rel_err": 5e-5, "gb_per_s": 2000.0}


def decode_report(rows: list[dict[str, Any]] | None = None, **facts: Any) -> dict[str, Any]:
    """A report of every case, or of the given rows."""
    every = [decode_row(case) for group in decode.CASES.values() for case in group]
    return FACTS | {"copy_gb_per_s": 4000.0, "rows": every if rows is None else rows} | facts


def store_report(rows: list[dict[str, Any]] | None = None, **facts: Any) -> dict[str, Any]:
    """A report of every case, or of the given rows."""
    host = {"store": 11.24, "decode": 30.0, "decode_with_schedule": 14.0}
    every = [store_row(case) for case in store.CASES]
    return FACTS | {"host_us": host, "rows": every if rows is None else rows} | facts


def store_row(case: store.Case) -> dict[str, Any]:
    """A row of a store or a gather."""
    is_store = case.what == "store"
    times = {"kvturbo_us": 8.0, "kvturbo_triton_us": 12.0, "vllm_us": 6.0 if is_store else None}
    check = {"equal_vectors": 0.9999 if is_store else None, "rel_err": None if is_store else 2e-5}
    return asdict(case) | times | check
