"""The serving benchmark's jobs, options and rows; engines need a GPU."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from bench_scripts import load_script
from kvturbo.bench import vllm_rows
from kvturbo.bench.vllm_progress import Progress, add_value
from kvturbo.bench.vllm_rows import CACHE_DTYPES, LOADS, MEASURES, MODELS, Job, jobs, rows_of
from kvturbo.vllm import rings


def test_rounds_alternate_cache_dtypes_and_models_have_processes_of_their_own() -> None:
    found = jobs(list(MODELS), CACHE_DTYPES, rounds=2)
    assert [[job.model for job in engines] for engines in found] == [
        [model] * len(CACHE_DTYPES) for model in MODELS
    ] * 2
    assert [job.cache_dtype for job in found[0]] == list(CACHE_DTYPES)
    assert [job.cache_dtype for job in found[-1]] == list(reversed(CACHE_DTYPES))
    assert found[0][0].measures == MEASURES


def test_measures_keep_their_order_and_can_be_left_out() -> None:
    [[bf16, fp8]] = jobs(["qwen2.5-7b"], ["auto", "fp8"], ["burst", "start"], {"fp8": ["burst"]}, prompts=64)
    assert bf16 == Job("qwen2.5-7b", "auto", ("start", "burst"), 64) and fp8.measures == ("start",)
    found = jobs(
        list(MODELS), ["auto", "fp8"], ["start", "burst"], {"llama-3.1-8b": ["burst"], "fp8": ["burst", "start"]}
    )
    assert [[job.measures for job in engines] for engines in found] == [[("start", "burst")], [("start",)]]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["x"], ["auto"]), "model must be among qwen2.5-7b, .*got x"),
        ((["qwen2.5-7b"], ["x"]), "cache dtype must be among auto, .*got x"),
        ((["qwen2.5-7b"], ["auto"], ["x"]), "measure must be among start, .*got x"),
        (
            (["qwen2.5-7b"], ["auto"], ["start"], {"x": ["start"]}),
            "something is left out of must be among qwen2.5-7b, .*auto, .*got x",
        ),
        ((["qwen2.5-7b"], ["auto"], ["start"], {"auto": ["x"]}), "measure must be among start, .*got x"),
        ((["qwen2.5-7b"], [], ["start"]), r"nothing to measure: .* cache dtypes \[\], "),
        ((["qwen2.5-7b"], ["auto"], ["start"], {"auto": ["start"]}), "nothing to measure: "),
        ((["qwen2.5-7b"], ["auto"], ["start"], {}, 0), "rounds must be at least 1, got 0"),
    ],
)
def test_unknown_names_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jobs(*arguments)


def test_a_quarter_of_the_memory_is_a_quarter_of_what_16_bits_need() -> None:
    assert vllm_rows.bf16_bytes_per_token("llama-3.1-8b") == 131072
    assert vllm_rows.bf16_bytes_per_token("qwen2.5-7b") == 57344
    assert LOADS["quarter-long-prompts"].quarter_bytes("llama-3.1-8b") * 4 == 64 * 3500 * 131072
    assert LOADS["quarter-long-answers"].name.endswith("128 concurrent, a quarter of the memory")


class FakePool:
    """vLLM's block pool, as far as a part of the cache is taken out of it."""

    num_gpu_blocks = 1000

    def __init__(self) -> None:
        self.free = 999

    def reset_prefix_cache(self) -> bool:
        return True

    def get_num_free_blocks(self) -> int:
        return self.free

    def get_new_blocks(self, count: int) -> list[int]:
        self.free -= count
        return list(range(count))

    def free_blocks(self, blocks: list[int]) -> None:
        self.free += len(blocks)


def test_a_part_of_the_cache_is_what_is_left_in_the_pool() -> None:
    from kvturbo.bench.vllm_engine import Engine

    pool = FakePool()
    engine = object.__new__(Engine)
    manager = SimpleNamespace(kv_cache_manager=SimpleNamespace(block_pool=pool))
    engine.core = SimpleNamespace(engine_core=SimpleNamespace(engine_core=SimpleNamespace(scheduler=manager)))
    engine._pool_bytes = lambda: 4_000_000  # type: ignore[method-assign]
    with engine._part_of_the_cache(400_000):
        assert pool.free == 100
    assert pool.free == 999


def test_rows_are_medians_and_their_ratios() -> None:
    def value(number: float) -> dict[str, Any]:
        facts = {"what": "capacity", "unit": "tokens", "model": "qwen2.5-7b", "recent": None, "commit": "a"}
        return facts | {"value": number}

    runs = {"auto": [100, 90, 200], "fp8": [200], "turboquant": [370, 390]}
    rows = rows_of(value(x) | {"kv_cache_dtype": name} for name, found in runs.items() for x in found)
    assert [row["value"] for row in rows] == [100, 200, 380]
    assert [row["ratio_bf16"] for row in rows] == [1, 2, 3.8] and rows[2]["ratio_fp8"] == 1.9
    names = ["what", "model", "kv_cache_dtype", "recent", "commit", "value", "unit", "ratio_bf16", "ratio_fp8"]
    assert list(rows[0]) == names
    alone = rows_of([value(1) | {"kv_cache_dtype": "turboquant"}])
    assert alone[0]["ratio_bf16"] is None and alone[0]["ratio_fp8"] is None


