"""Times one layer's store and gather against vLLM's 16-bit store on this GPU, and checks them against the reference.

    python benchmarks/store.py                          # all cases; writes benchmarks/results/store-<gpu>.json

Each time is the median of CUDA-graph replays with a cold L2 cache; host_us is the host's time per eager call. A vLLM that is not
installed is named and skipped.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kvturbo.bench import report, running
from kvturbo.bench.store import CASES, Runner, eager_calls, store_table

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    running.add_arguments(parser, "store")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    try:
        commit = running.checked_commit(given)
    except ValueError as error:
        print(f"{error}", file=sys.stderr)
        return 2
    path = given.out or RESULTS / f"store-{report.gpu_slug()}.json"
    runner, rows = Runner(), list[dict[str, Any]]()
    facts: dict[str, Any] = {"host_us": runner.host_us(eager_calls)}
    try:
        complete = running.run(CASES, runner.row, given.seconds, rows.append)
    finally:
        report.write(path, rows, commit, **facts, skipped=runner.skipped, complete=len(rows) == len(CASES))
    print(store_table(rows))
    host = ", ".join(f"{name} {us:.1f}" for name, us in (facts["host_us"] or {}).items())
    print(f"host us per call: {host or '-'}; wrote {path}{'' if complete else ' (time was up)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
