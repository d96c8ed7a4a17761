"""The command line as a whole: help, version, exit codes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvturbo as package
from kvturbo.cli import harness
from kvturbo.cli.main import COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(kvturbo, command: str) -> None:
    ran = kvturbo(command, "--help")
    assert ran.code == 0 and "--json" in ran.out


def test_help_lists_the_commands(kvturbo) -> None:
    out = kvturbo("--help").out
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("info", "--wings"),
        ("generate", "--prompt", "a", "--file", "b"),
        ("generate", "--format", "k2v2", "--plan", "p.json"),
    ],
)
def test_usage_errors_end_with_2(kvturbo, arguments: tuple[str, ...]) -> None:
    ran = kvturbo(*arguments)
    assert ran.code == 2 and ran.out == "" and "usage: kvturbo" in ran.err


def test_the_module_is_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvturbo", "--version"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == f"kvturbo {package.__version__}\n"


def test_building_the_command_line_imports_neither_transformers_nor_matplotlib(tmp_path: Path) -> None:
    program = (
        "import sys; from kvturbo.cli.main import build_parser; build_parser();"
        "print([name for name in ('transformers', 'matplotlib', 'triton') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout == "[]\n"


def test_a_missing_extra_is_named(kvturbo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith(("kvturbo.hf", "kvturbo.eval"))]:
        monkeypatch.delitem(sys.modules, name)
    ran = kvturbo("generate", "--prompt", "a")
    assert ran.code == 1
    assert ran.err == "kvturbo generate: needs transformers: pip install 'kvturbo[hf]'\n"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")]
)
def test_what_a_machine_refuses_is_one_line(kvturbo, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("kvturbo.cli.doctor.run", fail)
    ran = kvturbo("doctor")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == f"kvturbo doctor: {' '.join(str(error).split())}\n"


def test_a_reader_that_goes_away_leaves_no_traceback(tmp_path: Path) -> None:
    program = f"set -o pipefail; {sys.executable} -m kvturbo info k4v4 | true"
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_the_harness_that_is_not_installed_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == "kvturbo.eval.lm_eval" or name.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert harness.main() == 1
    assert capsys.readouterr().err == "kvturbo-lm-eval: needs lm_eval: pip install 'kvturbo[lm-eval]'\n"