def test_there_is_no_ratio_of_runs_of_different_commits() -> None:
    facts = {"what": "capacity", "value": 1, "unit": "tokens", "model": "qwen2.5-7b", "recent": None}
    commits = {"auto": "b", "fp8": "a", "turboquant": "b"}
    *_, ours = rows_of(facts | {"kv_cache_dtype": name, "commit": commit} for name, commit in commits.items())
    assert ours["ratio_bf16"] == 1 and ours["ratio_fp8"] is None


def test_a_step_is_the_median_of_steady_steps() -> None:
    assert vllm_rows.step_milliseconds([0.01, 0.02, 0.5], [8, 8, 8], 8) == 20
    with pytest.raises(RuntimeError, match=r"steps of 8 sequences gave \[7, 8\] tokens"):
        vllm_rows.step_milliseconds([0.01, 0.02], [8, 7], 8)


def _run(script: ModuleType, seconds: float = 60) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = []
    script.run([Job("qwen2.5-7b", "auto"), Job("qwen2.5-7b", "fp8")], seconds, taken.append)
    return taken


def test_a_process_that_dies_leaves_its_values_and_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, fake = load_script("vllm_serving"), tmp_path / "fake.py"
    fake.write_text(
        "import sys\nout = sys.argv[sys.argv.index('--out') + 1]\n"
        'open(out, \'w\').write(\'{"what": "capacity", "value": 5, "unit": "tokens"}\\n\')\nsys.exit(\'out of memory\')\n'
    )
    monkeypatch.setattr(script, "__file__", str(fake))
    found, failure = _run(script)  # it has not said that an engine began, so none is tried again
    assert found == {"what": "capacity", "value": 5, "unit": "tokens"}
    assert failure["error"].startswith("exit code 1") and "out of memory" in failure["error"]
    assert failure["kv_cache_dtype"] == "auto, fp8"


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, fake = load_script("vllm_serving"), tmp_path / "fake.py"
    fake.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(script, "__file__", str(fake))
    [failure] = _run(script, 0.5)
    assert failure["error"].startswith("exit code 124")


def test_figures_are_written_as_they_come_and_a_failure_is_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvturbo.bench import vllm_engine

    def measure(job: Job) -> Any:
        yield {"what": "capacity", "value": 1, "unit": "tokens"}
        if job.cache_dtype == "fp8":
            raise RuntimeError("broken")

    monkeypatch.setattr(vllm_engine, "measure", measure)
    out = tmp_path / "values.jsonl"
    load_script("vllm_serving").engines_process([Job("qwen2.5-7b", name) for name in ("fp8", "auto")], out, 60)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("kv_cache_dtype") for line in lines] == [None, "fp8", "fp8"]
    assert lines[2]["error"] == "RuntimeError: broken"


def test_figures_of_another_gpu_are_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "vllm.json"
    assert load_script("vllm_serving").earlier(path, "NVIDIA H200") == ([], [])
    packed, raw, said = ({"kv_cache_dtype": name} for name in ("turboquant", "fp8", "turboquant"))
    said["recent"] = 16
    path.write_text(json.dumps({"gpu": "NVIDIA H200", "values": [packed, raw, said], "failed": [packed]}))
    values, failed = load_script("vllm_serving").earlier(path, "NVIDIA H200")
    assert [value["recent"] for value in values] == [0, None, 16] and failed == [packed | {"recent": 0}]
    with pytest.raises(ValueError, match="is of NVIDIA H200, this is NVIDIA H100"):
        load_script("vllm_serving").earlier(path, "NVIDIA H100")


def test_a_median_is_of_one_commits_runs() -> None:
    def value(number: float, commit: str, cache_dtype: str = "auto", recent: int | None = None) -> dict[str, Any]:
        facts = {"what": "capacity", "model": "qwen2.5-7b", "unit": "tokens", "recent": recent}
        return facts | {"value": number, "commit": commit, "kv_cache_dtype": cache_dtype}

    values = [value(1, "a"), value(2, "a"), value(3, "a", "fp8")]
    for new in (value(4, 12 * "b"), value(5, 40 * "b")):
        add_value(values, new)
    assert [old["value"] for old in values] == [3, 4, 5]
    values = [value(1, "a", "turboquant", 0), value(2, "a", "turboquant", 16)]
    add_value(values, value(3, 12 * "b", "turboquant", 16))
    assert [(row["recent"], row["value"]) for row in rows_of(values)] == [(0, 1), (16, 3)]


