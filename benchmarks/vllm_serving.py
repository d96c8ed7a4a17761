"""Serves models of two shapes with random weights in vLLM, with every cache dtype: capacity, speed, times and memory.

    python benchmarks/vllm_serving.py                     # writes benchmarks/results/vllm-<gpu>.json
    python benchmarks/vllm_serving.py --only latency --models llama-3.1-8b --rounds 1 --seconds 1200

Every engine has a process of its own. Cache dtypes alternate; a row is the median of its runs. Rows are written after each
engine. One that fails is named in the file, with the end of what it said, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from kvturbo.bench import report, running
from kvturbo.bench.vllm_rows import CACHE_DTYPES, ENGINES, MODELS, Job, jobs, rows_of

RESULTS = Path(__file__).parent / "results"
TAIL = 4000
TIMEOUT, TIMED_OUT = 3600, 124
"""Seconds that an engine may take, and what its exit code is said to be after them."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ENGINES), help=f"engines, of {', '.join(ENGINES)}")
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(CACHE_DTYPES), help="cache dtypes; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each engine (default: 3)")
    running.add_arguments(parser, "vllm", "engine")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    given = arguments()
    if given.job:
        return engine_process(Job(**json.loads(given.job)), given.out)
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU", file=sys.stderr)
        return 2
    try:
        commit = report.checked_commit(given.commit, allow_dirty=given.allow_dirty)
        todo = jobs(given.only.split(","), given.models.split(","), given.dtypes.split(","), given.rounds)
        check_plugin()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    path = given.out or RESULTS / f"vllm-{report.gpu_slug()}.json"
    values: list[tuple[Job, dict[str, Any]]] = []
    failed: list[dict[str, Any]] = []
    start, done = time.monotonic(), 0
    for job in todo:
        if time.monotonic() - start > given.seconds:
            break
        print(f"{job.model}, {job.engine}, {job.cache_dtype}", flush=True)
        found, failure = run(job)
        values += [(job, value) for value in found]
        for value in found:
            print(f"    {value['what']}: {value['value']:,.2f} {value['unit']}", flush=True)
        if failure is not None:
            failed.append(asdict(job) | {"error": failure})
            print(failure, file=sys.stderr, flush=True)
        done += 1
        report.write(path, rows_of(values), commit, rounds=given.rounds, failed=failed, complete=done == len(todo))
    print(f"wrote {path}: {done} of {len(todo)} engines, {len(failed)} failed")
    return 1 if failed else 0


def check_plugin() -> None:
    """Raises ValueError unless vLLM's processes will find the plugin."""
    if not any(point.name == "kvturbo" for point in entry_points(group="vllm.general_plugins")):
        raise ValueError("vLLM does not see the plugin: pip install -e '.[vllm]'")


def run(job: Job) -> tuple[list[dict[str, Any]], str | None]:
    """A job in a process of its own: what it measured, and the end of its output if it failed."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "values.jsonl"
        command = [sys.executable, __file__, "--job", json.dumps(asdict(job)), "--out", str(out)]
        with (Path(folder) / "log").open("w+") as log:
            try:
                code = subprocess.run(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False, timeout=TIMEOUT
                ).returncode
            except subprocess.TimeoutExpired:
                code = TIMED_OUT
            log.seek(0)
            text = log.read()
        lines = out.read_text().splitlines() if out.exists() else []
    return [json.loads(line) for line in lines], f"exit code {code}: {text[-TAIL:]}" if code else None


def engine_process(job: Job, out: Path) -> int:
    """Measures a job and appends every figure to a file as it comes."""
    from kvturbo.bench.vllm_engine import measure

    with out.open("w") as file:
        for value in measure(job):
            file.write(json.dumps(value) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
