"""Runs a kernel's CUDA source on the CPU, thread by thread: its logic and its addresses, not its speed. Needs g++."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

GXX = shutil.which("g++")
_FLAGS = [
    "-std=c++17",
    "-O1",
    "-shared",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-w",
]


class EmulatedKernel:
    """Stands in for `kvturbo.cuda.jit.Kernel`.

    Args:
        source, macros: as for `compile_source`.
        name: the kernel's name.
        folder: where to build.
    """

    def __init__(self, source: str, macros: dict[str, int | str], name: str, folder: Path) -> None:
        header = Path(__file__).with_name("emulator.h").read_text()
        entry = (
            f'extern "C" void emulate(const Params* p, int grid, int threads)'
            f" {{ static const Params* at; at = p; run(+[] {{ {name}(*at); }}, grid, threads); }}\n"
        )
        path = folder / f"{name}.cpp"
        path.write_text(header + _without_ptx(source) + entry)
        defines = [f"-D{key}={value}" for key, value in macros.items()]
        assert GXX
        subprocess.run([GXX, *_FLAGS, *defines, str(path), "-o", str(path.with_suffix(".so"))], check=True)
        self._library = ctypes.CDLL(str(path.with_suffix(".so")))

    def launch(self, grid: int, threads: int, parameters: ctypes.Structure, stream: int) -> None:
        """Runs all CTAs, one after another."""
        self._library.emulate(ctypes.byref(parameters), grid, threads)


def _without_ptx(source: str) -> str:
    """The source without its functions in PTX; emulator.h has them in C++."""
    functions = re.compile(r"^DEV [^\n]*(?:\}\n|\{\n.*?^\}\n)", re.M | re.S)
    return functions.sub(lambda match: "" if "asm(" in match.group() else match.group(), source)
