"""Serves models of two shapes with random weights in vLLM, with every cache dtype: capacity, speed, times and memory.

    python benchmarks/vllm_serving.py                     # writes benchmarks/results/vllm-<gpu>.json
    python benchmarks/vllm_serving.py --models llama-3.1-8b --only start,burst --rounds 1 --add
    python benchmarks/vllm_serving.py --gpus 0,1,2,3      # an engine on each at a time

A process serves all cache dtypes of a model, one engine after another. Several GPUs, which must be alike, share all engines:
one that is free takes the next, of a cache dtype that it has not served if there is one. A row is the median of the rounds.
Figures are written as they come. An engine that fails is named in the file, with what it said, and the exit code is 1; what
is left is measured in a new process, since a failed engine may keep memory or leave the GPU unusable for its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from kvturbo.bench import report, running, vllm_recent
from kvturbo.bench.vllm_progress import Progress, Queue, add_value
from kvturbo.bench.vllm_rows import CACHE_DTYPES, LOADS, LONG, MEASURES, MODELS, Job, jobs, rows_of
from kvturbo.vllm import rings

RESULTS = Path(__file__).parent / "results"
TAIL = 4000
TIMED_OUT = 124
POLL_SECONDS = 0.2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASURES), help="what is measured; default: %(default)s")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(CACHE_DTYPES), help="cache dtypes; default: %(default)s")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="NAME:MEASURE,...",
        help="what is not measured with a model or a cache dtype",
    )
    parser.add_argument(
        "--recent",
        type=int,
        choices=rings.SIZES,
        help="tokens of the rings that packed caches have; default: the engine's own",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each engine (default: 3)")
    parser.add_argument(
        "--long-rounds", type=int, help=f"in how many of them {', '.join(LONG)} are measured (default: all)"
    )
    parser.add_argument("--gpus", type=_gpus, default=[None], help="numbers of GPUs to share the engines among")
    parser.add_argument("--prompts", type=int, default=512, help=f"of {', '.join(LOADS)} (default: 512)")
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep what the file has, except older commits' figures of what is measured again",
    )
    parser.add_argument("--log", type=Path, help="a folder for what the engines print")
    running.add_arguments(parser, "vllm", "engine")
    parser.add_argument("--jobs", help=argparse.SUPPRESS)
    return parser.parse_args()


def _gpus(text: str) -> list[int]:
    """Numbers of GPUs.

    Raises:
        argparse.ArgumentTypeError: they are no numbers, repeat, are not there, or are of different kinds.
    """
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    numbers = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if len(set(numbers)) < len(numbers) or any(not 0 <= number < len(names) for number in numbers):
        raise argparse.ArgumentTypeError(f"must be different numbers below {len(names)}, got {text}")
    if len({names[number] for number in numbers}) > 1:
        raise argparse.ArgumentTypeError(f"must be alike, got {', '.join(names[number] for number in numbers)}")
    return numbers


def main() -> int:
    given = arguments()
    if given.jobs:
        engines_process([Job(**job) for job in json.loads(given.jobs)], given.out, given.seconds)
        return 0
    try:
        commit = running.checked_commit(given)
        without = {name: left_out.split(",") for name, _, left_out in (text.partition(":") for text in given.without)}
        todo = jobs(
            given.models.split(","),
            given.dtypes.split(","),
            given.only.split(","),
            without,
            given.rounds,
            given.prompts,
            given.recent,
            given.long_rounds,
            backwards=given.gpus == [None],
        )
        check_plugin()
        path = given.out or RESULTS / f"vllm-{report.gpu_slug()}.json"
        values, failed = earlier(path, torch.cuda.get_device_name()) if given.add else ([], [])
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    failures = measure_all(todo, path, values, failed, commit, given)
    print(f"wrote {path}: {len(values)} figures, {failures} failures")
    return 1 if failures else 0


def measure_all(
    todo: Sequence[Sequence[Job]],
    path: Path,
    values: list[dict[str, Any]],
    failed: list[dict[str, Any]],
    commit: str,
    given: argparse.Namespace,
) -> int:
    """Runs all processes, writes the file after every figure, and returns how many failures there were.

    Args:
        todo: the engines of every process.
        path: the file.
        values, failed: what it has already; added to.
        commit: of what is measured.
        given: the command line.
    """
    deadline, count, lock = time.monotonic() + given.seconds, 0, threading.Lock()
    again = [job.facts() for engines in todo for job in engines]
    failed[:] = [line for line in failed if {name: line[name] for name in again[0]} not in again]
    queue = Queue(todo)

    def take(line: Mapping[str, Any]) -> None:
        nonlocal count
        with lock:
            if queue.closed:
                return
            if "error" in line:
                count += 1
                failed.append(dict(line))
                print(f"{line['model']}, {line['kv_cache_dtype']}: {line['error']}", file=sys.stderr, flush=True)
            else:
                add_value(values, dict(line) | {"commit": commit})
                print("{model}, {kv_cache_dtype}: {what}: {value:,.2f} {unit}".format_map(line), flush=True)
            report.write(path, rows_of(values), commit, failed=failed, values=values)

    def serve(gpu: int | None) -> None:
        while rest := queue.next(gpu):
            while rest and not queue.closed and (left := deadline - time.monotonic()) > 0:
                rest = run(rest, left, take, given.log, gpu)
            for job in rest:
                take(job.facts() | {"error": "not begun: the time was up"})

    with ThreadPoolExecutor(len(given.gpus)) as pool:
        try:
            list(pool.map(serve, given.gpus))
        except BaseException:  # an interruption comes to this thread alone
            queue.close()
            raise
    return count


def earlier(path: Path, gpu: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The figures in a file of results, each of which says its commit, and the failures; all of them with `recent`.

    Raises:
        ValueError: they are of another GPU.
    """
    if not path.exists():
        return [], []
    found = json.loads(path.read_text())
    if found["gpu"] != gpu:
        raise ValueError(f"{path} is of {found['gpu']}, this is {gpu}: leave --add out")
    return vllm_recent.completed(found["values"]), vllm_recent.completed(found["failed"])


