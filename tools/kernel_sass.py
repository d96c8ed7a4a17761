"""Shows what the loop of a decode kernel is made of, from its machine code; needs no GPU.

    python tools/kernel_sass.py --group 8                        # head_dim 128, k4v4, pages of 32 tokens
    python tools/kernel_sass.py --group 4 --q-len 2 --format k3v3 -D MIN_CTAS=2 --file changed.cu

Printed are registers and spills, and of the loop with the tensor-core instructions: its length, the sum of the stall counts that
the assembler wrote into its instructions (the cycles of one warp alone), how many take the integer pipe, and how often each
instruction comes. Rare branches (masks, new references) are counted with the rest. nvdisasm comes with Triton.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import compile_source
from kvturbo.cuda.source import source
from kvturbo.ops.decode.variants import FOLDER, SHARES, Limits, Variant, variant_for

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
H100 = Limits(227 * 1024, 228 * 1024, True)
INTEGER_PIPE = {
    "LOP3", "PRMT", "SHF", "IADD3", "ISETP", "SEL", "FMNMX", "FSEL", "I2FP", "LEA", "VIADD", "FSETP", "PLOP3", "IMNMX",
    "VIMNMX", "SGXT", "BMSK", "VOTE", "P2R", "R2P", "MOV",
}  # fmt: skip
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);\s*/\* 0x[0-9a-f]+ \*/")
_CONTROL = re.compile(r"\s*/\* 0x([0-9a-f]+) \*/")
_BRANCH = re.compile(r"BRA.*?(\.L_x_\d+)")


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        text: as nvdisasm prints it.
        stall: cycles before the warp's next one may issue, bits 105 to 108 of its 128.
    """

    text: str
    stall: int = 0

    @property
    def name(self) -> str:
        """Without predicate and modifiers."""
        words = self.text.split()
        return (words[1] if words[0].startswith("@") else words[0]).split(".")[0]


def disassemble(code: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a cubin, and where each label stands among them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        done = subprocess.run([NVDISASM, "-hex", "-c", file.name], capture_output=True, text=True, check=True)
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif instruction := _INSTRUCTION.match(line):
            found.append(Instruction(instruction[1]))
        elif (control := _CONTROL.match(line)) and found:
            found[-1].stall = int(control[1], 16) >> 41 & 15
    return found, labels


def loop_of(instructions: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The innermost loop with tensor-core instructions: that of the steps.

    Raises:
        ValueError: no loop has any.
    """
    loops = []
    for end, instruction in enumerate(instructions):
        branch = _BRANCH.search(instruction.text)
        if branch and labels.get(branch[1], end + 1) <= end:
            body = instructions[labels[branch[1]] : end + 1]
            if any("MMA" in x.name for x in body):
                loops.append(body)
    if not loops:
        raise ValueError("no loop with tensor-core instructions was found")
    return min(loops, key=len)


def variant_of(given: argparse.Namespace) -> Variant:
    """The kernel that a call gets on an H100."""
    fmt = KVFormat.from_name(given.format, given.head_dim)
    dtype = torch.bfloat16
    return variant_for(fmt, given.page_size, dtype, dtype, given.group, given.q_len, given.tasks, H100, given.recent)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=FOLDER / "decode.cu", help="another text of the kernel")
    parser.add_argument("--format", default="k4v4", help="default: %(default)s")
    numbers = {"head-dim": 128, "page-size": 32, "group": 4, "q-len": 1, "tasks": 128, "recent": 0}
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    parser.add_argument("-D", action="append", default=[], metavar="MACRO=VALUE", help="in place of the variant's")
    given = parser.parse_args(arguments)
    variant = variant_of(given)
    macros = variant.macros() | dict(text.split("=", 1) for text in given.D)
    code, report = compile_source(source(given.head_dim, SHARES, given.file), "sm_90a", macros)
    print(*(line.strip() for line in report.splitlines() if "registers" in line or "spill" in line), sep="\n")
    body = loop_of(*disassemble(code))
    names = Counter(instruction.name for instruction in body)
    on_integers = sum(count for name, count in names.items() if name in INTEGER_PIPE)
    print(f"loop: {len(body)} instructions, stall counts {sum(x.stall for x in body)}, integer pipe {on_integers}")
    print(", ".join(f"{name} {count}" for name, count in names.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