def test_packed_caches_alone_are_told_the_size_of_rings() -> None:
    [engines] = jobs(["qwen2.5-7b"], CACHE_DTYPES, ["start"], recent=16)
    assert [job.facts()["recent"] for job in engines] == [None, None, None, 16, 16]
    assert [job.options().get("additional_config") for job in engines] == [None] * 3 + [{"kvturbo": {"recent": 16}}] * 2
    [[untold]] = jobs(["qwen2.5-7b"], ["turboquant"])
    assert "additional_config" not in untold.options() and untold.facts()["recent"] == rings.DEFAULT


def test_sizes_of_rings_are_those_that_exist(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--recent=12"])
    with pytest.raises(SystemExit):
        load_script("vllm_serving").main()
    assert "--recent: invalid choice: 12 (choose from 0, 8, 16, 32)" in capsys.readouterr().err


class Engines:
    """A measure() whose engines do what they are told to."""

    def __init__(self, failing: dict[str, str]) -> None:
        self.failing, self.asked = failing, list[str]()

    def __call__(self, job: Job) -> Any:
        self.asked.append(f"{job.cache_dtype} {','.join(job.measures)}")
        if self.failing.get(job.cache_dtype) == "construction":
            raise RuntimeError("broken")
        for name in job.measures:
            yield {"measure": name}
            if self.failing.get(job.cache_dtype) == name:
                raise RuntimeError("broken")
            yield {"what": name, "value": 1.0, "unit": "ms"}


@pytest.mark.parametrize(
    "failing, asked",
    [
        (
            {"fp8": "construction"},
            ["auto start,burst,memory", "fp8 start,burst,memory", "turboquant start,burst,memory"],
        ),
        ({"fp8": "start"}, ["auto start,burst,memory", "fp8 start,burst,memory", "turboquant start,burst,memory"]),
        (
            {"fp8": "burst"},
            ["auto start,burst,memory", "fp8 start,burst,memory", "fp8 memory", "turboquant start,burst,memory"],
        ),
        (
            {"turboquant": "memory"},
            ["auto start,burst,memory", "fp8 start,burst,memory", "turboquant start,burst,memory"],
        ),
    ],
)
def test_what_is_left_when_an_engine_fails_is_measured_in_a_new_process(
    failing: dict[str, str], asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvturbo.bench import vllm_engine

    script, engines = load_script("vllm_serving"), Engines(failing)
    monkeypatch.setattr(vllm_engine, "measure", engines)
    failures: list[dict[str, Any]] = []
    [rest] = jobs(["qwen2.5-7b"], ["auto", "fp8", "turboquant"], ["start", "burst", "memory"])
    while rest:
        (out := tmp_path / "values.jsonl").unlink(missing_ok=True)
        script.engines_process(rest, out, 60)
        progress = Progress(rest)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        failures += [line for line in lines if progress.note(line) and "error" in line]
        rest = progress.rest()
    assert engines.asked == asked
    assert [line["kv_cache_dtype"] for line in failures] == list(failing)


@pytest.mark.parametrize("gpus", [[None], [0, 1]], ids=["one GPU", "two"])
def test_engines_that_are_not_begun_when_the_time_is_up_are_named(
    gpus: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("vllm_serving")
    monkeypatch.setattr(script.report, "write", lambda *arguments, **options: None)
    [engines] = jobs(["qwen2.5-7b"], ["auto", "fp8"], ["start"])
    failed = [Job("qwen2.5-7b", name).facts() | {"error": "old"} for name in ("fp8", "turboquant")]
    given = SimpleNamespace(seconds=-1.0, log=None, gpus=gpus)
    assert script.measure_all([engines], tmp_path / "x.json", [], failed, "a", given) == 2
    assert failed[0]["kv_cache_dtype"] == "turboquant" and failed[0]["error"] == "old"
    assert sorted((line["kv_cache_dtype"], line["error"]) for line in failed[1:]) == [
        ("auto", "not begun: the time was up"),
        ("fp8", "not begun: the time was up"),
    ]


def test_graph_sizes_are_read_from_the_log_whatever_its_handlers_are() -> None:
    from kvturbo.bench.vllm_engine import _graph_sizes

    log = logging.getLogger("vllm.test")
    with _graph_sizes() as sizes:
        log.warning("Graph capturing finished in %.0f secs, took %.2f GiB", 5, 0.42)
    log.warning("Graph capturing finished in %.0f secs, took %.2f GiB", 5, 0.1)
    assert sizes == [0.42]


@pytest.mark.usefixtures("vllm_python")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_vllm_takes_the_options(model: str, cache_dtype: str) -> None:
    import vllm_standin

    options = {**Job(model, cache_dtype).options(), "enforce_eager": False}
    options.pop("kv_cache_dtype")
    options.pop("skip_tokenizer_init")
    config = vllm_standin.config_of(MODELS[model], cache_dtype, **options)
    assert config.model_config.get_head_size() == vllm_rows.HEAD_DIM
    assert config.cache_config.enable_prefix_caching
    assert "vllm_serving" not in sys.modules
