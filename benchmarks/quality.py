"""Compares every format with the formats of other projects: divergence, agreement and retrieval on the same tokens.

Formats and baselines are simulated by the same code: keys and values are rounded to 16 bits, stored and read back by the
reference quantiser or the baseline's, and attended to in chunks (`kvturbo.eval.simulation`; a test holds it to the packed
cache). Rows go to benchmarks/results/quality.json as they come; the same command continues where a run stopped.

    python benchmarks/quality.py --device cuda
    python benchmarks/quality.py --device cpu --tokens 2000 --length 768 --prefix 256 --questions 32 --few 16
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quality_rows import CONTROL, Bench, Job, Sizes, jobs

from kvturbo.bench.report import checked_commit
from kvturbo.eval.goals import check
from kvturbo.eval.model import load_model
from kvturbo.eval.report import environment, table, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
QK_NORM = "qk-norm"
HARD_CASES = ROOT / "models" / "hard_cases.py"


def main() -> int:
    arguments = parse()
    sizes = Sizes(
        tokens=arguments.tokens, length=arguments.length, prefix=arguments.prefix, chunk=arguments.chunk,
        questions=arguments.questions, few=arguments.few, batch=arguments.batch, calibration=arguments.calibration,
    )  # fmt: skip
    commit = checked_commit(arguments.commit, allow_dirty=arguments.allow_dirty)
    loaded = load_model(arguments.model, device=arguments.device, dtype="float32")
    cases = hard_cases()
    if arguments.qk_norm is not None:
        cases[QK_NORM] = lambda _: trained(arguments.qk_norm)
    bench = Bench(loaded, sizes, cases)
    settings = {"model": loaded.name, "weights": digest(loaded.folder), "dtype": "float32", **sizes.facts()}
    report = continued(arguments.out, settings, fresh=arguments.fresh)
    if arguments.qk_norm is not None:
        report = with_trained(report, arguments.qk_norm)
    wanted = [job for job in jobs(bench) if not arguments.only or job.section in arguments.only]
    run_all(bench, wanted, report, commit, arguments)
    print(summary(report))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder (default: the embedded model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--tokens", type=int, default=50_000, help="scored tokens, rounded up to whole rows")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row of text")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens of a row that are read raw and not scored")
    parser.add_argument("--chunk", type=int, default=128, help="tokens of a chunk after the prefix")
    parser.add_argument("--questions", type=int, default=2048, help="retrieval questions of the main formats")
    parser.add_argument("--few", type=int, default=512, help="retrieval questions of the others")
    parser.add_argument("--batch", type=int, default=32, help="rows of a forward pass")
    parser.add_argument("--calibration", type=int, default=4096, help="tokens at the text's end kept for calibration")
    parser.add_argument(
        "--qk-norm", type=Path, metavar="FOLDER", help="a model of models/train_qk_norm.py, as one more case"
    )
    parser.add_argument("--seconds", type=float, help="start no row after this time")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="sections to measure (default: all)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    parser.add_argument("--commit", help="which commit this is, for a tree that is no git checkout")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a changed tree; the commit says so")
    return parser.parse_args()


def hard_cases() -> dict[str, Callable[[Any], Any]]:
    """Rewrites of a model by name, from models/hard_cases.py, and their controls; none where that file is missing."""
    if not HARD_CASES.is_file():
        print(f"no hard cases: {HARD_CASES.relative_to(ROOT)} is missing", file=sys.stderr)
        return {}
    spec = importlib.util.spec_from_file_location("hard_cases", HARD_CASES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return dict(module.CASES) | {f"{name}{CONTROL}": make for name, make in module.CONTROLS.items()}


def trained(folder: Path) -> Any:
    """A model that was trained, in fp32.

    Raises:
        OSError, ValueError: the folder holds no model.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def with_trained(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The report with the facts of a trained case; rows of other weights under that name are left out."""
    facts = json.loads((folder / "training.json").read_text()) | {"weights": digest(folder)}
    same = report.get("qk_norm", {}).get("weights") == facts["weights"]
    rows = [row for row in report["rows"] if same or not row["case"].startswith(QK_NORM)]
    return report | {"qk_norm": facts, "rows": rows}


def digest(folder: Path | None) -> str | None:
    """sha256 of a model's weights."""
    weights = None if folder is None else folder / "model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights is not None and weights.is_file() else None


def continued(path: Path, settings: dict[str, Any], *, fresh: bool) -> dict[str, Any]:
    """The report in a file, or an empty one.

    Raises:
        ValueError: the file's rows were measured with other settings.
    """
    if fresh or not path.is_file():
        return {"settings": settings, "rows": []}
    report = json.loads(path.read_text())
    if report["settings"] != settings:
        changed = [key for key in settings if report["settings"].get(key) != settings[key]]
        raise ValueError(f"{path} was measured with other settings ({', '.join(changed)}): use --fresh or --out")
    return report | {"settings": settings}


def run_all(
    bench: Bench, wanted: list[Job], report: dict[str, Any], commit: str, arguments: argparse.Namespace
) -> None:
    """Measures the rows that the report lacks, the file rewritten after each."""
    begin, done = time.perf_counter(), {key(row) for row in report["rows"]}
    facts = environment() | {"commit": commit}
    left = [job for job in wanted if key(job.facts()) not in done]
    for i, job in enumerate(left):
        spent = time.perf_counter() - begin
        if arguments.seconds is not None and spent > arguments.seconds:
            print(f"time is up: {len(left) - i} rows are left; run the same command again", file=sys.stderr)
            return
        row = job.facts() | timed(job, bench) | {"commit": commit}
        report["rows"].append(row)
        write_json(arguments.out, facts | {name: value for name, value in report.items() if name not in facts})
        print(f"{time.perf_counter() - begin:6.1f}s {i + 1}/{len(left)} {line(row)}", file=sys.stderr, flush=True)


def timed(job: Job, bench: Bench) -> dict[str, Any]:
    begin = time.perf_counter()
    figures = job.measure(bench)
    if bench.loaded.device.type == "cuda":
        torch.cuda.synchronize()
    return figures | {"seconds": round(time.perf_counter() - begin, 3)}


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What makes a row the same row."""
    return tuple(str(row[name]) for name in ("section", "case", "name", "setting"))


def line(row: dict[str, Any]) -> str:
    shown = ("kl_mean", "same_top1", "accuracy", "difference", "questions", "seconds")
    figures = " ".join(f"{name} {row[name]:.4g}" for name in shown if name in row)
    return f"{row['section']}/{row['case']}/{row['name']}/{row['setting'] or '-'}: {figures}"


def summary(report: dict[str, Any]) -> str:
    """The figures to reach, reached or not."""
    rows = [(goal.text, goal.target, goal.found, goal.verdict) for goal in check(report["rows"])]
    return table(("figure to reach", "at most / at least", "found", ""), rows, left=True)


if __name__ == "__main__":
    sys.exit(main())
