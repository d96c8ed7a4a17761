"""Compiles what the Triton launchers would launch for a GPU that is not there: run as a script, without Triton's interpreter.

Arguments: an architecture such as 90, then formats as name:head_dim:page_size. Prints a line of JSON per kernel. The launchers
run as they are, on CPU tensors; only the launch itself is replaced by a compilation with the same arguments.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from kvturbo import KVFormat
from kvturbo.ops.recent import Recent

TYPES = {
    torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.float32: "fp32",
}  # fmt: skip
HEADS, GROUP = 2, 4


def type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory per thread, which is where registers are spilled to."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.findall(r"STACK:(\d+)", usage.stdout + usage.stderr)[-1])


def compiler(arch: int) -> Any:
    def compile_instead(fn: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(fn.arg_names, args, strict=False)) | {
            k: kwargs.pop(k) for k in list(kwargs) if k in fn.arg_names
        }
        constants = {p.name: values[p.name] for p in fn.params if p.is_constexpr or values[p.name] is None}
        signature = {name: "constexpr" if name in constants else type_of(values[name]) for name in fn.arg_names}
        aligned = [p.num for p in fn.params if signature[p.name][0] == "*" and not p.do_not_specialize_on_alignment]
        source = ASTSource(
            fn, signature, {(fn.arg_names.index(k),): v for k, v in constants.items()},
            {(number,): [["tt.divisibility", 16]] for number in aligned},
        )  # fmt: skip
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=kwargs)
        record = {"kernel": fn.__name__, "shared": kernel.metadata.shared, "stack": stack_bytes(kernel.asm["cubin"])}
        print(json.dumps(record), flush=True)

    return compile_instead


def launch(fmt: KVFormat, page_size: int) -> None:
    """A store without and with rings, a gather, and three decodes: plain, with every option, and with rings too."""
    store, gather, decode = (
        getattr(import_module(f"kvturbo.ops.{op}.triton"), op) for op in ("store", "gather", "decode")
    )
    pages = torch.zeros(2, HEADS, fmt.page_bytes(page_size), dtype=torch.uint8)
    channels = torch.arange(fmt.outliers).expand(HEADS, -1).contiguous() if fmt.outliers else None
    x = torch.zeros(3, HEADS, fmt.head_dim, dtype=torch.bfloat16)
    options: dict[str, Any] = {"fmt": fmt, "outlier_channels": channels}
    store(x, x, pages, torch.arange(3), **options)
    rings = torch.zeros(2, HEADS, 2, 16, fmt.head_dim, dtype=torch.bfloat16)
    store(x, x, pages, torch.arange(3), recent_rows=rings, recent_slots=torch.arange(3), **options)
    table, lens = torch.tensor([[0]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    out = torch.empty(1, 3, HEADS, fmt.head_dim, dtype=torch.bfloat16)
    gather(pages, table, 0, 3, (out, out), **options)
    q = torch.zeros(1, HEADS * GROUP, fmt.head_dim, dtype=torch.bfloat16)
    decode(q, pages, table, lens, torch.empty_like(q), scale=0.1, **options)
    every = {
        "q_lens": lens // 3,
        "seq_starts": lens - 3,
        "window": 2,
        "soft_cap": 5.0,
        "sinks": torch.zeros(HEADS * GROUP),
    }
    decode(q.half(), pages, table, lens, torch.empty_like(q), scale=0.1, **every, **options)
    recent = Recent(rings, lens - 3, lens - 1)
    decode(q, pages, table, lens, torch.empty_like(q), scale=0.1, recent=recent, **every, **options)


if __name__ == "__main__":
    JITFunction.run = compiler(int(sys.argv[1]))
    for argument in sys.argv[2:]:
        name, head_dim, page_size = argument.split(":")
        launch(KVFormat.from_name(name, int(head_dim)), int(page_size))
