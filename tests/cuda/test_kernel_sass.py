"""The tool that reads a kernel's machine code finds its loop."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "kernel_sass.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_sass", SCRIPT)
    assert spec and spec.loader
    module = sys.modules["kernel_sass"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_and_its_counts_are_printed(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of 64 slots takes 32 tensor-core instructions for one tile of rows, as decode.cu says."""
    assert tool.main(["--group", "4"]) == 0
    printed = capsys.readouterr().out
    assert "spill" in printed and "IMMA 32" in printed
    length, stalls, integers = map(int, re.findall(r"loop: (\d+) .* counts (\d+), integer pipe (\d+)", printed)[0])
    assert 800 < length < 1600 and length < stalls < 4 * length and 400 < integers < length


def test_without_tensor_cores_there_is_no_loop(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match="no loop with tensor-core instructions"):
        tool.loop_of([tool.Instruction("@P0 BRA `(.L_x_0)")], {".L_x_0": 0})
