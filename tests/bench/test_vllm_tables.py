"""Tables of docs/vllm.md from reports with invented figures."""

from __future__ import annotations

from typing import Any

from bench_reports import FACTS
from kvturbo.bench.vllm_retrieval import Job
from kvturbo.bench.vllm_retrieval import rows_of as retrieval_rows
from kvturbo.bench.vllm_rows import MODELS, rows_of
from kvturbo.bench.vllm_tables import SERVING_SCRIPT, brief, conditions, recent, retrieval, serving
from kvturbo.eval.report import not_measured


def value(cache_dtype: str, what: str, number: float, unit: str, recent: int | None = None) -> dict[str, Any]:
    facts = {"model": "qwen2.5-7b", "kv_cache_dtype": cache_dtype, "recent": recent, "commit": "0123456789ab"}
    return facts | {"what": what, "value": number, "unit": unit}


def report(*values: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return FACTS | {"values": list(values), "rows": rows_of(values), "failed": []} | facts


def test_more_tokens_and_less_time_are_better() -> None:
    figures = {"auto": (1000, 6.0), "turboquant": (3880, 4.0), "kvturbo_k4v4-o16": (3400, 4.5), "fp8": (2000, 5.0)}
    text = serving(
        report(
            *(value(name, "capacity", tokens, "tokens") for name, (tokens, _) in figures.items()),
            *(value(name, "decode step", step, "ms") for name, (_, step) in figures.items()),
        )
    )
    header, _, capacity, step = text.splitlines()
    assert (
        header == "| model | what | 16 bits | `fp8` | `turboquant` | `kvturbo_k4v4-o16` | over 16 bits | over `fp8` |"
    )
    assert capacity.endswith("| 1,000 tokens | 2,000 tokens | 3,880 tokens | 3,400 tokens | 3.88x | 1.94x |")
    assert step.endswith("| 6.00 ms | 5.00 ms | 4.00 ms | 4.50 ms | 1.50x | 1.25x |")


def test_lines_and_columns_have_an_order_of_their_own() -> None:
    whats = [
        "512 prompts, 3000 in, 500 out, 64 concurrent",
        "decode step 32 x 16384",
        "decode step 8 x 8192",
        "capacity",
    ]
    names = ["turboquant_4bit_nc", "kvturbo_k4v4-o16", "turboquant", "fp8", "auto"]
    found = [
        value(name, what, 1, "ms") | {"model": model}
        for model in ("gone", *reversed(MODELS))
        for what in whats
        for name in names
    ]
    header, _, *lines = serving(report(*found)).splitlines()
    assert header.startswith(
        "| model | what | 16 bits | `fp8` | `turboquant` | `kvturbo_k4v4-o16` | `turboquant_4bit_nc` |"
    )
    order = [whats[3], whats[2], whats[1], whats[0]]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {model}", what] for model in (*MODELS, "gone") for what in order
    ]


def test_the_brief_table_leaves_out_memory_and_says_how_it_was_measured() -> None:
    found = report(value("auto", "capacity", 4, "tokens"), value("auto", "graph pool", 1, "GiB"))
    assert "| capacity |" in brief(found) and "graph pool" not in brief(found) and "Single runs." in brief(found)
    load = "512 prompts, 3000 in, 500 out, 64 concurrent"
    assert f"| {load} | 900 tokens/s |" in brief(report(value("auto", load, 900, "tokens/s")))
    assert brief(report()) == not_measured(SERVING_SCRIPT)


def test_what_was_not_measured_is_a_dash() -> None:
    text = serving(report(value("auto", "graph pool", 0.4, "GiB"), value("fp8", "capacity", 5, "tokens")))
    assert "| graph pool | 0.40 GiB | - | - | - |" in text and "| capacity | - | 5 tokens | - | - |" in text


def test_conditions_name_commits_runs_and_failures() -> None:
    first, second = value("auto", "capacity", 4, "tokens"), value("auto", "capacity", 5, "tokens") | {"commit": "def"}
    text = conditions(report(first))
    assert "NVIDIA H200 (Xeon): vLLM 0.33.0 on torch 2.11.0" in text and "commit 0123456789ab. Single runs." in text
    failure = {"model": "qwen2.5-7b", "kv_cache_dtype": "fp8", "error": "out of memory"}
    text = conditions(report(first, second, failed=[failure, failure]))
    assert text.endswith("commits 0123456789ab, def. Medians of up to 2 runs. `fp8` failed with qwen2.5-7b.")


