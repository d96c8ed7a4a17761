"""What the benchmarks of single operations share: their command line, what they skip, and running cases until the time is up."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from kvturbo.bench import report
from kvturbo.bench.timing import host_us
from kvturbo.config import KVFormat
from kvturbo.ops import backends

C = TypeVar("C")


def add_arguments(parser: argparse.ArgumentParser, name: str, unit: str = "case") -> None:
    """Adds --seconds, --out, --commit and --allow-dirty.

    Args:
        parser: of the script.
        name: of the results file, before the GPU's.
        unit: what is not started any more once the time is up.
    """
    parser.add_argument("--seconds", type=float, default=float("inf"), help=f"start no {unit} after this time")
    parser.add_argument("--out", type=Path, help=f"the JSON file; default: results/{name}-<gpu>.json")
    parser.add_argument("--commit", help="the tree's commit, where it is no git checkout")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a changed tree; the commit says -dirty")


def checked_commit(given: argparse.Namespace) -> str:
    """The commit that the results of a command line will name.

    Raises:
        ValueError: there is no GPU, or the tree is not as committed.
    """
    if not torch.cuda.is_available():
        raise ValueError("this benchmark needs a CUDA GPU")
    return report.checked_commit(given.commit, allow_dirty=given.allow_dirty)


class Skips:
    """What could not be measured, and why; every reason is said once.

    Args:
        log: where to say it.
    """

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.skipped: dict[str, list[str]] = {}

    def skip(self, name: str, reason: str) -> None:
        """Notes that `name` is skipped."""
        reasons = self.skipped.setdefault(name, [])
        if reason not in reasons:
            reasons.append(reason)
            self.log(f"skipping {name}: {reason}")

    def host_us(
        self, calls: Callable[[], dict[str, Callable[[], Any]]], device: torch.device | str = "cuda"
    ) -> dict[str, float] | None:
        """See `timing.host_us`, of calls of the cuda backend; None where it does not run."""
        reason = backends.unavailable("cuda", "decode", torch.device(device), KVFormat.from_name("k4v4", 128))
        if reason:
            self.skip("host_us", reason)
        return None if reason else host_us(calls())


def run(
    cases: Sequence[C], row: Callable[[C], dict[str, Any]], seconds: float, done: Callable[[dict[str, Any]], None]
) -> bool:
    """Measures cases until the time is up; `done` gets every row. Returns whether all cases were measured."""
    start = time.monotonic()
    for case in cases:
        if time.monotonic() - start > seconds:
            return False
        done(row(case))
    return True