def check_plugin() -> None:
    """Raises ValueError unless vLLM's processes will find the plugin."""
    if not any(point.name == "kvturbo" for point in entry_points(group="vllm.general_plugins")):
        raise ValueError("vLLM does not see the plugin: pip install -e '.[vllm]'")


def run(
    engines: Sequence[Job],
    seconds: float,
    take: Callable[[Mapping[str, Any]], None],
    log: Path | None = None,
    gpu: int | None = None,
) -> list[Job]:
    """Measures in a process of its own until an engine fails.

    Args:
        engines: to measure.
        seconds: after which the process is ended.
        take: gets every figure and every failure as it comes.
        log: a folder for what the engines print.
        gpu: the one that alone is visible; None for those that this process sees.

    Returns:
        What is left to measure.
    """
    name = engines[0].model if gpu is None else f"{engines[0].model}-gpu{gpu}"
    progress = Progress(engines)
    with tempfile.TemporaryDirectory() as temporary:
        folder, deadline = log or Path(temporary), time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        out = Path(temporary) / "values.jsonl"
        out.touch()
        payload = json.dumps([asdict(job) for job in engines])
        command = [sys.executable, __file__, "--jobs", payload, "--out", str(out), "--seconds", str(seconds)]
        with (folder / f"{name}.log").open("a+") as output, out.open() as lines:

            def read() -> None:
                for line in _whole_lines(lines):
                    if progress.note(line):
                        take(line)

            process = subprocess.Popen(command, env=_environment(gpu), stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None and time.monotonic() < deadline:
                read()
                time.sleep(POLL_SECONDS)
            if process.poll() is None:
                process.kill()
            code = TIMED_OUT if time.monotonic() >= deadline else process.wait()
            process.wait()
            read()
            if code:
                output.seek(0)
                error = f"exit code {code}: {output.read()[-TAIL:]}"
                line = progress.failure(error)
                progress.note(line)
                take(line)
    return progress.rest()


def _environment(gpu: int | None) -> dict[str, str]:
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if gpu is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        own["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
    return os.environ | own


def _whole_lines(file: Any) -> Iterator[dict[str, Any]]:
    while True:
        place, line = file.tell(), file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield json.loads(line)


def engines_process(engines: Sequence[Job], out: Path, seconds: float) -> None:
    """Measures jobs, engine after engine, until one fails or the time is up. A file gets a line for every engine and measure that
    begins, for every figure, and for the failure, as they come.
    """
    from kvturbo.bench.vllm_engine import measure

    start = time.monotonic()
    with out.open("a", buffering=1) as file:
        for job in engines:
            if time.monotonic() - start > seconds:
                return
            facts = job.facts()
            file.write(json.dumps({"engine": job.cache_dtype}) + "\n")
            try:
                for value in measure(job):
                    file.write(json.dumps(value if "measure" in value else facts | value) + "\n")
            except Exception as error:
                traceback.print_exc()
                file.write(json.dumps(facts | {"error": f"{type(error).__name__}: {str(error)[:TAIL]}"}) + "\n")
                return


if __name__ == "__main__":
    sys.exit(main())
