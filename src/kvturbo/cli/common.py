"""Options and steps that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from kvturbo.cli.errors import CommandFailed, UsageError, bad_input
from kvturbo.cli.output import progress

if TYPE_CHECKING:
    from kvturbo.eval.model import LoadedModel
    from kvturbo.eval.runner import Evaluation


def add_model_options(parser: argparse.ArgumentParser, *, positional: bool = False) -> None:
    note = "a folder or a hub id (default: the embedded model)"
    if positional:
        parser.add_argument("model", nargs="?", metavar="MODEL", help=note)
    else:
        parser.add_argument("--model", metavar="PATH_OR_HUB_ID", help=note)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16 or auto: float32 on a CPU, else the model's own"
    )


def add_window_options(parser: argparse.ArgumentParser) -> None:
    note = "(default: the format's; counted in the bytes)"
    parser.add_argument("--recent", type=int, metavar="N", help=f"newest tokens kept in 16 bits {note}")
    parser.add_argument("--sink", type=int, metavar="N", help=f"first tokens kept in 16 bits {note}")


def load(arguments: argparse.Namespace, text: Path | None = None) -> LoadedModel:
    """The model that the options name."""
    from kvturbo.eval.model import load_model

    with bad_input():
        return load_model(arguments.model, device=arguments.device, dtype=arguments.dtype, text=text)


def check_writable(path: Path, option: str) -> None:
    """Makes a file's folder, and raises UsageError unless the file can be written there: before the work, not after it."""
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise UsageError(f"{option}: {path.parent} is not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise UsageError(f"{option} must be a file, got the folder {path}")
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{option}: can't write {path}: {error.strerror}") from error


def tasks_that_run(tasks: dict[str, Any], loaded: Any, asked: Iterable[str]) -> dict[str, Any]:
    """Tasks without those whose files the model lacks, which are named on stderr.

    Args:
        tasks: by name.
        loaded: the model, or the one behind servers.
        asked: tasks that stay whatever the model lacks, because somebody named them.

    Raises:
        UsageError: none would be left.
    """
    lacking: dict[str, str] = {}
    for name in set(tasks) - set(asked):
        try:
            tasks[name].check(loaded)
        except FileNotFoundError as error:
            lacking[name] = str(error)
        except ValueError:
            continue  # an option is wrong: the evaluation says so
    reasons = "; ".join(sorted(set(lacking.values())))
    if len(lacking) == len(tasks):
        raise UsageError(f"no task can be run: {reasons}")
    if lacking:
        print(f"left out {', '.join(sorted(lacking))}: {reasons}", file=sys.stderr)
    return {name: task for name, task in tasks.items() if name not in lacking}


def read_text(path: Path) -> str:
    """A UTF-8 file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read {path}: {error}") from error


def run_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Runs an evaluation under a progress bar."""
    from kvturbo.eval.caches import PackedReadsError
    from kvturbo.eval.server import ServerError

    with progress(evaluation.prompts(), "evaluating", "prompt") as bar:

        def advance(task: str) -> None:
            bar.set_postfix_str(task)
            bar.update()

        try:
            return evaluation.run(advance)
        except (PackedReadsError, ServerError) as error:
            raise CommandFailed(str(error)) from error
