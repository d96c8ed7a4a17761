"""Times decode attention of one layer against FlashAttention-3 and vLLM's TurboQuant on this GPU, and checks it in float64.

    python benchmarks/decode.py                          # all cases; writes benchmarks/results/decode-<gpu>.json
    python benchmarks/decode.py --only shapes,ragged --seconds 200

Baselines that are not installed are named and skipped. Each time is the median of CUDA-graph replays with a cold L2 cache;
host_us is the host's time per eager call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from kvturbo.bench import report, running
from kvturbo.bench.decode import CASES, Runner, eager_calls
from kvturbo.bench.registry import PROVIDERS
from kvturbo.bench.timing import copy_gb_per_s

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(CASES), help=f"groups of cases, of {', '.join(CASES)}")
    parser.add_argument("--providers", default=",".join(PROVIDERS.names()), help="columns; default: %(default)s")
    running.add_arguments(parser, "decode")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    try:
        commit = running.checked_commit(given)
        providers = given.providers.split(",")
        cases = [case for group in given.only.split(",") for case in CASES[group]]
        for name in providers:
            PROVIDERS.get(name)
    except (ValueError, KeyError) as error:
        print(f"{error}", file=sys.stderr)
        return 2
    path = given.out or RESULTS / f"decode-{report.gpu_slug()}.json"
    facts: dict[str, Any] = {"copy_gb_per_s": copy_gb_per_s()}
    runner, rows = Runner(providers), []
    facts["host_us"] = runner.host_us(eager_calls)

    def done(row: dict[str, Any]) -> None:
        rows.append(row)
        print(report.decode_table([row], providers).splitlines()[-1], flush=True)

    try:
        complete = running.run(cases, runner.row, given.seconds, done)
    finally:
        report.write(path, rows, commit, **facts, skipped=runner.skipped, complete=len(rows) == len(cases))
    print(report.decode_table(rows, providers))
    print("host us per eager call:", facts["host_us"])
    print(f"copy bandwidth {facts['copy_gb_per_s']:.0f} GB/s; wrote {path}{'' if complete else ' (time was up)'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
