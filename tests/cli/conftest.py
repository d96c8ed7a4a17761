"""The tiny model's folder, and the command run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvturbo.cli.main import main
from tiny_model import save_tiny_model


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """Its output as JSON, of which there must be nothing else."""
        return json.loads(self.out, parse_constant=_refuse)


Command = Callable[..., Ran]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def kvturbo(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `kvturbo ARGUMENTS...`; a usage error of the parser counts as its exit code."""

    def command(*arguments: object) -> Ran:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return command
