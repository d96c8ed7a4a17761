"""Entry point of the `kvturbo` command. Exit codes: 0 done, 1 failed, 2 bad input."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import torch

import kvturbo
from kvturbo.cli.errors import CommandFailed, UsageError

COMMANDS = ("generate", "info", "check", "plan", "doctor", "demo", "eval")
_EXTRAS = {"transformers": "hf", "tokenizers": "hf", "matplotlib": "eval"}


def build_parser() -> argparse.ArgumentParser:
    """The command line with all subcommands."""
    parser = argparse.ArgumentParser(prog="kvturbo", description=kvturbo.__doc__)
    parser.add_argument("--version", action="version", version=f"kvturbo {kvturbo.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"kvturbo.cli.{name}")
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = subparsers.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.configure(command)
        command.set_defaults(run=module.run)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except UsageError as error:
        return _complain(arguments.command, error, 2)
    except CommandFailed as error:
        return _complain(arguments.command, error, 1)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name]
        return _complain(arguments.command, f"needs {error.name}: pip install 'kvturbo[{extra}]'", 1)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # whoever read the output is gone; nothing may be flushed to it
        return 1
    except (OSError, torch.OutOfMemoryError) as error:
        return _complain(arguments.command, error, 1)
    except KeyboardInterrupt:
        return _complain(arguments.command, "interrupted", 130)


def _complain(command: str, error: object, code: int) -> int:
    line = " ".join(str(error).split())
    print(f"kvturbo {command}: {line}", file=sys.stderr)
    return code
