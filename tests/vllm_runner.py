"""Runs checks of vLLM in processes of their own; for `vllm/checks.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Result:
    name: str
    ok: bool
    seconds: float
    text: str


def plug_in() -> None:
    """Makes kvturbo's entry point visible to this process and its children where the package is not installed."""
    from importlib.metadata import entry_points

    os.environ["VLLM_PLUGINS"] = "kvturbo"
    if any(point.name == "kvturbo" for point in entry_points(group="vllm.general_plugins")):
        return
    folder = Path(tempfile.mkdtemp())
    info = folder / "kvturbo_entry_point-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvturbo-entry-point\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkvturbo = kvturbo.vllm.plugin:register\n")
    paths = [str(folder), str(Path(__file__).parents[1] / "src")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])


def run_beside(
    script: str, names: Sequence[str], alone: Sequence[str], jobs: int, budget: float, log: Path | None
) -> list[Result]:
    """Checks in processes of their own.

    Args:
        script: takes a check's name and `--json FILE`.
        names: of all checks.
        alone: those that are run after the others, by themselves.
        jobs: checks at once, on the same GPU.
        budget: seconds after which all are stopped.
        log: a folder for what they print (default: a temporary one).
    """
    deadline = time.monotonic() + budget
    folder = log or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    together, last = [n for n in names if n not in alone], [n for n in names if n in alone]

    def one(name: str) -> Result:
        left = deadline - time.monotonic()
        if left <= 0:
            return Result(name, False, 0.0, "not run: out of time")
        file, start = folder / f"{name}.json", time.monotonic()
        with (folder / f"{name}.log").open("w") as output:
            command = [sys.executable, script, name, "--json", str(file)]
            try:
                subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=left)
            except subprocess.TimeoutExpired:
                return Result(name, False, round(time.monotonic() - start, 1), "stopped: out of time")
        if not file.exists():
            return Result(name, False, round(time.monotonic() - start, 1), f"the process died: see {output.name}")
        result = Result(**json.loads(file.read_text())[0])
        print(f"CHECK {name}: {'ok' if result.ok else 'FAILED'}", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(one, together))
    return results + [one(name) for name in last]