def test_figures_of_another_commit_are_marked_and_not_compared() -> None:
    steps = {"auto": 6.0, "fp8": 5.0, "turboquant": 4.0, "turboquant_4bit_nc": 20.0}
    values = {name: value(name, "decode step", number, "ms") for name, number in steps.items()}
    values["turboquant_4bit_nc"]["commit"] = "old"
    found = report(*values.values())
    assert serving(found).endswith("| 6.00 ms | 5.00 ms | 4.00 ms | 20.00 ms ¹ | 1.50x | 1.25x |")
    assert "¹ Of another commit than the row's other figures" in conditions(found)
    values["turboquant"]["commit"] = "new"
    found = report(*values.values())
    assert serving(found).endswith("| 6.00 ms | 5.00 ms | 4.00 ms | 20.00 ms ¹ | - | - |")


def test_sizes_of_rings_have_columns_of_their_own() -> None:
    steps = [("auto", 6.0, None), ("turboquant", 3.0, 0), ("turboquant", 4.0, 16)]
    found = report(*(value(name, "decode step", step, "ms", recent) for name, step, recent in steps))
    header, _, step = serving(found).splitlines()
    columns = "| model | what | 16 bits | `turboquant`, `recent` 0 | `turboquant`, `recent` 16 | over 16 bits |"
    assert header.startswith(columns)
    assert step.endswith("| 6.00 ms | 3.00 ms | 4.00 ms | 1.50x | - |")
    failure = {"model": "qwen2.5-7b", "kv_cache_dtype": "turboquant", "recent": 16, "error": "out of memory"}
    text = conditions(found | {"failed": [failure]})
    assert text.endswith("Single runs. `turboquant`, `recent` 16 failed with qwen2.5-7b.")


def test_retrieval_is_paired_with_16_bits() -> None:
    found = {
        Job("hard-4k", 512, "auto"): [True, True, False, True],
        Job("hard-4k", 512, "turboquant", 16): [True, False, True, False],
    }
    facts: dict[str, Any] = FACTS | {"rows": retrieval_rows(found), "model": "kvturbo-12m"}
    text = retrieval(facts)
    assert "| setting | chunk | cache | `recent` | questions |" in text
    assert "| hard-4k | 512 | 16 bits | - | 4 | 75.0 % | +0.0 | 0, 0 |" in text
    assert "| hard-4k | 512 | `turboquant` | 16 | 4 | 50.0 % | -25.0 | 2, 1 |" in text and "model kvturbo-12m" in text
    for row in facts["rows"]:
        del row["recent"]  # a file from before there were rings
    text = retrieval(facts)
    assert "| setting | chunk | cache | questions |" in text
    assert "| hard-4k | 512 | `turboquant` | 4 | 50.0 % | -25.0 | 2, 1 |" in text


def test_nothing_measured_says_what_measures_it() -> None:
    assert (
        serving(report())
        == conditions(report())
        == "Not measured yet: `python benchmarks/vllm_serving.py` makes the rows."
    )
    assert retrieval(FACTS | {"rows": []}) == "Not measured yet: `python benchmarks/vllm_retrieval.py` makes the rows."


def test_divergence_is_shown_against_a_cache_with_nothing_raw() -> None:
    rows = [
        {"what": "mean KL", "format": "k4v4", "newest": newest, "value": kl, "p99": 10 * kl, "n": 4096}
        for newest, kl in ((0, 0.01), (16, 0.0025))
    ]
    versions = FACTS["versions"] | {"transformers": "5.17.0"}
    facts = {"model": "tiny", "dtype": "float32", "prefix": 1024, "versions": versions}
    text = recent(FACTS | facts | {"rows": [*rows, {"what": "hard-4k", "format": "k4v4", "newest": 0, "value": 1}]})
    assert text.splitlines()[2:4] == [
        "| `k4v4` | 0 | 0.01000 | 1.00x | 0.1000 |",
        "| `k4v4` | 16 | 0.00250 | 0.25x | 0.0250 |",
    ]
    assert "4,096 tokens of text" in text and "contexts of 1,024" in text
    assert recent(FACTS | {"rows": []}) == "Not measured yet: `python benchmarks/recent.py` makes the rows."
