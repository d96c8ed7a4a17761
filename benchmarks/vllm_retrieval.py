"""Retrieval with the embedded model served by vLLM: what a packed cache loses in the engine, with prompts read in chunks or whole.

    python benchmarks/vllm_retrieval.py                   # writes benchmarks/results/vllm-retrieval-<gpu>.json

Every setting, chunk and cache dtype has an engine in a process of its own, several at once: they share the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from kvturbo.bench import report, running
from kvturbo.bench.vllm_retrieval import CACHE_DTYPES, CHUNKS, SETTINGS, answers, questions, rows_of
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
    parser.add_argument("--questions", type=int, default=2048, help="of each setting (default: 2048)")
    parser.add_argument("--jobs", type=int, default=8, help="engines at once (default: 8)")
    running.add_arguments(parser, "vllm-retrieval", "engine")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        setting, chunk, cache_dtype = given.one
        right = answers(cache_dtype, int(chunk), questions(setting, given.questions, MODEL), MODEL)
        given.out.write_text(json.dumps(right))
        return 0
    try:
        commit = running.checked_commit(given)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    chunks = [int(text) for text in given.chunks.split(",")]
    todo = list(product(given.settings.split(","), chunks, given.dtypes.split(",")))
    found, failed = measure(todo, given.questions, given.jobs, given.seconds)
    path = given.out or RESULTS / f"vllm-retrieval-{report.gpu_slug()}.json"
    rows = rows_of(found)
    report.write(path, rows, commit, model=MODEL.name, failed=failed)
    header = list(rows[0]) if rows else []
    print(table(header, [[str(row[key]) for key in header] for row in rows]))
    for name, text in failed.items():
        print(f"{name}: {text}", file=sys.stderr)
    print(f"wrote {path}: {len(found)} of {len(todo)} engines")
    return 1 if failed else 0


def measure(
    todo: list[tuple[str, int, str]], count: int, jobs: int, seconds: float
) -> tuple[dict[tuple[str, int, str], list[bool]], dict[str, str]]:
    """Which questions were answered rightly with every setting, chunk and cache dtype, and why engines failed."""
    deadline = time.monotonic() + seconds
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}

    def one(job: tuple[str, int, str]) -> list[bool] | str:
        left = deadline - time.monotonic()
        if left <= 0:
            return "not begun: the time was up"
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "answers.json"
            command = [sys.executable, __file__, "--one", *map(str, job), "--questions", str(count), "--out", str(out)]
            try:
                done = subprocess.run(
                    command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
                    timeout=min(left, 1e6),
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                return "ended: the time was up"
            if done.returncode:
                return f"exit code {done.returncode}: {done.stdout[-TAIL:]}"
            right: list[bool] = json.loads(out.read_text())
            return right

    with ThreadPoolExecutor(jobs) as pool:
        results = dict(zip(todo, pool.map(one, todo), strict=True))
    found = {job: result for job, result in results.items() if not isinstance(result, str)}
    return found, {" ".join(map(str, job)): result for job, result in results.items() if isinstance(result, str)}


if __name__ == "__main__":
    sys.exit(main())
