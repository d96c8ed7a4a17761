"""The serving benchmark's jobs, options and rows; engines need a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvturbo.bench import vllm_rows
from kvturbo.bench.vllm_rows import CACHE_DTYPES, ENGINES, LONG_ANSWERS, LONG_PROMPTS, MODELS, Job, jobs, rows_of

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vllm_serving.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vllm_serving", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rounds_alternate_cache_dtypes() -> None:
    found = jobs(["latency"], ["llama-3.1-8b"], CACHE_DTYPES, 2)
    assert [job.cache_dtype for job in found] == [*CACHE_DTYPES, *reversed(CACHE_DTYPES)]
    assert len(jobs(list(ENGINES), list(MODELS), CACHE_DTYPES, 3)) == 3 * len(ENGINES) * len(MODELS) * len(CACHE_DTYPES)


@pytest.mark.parametrize(
    "engine, model, dtype, rounds, message",
    [
        ("x", "qwen2.5-7b", "auto", 1, "engine must be among latency, .*got x"),
        ("latency", "x", "auto", 1, "model must be among qwen2.5-7b, .*got x"),
        ("latency", "qwen2.5-7b", "x", 1, "cache dtype must be among auto, .*got x"),
        ("latency", "qwen2.5-7b", "auto", 0, "rounds must be at least 1, got 0"),
    ],
)
def test_unknown_names_are_refused(engine: str, model: str, dtype: str, rounds: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs([engine], [model], [dtype], rounds)


def test_a_quarter_of_the_memory_is_a_quarter_of_what_16_bits_need() -> None:
    assert vllm_rows.bf16_bytes_per_token("llama-3.1-8b") == 131072
    assert vllm_rows.bf16_bytes_per_token("qwen2.5-7b") == 57344
    assert LONG_PROMPTS.quarter_bytes("llama-3.1-8b") * 4 == 64 * 3500 * 131072
    options = Job("quarter-long-answers", "qwen2.5-7b", "fp8").options()
    assert options["kv_cache_memory_bytes"] == LONG_ANSWERS.quarter_bytes("qwen2.5-7b")
    assert options["max_num_seqs"] == 128 and not options["enable_prefix_caching"]
    assert "kv_cache_memory_bytes" not in Job("latency", "qwen2.5-7b", "fp8").options()


def test_rows_are_medians_and_their_ratios() -> None:
    def value(number: float) -> dict[str, Any]:
        return {"what": "capacity", "value": number, "unit": "tokens"}

    runs = {"auto": [100, 90, 200], "fp8": [200], "turboquant": [370, 390]}
    rows = rows_of((Job("latency", "qwen2.5-7b", name), value(x)) for name, found in runs.items() for x in found)
    assert [row["value"] for row in rows] == [100, 200, 380]
    assert [row["ratio_bf16"] for row in rows] == [1, 2, 3.8] and rows[2]["ratio_fp8"] == 1.9
    assert list(rows[0]) == ["what", "model", "kv_cache_dtype", "value", "unit", "ratio_bf16", "ratio_fp8"]
    alone = rows_of([(Job("latency", "qwen2.5-7b", "turboquant"), value(1))])
    assert alone[0]["ratio_bf16"] is None and alone[0]["ratio_fp8"] is None


def test_a_step_is_the_median_of_steady_steps() -> None:
    assert vllm_rows.step_milliseconds([0.01, 0.02, 0.5], [8, 8, 8], 8) == 20
    with pytest.raises(RuntimeError, match=r"steps of 8 sequences gave \[7, 8\] tokens"):
        vllm_rows.step_milliseconds([0.01, 0.02], [8, 7], 8)


def test_a_process_that_dies_leaves_its_values_and_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, fake = _script(), tmp_path / "fake.py"
    fake.write_text(
        "import sys\nout = sys.argv[sys.argv.index('--out') + 1]\n"
        'open(out, \'w\').write(\'{"what": "capacity", "value": 5, "unit": "tokens"}\\n\')\nsys.exit(\'out of memory\')\n'
    )
    monkeypatch.setattr(script, "__file__", str(fake))
    found, failure = script.run(Job("latency", "qwen2.5-7b", "auto"))
    assert found == [{"what": "capacity", "value": 5, "unit": "tokens"}]
    assert failure is not None and failure.startswith("exit code 1") and "out of memory" in failure


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, fake = _script(), tmp_path / "fake.py"
    fake.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(script, "__file__", str(fake))
    monkeypatch.setattr(script, "TIMEOUT", 0.5)
    found, failure = script.run(Job("latency", "qwen2.5-7b", "auto"))
    assert found == [] and failure is not None and failure.startswith("exit code 124")


def test_figures_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvturbo.bench import vllm_engine

    def measure(job: Job) -> Any:
        yield {"what": job.cache_dtype, "value": 1, "unit": "ms"}
        raise RuntimeError("broken")

    monkeypatch.setattr(vllm_engine, "measure", measure)
    out = tmp_path / "values.jsonl"
    with pytest.raises(RuntimeError, match="broken"):
        _script().engine_process(Job("latency", "qwen2.5-7b", "fp8"), out)
    assert json.loads(out.read_text())["what"] == "fp8"


@pytest.mark.usefixtures("vllm_python")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_vllm_takes_the_options(engine: str, model: str, cache_dtype: str) -> None:
    import vllm_standin

    options = {**Job(engine, model, cache_dtype).options(), "enforce_eager": False}
    options.pop("kv_cache_dtype")
    options.pop("skip_tokenizer_init")
    config = vllm_standin.config_of(MODELS[model], cache_dtype, **options)
    assert config.model_config.get_head_size() == vllm_rows.HEAD_DIM
    assert config.cache_config.kv_cache_memory_bytes == options.get("kv_cache_memory_bytes")
    assert "vllm_serving" not in sys.modules
