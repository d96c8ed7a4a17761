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
        shared_bytes: dynamic shared memory per CTA.

    Attributes:
        backwards: CTAs run from the last to the first, and asynchronous copies arrive as late as they may, not as early.
    """

    def __init__(
        self, source: str, macros: dict[str, int | str], name: str, folder: Path, shared_bytes: int = 0
    ) -> None:
        header = Path(__file__).with_name("emulator.h").read_text()
        entry = (
            f'extern "C" void emulate(const Params* p, int grid, int threads, int shared_bytes, bool backwards)'
            f" {{ static const Params* at; at = p; run(+[] {{ {name}(*at); }}, grid, threads, shared_bytes, backwards); }}\n"
        )
        path = folder / f"{name}.cpp"
        path.write_text(header + _without_ptx(source) + entry)
        defines = [f"-D{key}={value}" for key, value in macros.items()]
        assert GXX
        subprocess.run([GXX, *_FLAGS, *defines, str(path), "-o", str(path.with_suffix(".so"))], check=True)
        self._library = ctypes.CDLL(str(path.with_suffix(".so")))
        self.shared_bytes = shared_bytes
        self.backwards = False

    def launch(self, grid: int, threads: int, parameters: ctypes.Structure, stream: int) -> None:
        """Runs all CTAs, one after another."""
        self._library.emulate(ctypes.byref(parameters), grid, threads, self.shared_bytes, self.backwards)


_IN_CPP = (
    (
        r'asm volatile\("cp\.async\.cg\.shared\.global \[%0\],\[%1\],16;" ::"r"\((.*?)\), "l"\((.*?)\) : "memory"\);',
        r"copy_async(\1, \2);",
    ),
    (r'asm volatile\("cp\.async\.commit_group;" ::: "memory"\);', "commit_copies();"),
    (
        r'asm volatile\("atom\.add\.acq_rel\.gpu\.global\.u32 %0,\[%1\],1;" : "=r"\((\w+)\) : "l"\((\w+)\) : "memory"\);',
        r"\1 = (*\2)++;",
    ),
    (r'asm volatile\("cp\.async\.wait_group %0;" ::"n"\((\w+)\) : "memory"\);', r"wait_for_copies(\1);"),
    (r"extern __shared__ \S+ (\w+) (\w+)\[\];", r"\1* const \2 = (\1*)dynamic_shared;"),
)


def _without_ptx(source: str) -> str:
    """The source without its functions and copies in PTX; emulator.h has them in C++."""
    functions = re.compile(r"^DEV [^\n]*(?:\}\n|\{(?: *//[^\n]*)?\n.*?^\}\n)", re.M | re.S)
    source = functions.sub(lambda match: "" if "asm(" in match.group() else match.group(), source)
    for ptx, cpp in _IN_CPP:
        source = re.sub(ptx, cpp, source)
    return source
