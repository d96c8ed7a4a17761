"""How the serving benchmark shares engines among GPUs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench_scripts import load_script
from kvturbo.bench.vllm_progress import Queue
from kvturbo.bench.vllm_rows import Job, jobs


def test_several_gpus_share_the_engines_and_rounds_are_on_different_ones() -> None:
    names = ["auto", "fp8", "turboquant"]
    queue = Queue(jobs(["qwen2.5-7b"], names, ["start"], rounds=2, backwards=False))
    found = [queue.next(gpu) for gpu in (0, 1, 0, 0, 1, 1, 0)]
    assert [[job.cache_dtype for job in engines] for engines in found] == [
        ["auto"], ["fp8"], ["turboquant"], ["fp8"], ["auto"], ["turboquant"], [],
    ]  # fmt: skip
    whole = Queue(jobs(["qwen2.5-7b"], names, ["start"], rounds=2))
    assert [[job.cache_dtype for job in whole.next()] for _ in range(3)] == [names, names[::-1], []]


def test_every_gpu_runs_engines_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, both = load_script("vllm_serving"), threading.Barrier(2)
    ran: list[tuple[int, str]] = []

    def run(engines: list[Job], seconds: float, take: Any, log: Any, gpu: int) -> list[Job]:
        both.wait(20)  # so that neither takes everything
        ran.append((gpu, engines[0].cache_dtype))
        take(engines[0].facts() | {"what": "x", "value": 1, "unit": "ms"})
        return []

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script.report, "write", lambda *arguments, **options: None)
    todo = jobs(["qwen2.5-7b"], ["auto", "fp8"], ["start"], rounds=2, backwards=False)
    values: list[dict[str, Any]] = []
    given = SimpleNamespace(seconds=60.0, log=None, gpus=[0, 3])
    assert script.measure_all(todo, tmp_path / "x.json", values, [], "a", given) == 0
    assert sorted(ran) == [(0, "auto"), (0, "fp8"), (3, "auto"), (3, "fp8")] and len(values) == 4


def test_an_interruption_ends_it_and_nothing_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, begun = load_script("vllm_serving"), list[str]()

    def run(engines: list[Job], seconds: float, take: Any, log: Any, gpu: int) -> list[Job]:
        begun.append(engines[0].cache_dtype)
        if len(begun) == 1:
            raise KeyboardInterrupt
        time.sleep(0.5)
        take(engines[0].facts() | {"error": "exit code -2"})
        return engines[:1]

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script.report, "write", lambda *arguments, **options: None)
    todo, failed = jobs(["qwen2.5-7b"], ["auto", "fp8", "turboquant"], ["start"], rounds=3), list[dict[str, Any]]()
    given = SimpleNamespace(seconds=60.0, log=None, gpus=[0, 1])
    with pytest.raises(KeyboardInterrupt):
        script.measure_all(todo, tmp_path / "x.json", [], failed, "a", given)
    assert len(begun) <= 2 and not failed


@pytest.mark.parametrize(
    "flags, orders, long",
    [
        ([], [["auto", "fp8"], ["fp8", "auto"]], [True, True]),
        (["--gpus=0,1", "--long-rounds=1"], [["auto", "fp8"]] * 2, [True, False]),
    ],
    ids=["one GPU", "two"],
)
def test_the_command_line_says_what_is_measured_where(
    flags: list[str], orders: list[list[str]], long: list[bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, seen = load_script("vllm_serving"), list[Any]()
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(script.torch.cuda, "get_device_name", lambda number: "NVIDIA H200")
    monkeypatch.setattr(script.running, "checked_commit", lambda given: "a")
    monkeypatch.setattr(script, "check_plugin", lambda: None)
    monkeypatch.setattr(script, "measure_all", lambda todo, *rest: seen.extend(todo) or 0)
    what = ["--models=qwen2.5-7b", "--dtypes=auto,fp8", "--only=start,memory", "--rounds=2"]
    monkeypatch.setattr("sys.argv", ["x", *what, f"--out={tmp_path / 'x.json'}", *flags])
    assert script.main() == 0
    assert [[job.cache_dtype for job in engines] for engines in seen] == orders
    assert [all("memory" in job.measures for job in engines) for engines in seen] == long


def test_a_process_sees_the_gpu_that_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, fake = load_script("vllm_serving"), tmp_path / "fake.py"
    fake.write_text("import os\nprint('sees', os.environ['CUDA_VISIBLE_DEVICES'])\nraise SystemExit(1)\n")
    monkeypatch.setattr(script, "__file__", str(fake))
    for visible, seen in (("4,6,7", "sees 6"), ("", "sees 1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        taken: list[Any] = []
        script.run([Job("qwen2.5-7b", "auto")], 60, taken.append, tmp_path, gpu=1)
        assert seen in taken[0]["error"] and (tmp_path / "qwen2.5-7b-gpu1.log").exists()


def test_gpus_are_different_alike_and_there(monkeypatch: pytest.MonkeyPatch) -> None:
    script, names = load_script("vllm_serving"), ["NVIDIA H200", "NVIDIA H200", "NVIDIA H100"]
    monkeypatch.setattr(script.torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(script.torch.cuda, "get_device_name", lambda number: names[number])
    assert script._gpus("1,0") == [1, 0]
    for text, message in (("0,0", "below 3, got 0,0"), ("3", "below 3, got 3"), ("a", "got a"), ("0,2", "alike, got")):
        with pytest.raises(script.argparse.ArgumentTypeError, match=message):
            script._gpus(text)


def test_what_takes_long_is_measured_in_the_first_rounds() -> None:
    found = jobs(["qwen2.5-7b"], ["auto"], ["burst", "memory", "throughput"], rounds=3, long_rounds=1)
    assert [job.measures for [job] in found] == [("burst", "memory", "throughput"), ("burst",), ("burst",)]
