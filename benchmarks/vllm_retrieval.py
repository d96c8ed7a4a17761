"""Retrieval with the embedded model served by vLLM: what a packed cache loses in the engine, with prompts read in chunks or whole.

    python benchmarks/vllm_retrieval.py                   # writes benchmarks/results/vllm-retrieval-<gpu>.json

Every setting, chunk, cache dtype and size of rings has an engine in a process of its own, several at once: they share the GPU.
The file is written after every engine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from kvturbo.bench import report, running
from kvturbo.bench.vllm_recent import sizes_of
from kvturbo.bench.vllm_retrieval import CACHE_DTYPES, CHUNKS, SETTINGS, Job, answers, jobs, questions, rows_of
from kvturbo.eval.report import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MODEL = ROOT / "models" / "kvturbo-12m"
TAIL = 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help="default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(CACHE_DTYPES), help="cache dtypes; default: %(default)s")
    parser.add_argument(
        "--chunks", default=",".join(map(str, CHUNKS)), help="tokens that are read at once; default: %(default)s"
    )
    parser.add_argument(
        "--recent", help="sizes of the rings that packed caches have, such as 0,16; default: the engine's own, untold"
    )
    parser.add_argument("--questions", type=int, default=2048, help="of each setting (default: 2048)")
    parser.add_argument("--jobs", type=int, default=8, help="engines at once (default: 8)")
    running.add_arguments(parser, "vllm-retrieval", "engine")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        job = Job(**json.loads(given.one))
        right = answers(job, questions(job.setting, given.questions, MODEL), MODEL)
        given.out.write_text(json.dumps(right))
        return 0
    try:
        commit = running.checked_commit(given)
        recent = (None,) if given.recent is None else sizes_of(given.recent)
        chunks = [int(text) for text in given.chunks.split(",")]
        todo = jobs(given.settings.split(","), chunks, given.dtypes.split(","), recent)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    path = given.out or RESULTS / f"vllm-retrieval-{report.gpu_slug()}.json"
    found: dict[Job, list[bool]] = {}
    failed: dict[str, str] = {}

    def take(job: Job, result: list[bool] | str) -> None:
        if isinstance(result, str):
            failed[str(job)] = result
        else:
            found[job] = result
        print(f"{job}: {'failed' if isinstance(result, str) else f'{sum(result)} of {len(result)} right'}", flush=True)
        report.write(path, rows_of(in_order(todo, found)), commit, model=MODEL.name, failed=failed)

    measure(todo, given.questions, given.jobs, given.seconds, take)
    rows = rows_of(in_order(todo, found))
    header = list(rows[0]) if rows else []
    print(table(header, [[str(row[key]) for key in header] for row in rows]))
    for name, text in failed.items():
        print(f"{name}: {text}", file=sys.stderr)
    print(f"wrote {path}: {len(found)} of {len(todo)} engines")
    return 1 if failed else 0


def in_order(todo: Sequence[Job], found: dict[Job, list[bool]]) -> dict[Job, list[bool]]:
    """What has been found, in the order of a list."""
    return {job: found[job] for job in todo if job in found}


def measure(
    todo: Sequence[Job], count: int, jobs: int, seconds: float, take: Callable[[Job, list[bool] | str], None]
) -> None:
    """Asks every engine; `take` gets which questions were answered rightly, or why the engine failed, as engines end.

    Args:
        todo: engines, in the order in which they begin.
        count: questions to each.
        jobs: engines at once.
        seconds: after which all are ended.
        take: is called in this thread.
    """
    deadline = time.monotonic() + seconds
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

    def one(job: Job) -> list[bool] | str:
        left = deadline - time.monotonic()
        if left <= 0:
            return "not begun: the time was up"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "answers.json"
            command = [sys.executable, __file__, "--one", json.dumps(asdict(job)), "--questions", str(count)]
            try:
                done = subprocess.run(
                    [*command, "--out", str(out)], env=environment, text=True, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, check=False, timeout=min(left, 1e6),
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return "ended: the time was up"
            if done.returncode:
                return f"exit code {done.returncode}: {done.stdout[-TAIL:]}"
            right: list[bool] = json.loads(out.read_text())
            return right

    with ThreadPoolExecutor(jobs) as pool:
        begun = {pool.submit(one, job): job for job in todo}
        for future in as_completed(begun):
            take(begun[future], future.result())


if __name__ == "__main__":
    sys.exit(main())
