"""Runs every path of every kernel once, on small shapes: what `make sanitize` gives to compute-sanitizer.

    python tests/ops/sanitize.py cuda
    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/ops/sanitize.py triton --part 1/8

A run without the sanitizer before compiles the kernels: under it they are then only loaded. Parts share the work among processes.
Inputs are made and results are compared on the CPU, so that hardly any kernel but ours runs. A page of 0xFF (NaN scales) lies
before every block, and the last block ends where its memory ends: with PYTORCH_NO_CUDA_MEMORY_CACHING=1 memcheck sees what
goes beyond.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulated_decode import CASES, HEADS, LENGTHS, OPTIONS, RECENT_CASES, SCALE, Case, reference, rings
from kernel_checks import check_gather, check_recent_copies, check_store, mixed_slots, rotations, vectors
from kvturbo import KVFormat
from kvturbo.ops import backends, decode, gather, schedule, store
from kvturbo.ops.decode import cuda_schedule
from kvturbo.ops.decode.loading import Kernels
from kvturbo.ops.decode.variants import FEW_TASKS
from kvturbo.ops.recent import Recent
from kvturbo.ops.store import cuda as cuda_store
from kvturbo.vllm.rings import kernel_on
from ring_engine import LOADS, engine_of
from support import Batch, batch_of, device_of, interpreted, ints, relative_error

MAX_ERROR = 1e-2
CTAS = 7
FORMATS = (
    ("k4v4", 128, 32, torch.bfloat16), ("k3v3", 80, 16, torch.float16), ("k4v4-o16", 96, 16, torch.bfloat16),
    ("k8v4", 192, 64, torch.float32), ("k4v3", 112, 64, torch.bfloat16), ("k2v2", 64, 16, torch.float32),
    ("k3v2-o16", 80, 32, torch.float32), ("k2v2-o32", 256, 32, torch.float16), ("lite4", 64, 64, torch.float32),
    ("k4v2", 128, 16, torch.float16), ("k4v4", 80, 64, torch.float32), ("k8v4", 112, 16, torch.bfloat16),
)  # fmt: skip
LONG = [3600, 3300, 3500, 3400]
LEADS = Case("k2v2", 64, 32, 8, out=torch.bfloat16)
Check = Callable[[], str]


def room_of(pages: Tensor, device: torch.device) -> Tensor:
    """Room on a device for pages [n, heads, page_bytes] of the host: [n, 1 + heads, page_bytes], the first of each row 0xFF."""
    room = torch.full((len(pages), 1 + pages.shape[1], pages.shape[2]), 0xFF, dtype=torch.uint8)
    room[:, 1:] = pages
    return room.to(device)


def pages_in(room: Tensor) -> Tensor:
    """The pages on the host, the poison still being what it was."""
    room = room.cpu()
    assert (room[:, 0] == 0xFF).all(), "bytes outside the pages were written"
    return room[:, 1:]


@dataclass
class Checks:
    """The checks of a backend's kernels.

    Attributes:
        backend: "cuda" or "triton".
        quick: only some of them.
    """

    backend: str
    quick: bool

    @property
    def device(self) -> torch.device:
        return device_of(self.backend)

    def __iter__(self) -> Iterator[tuple[str, Check]]:
        """Names and checks; a check raises AssertionError or says what it found."""
        for name, head_dim, page_size, dtype in FORMATS[:3] if self.quick else FORMATS:
            fmt = KVFormat.from_name(name, head_dim, seed=5)
            label = f"{name}-{head_dim}-{page_size} {str(dtype).removeprefix('torch.')}"
            for single in (True, False) if self.backend == "cuda" else (False,):
                kind = " single tokens" if single else " octets"
                yield f"store  {label}{kind}", lambda f=fmt, p=page_size, t=dtype, s=single: self.store(f, p, t, s)
            for rotated in rotations(fmt):
                kind = " rotated" if rotated else ""
                yield f"gather {label}{kind}", lambda f=fmt, p=page_size, t=dtype, r=rotated: self.gather(f, p, t, r)
        every = {"plain": {}} | OPTIONS if self.backend == "cuda" else {"plain": {}, "all": OPTIONS["all"]}
        for case in CASES[:3] if self.quick else CASES:
            for kind, options in every.items():
                yield f"decode {case.label} {kind}", lambda c=case, o=options: self.decode(c, lengths_of(c), o)
        yield "decode with a schedule of its own", lambda: self.decode(CASES[0], LENGTHS, {}, planned=False)
        for case in RECENT_CASES[:1] if self.quick or self.backend == "triton" else RECENT_CASES:
            yield f"decode {case.label}", lambda c=case: self.decode(c, lengths_of(c), {"window": 150})
        if self.backend == "cuda":
            long = [*LONG, *[1] * (FEW_TASKS // HEADS)]
            alike = [256] * (FEW_TASKS // HEADS + 1)
            yield (
                "decode of long sequences in weighted shares",
                lambda: self.decode(LEADS, long, {}, ctas=2, plan="lead"),
            )
            yield (
                "decode of tasks that are alike by ticket",
                lambda: self.decode(CASES[0], alike, {}, ctas=2, plan="tickets"),
            )
            yield "vLLM's rings", self.give_rings

    def give_rings(self) -> str:
        engine = engine_of(kernel_on(self.device), LOADS["drafts"], seed=1, device=self.device)
        for _ in range(40):
            engine.step()
        return f"{engine.seen['rows']} rows, {engine.seen['kept']} kept their ring"

    def store(self, fmt: KVFormat, page_size: int, dtype: torch.dtype, single: bool) -> str:
        def run(k: Tensor, v: Tensor, pages: Tensor, slots: Tensor, **options: Any) -> None:
            room = room_of(pages.cpu(), self.device)
            store(k, v, room[:, 1:], slots, backend=self.backend, **options)
            pages.copy_(pages_in(room))

        most, cuda_store._MOST_SINGLE = cuda_store._MOST_SINGLE, 10**9 if single else 0
        try:
            slots = mixed_slots(page_size)
            k, v = (x.to(dtype) for x in vectors(fmt, len(slots), HEADS))
            check_store(run, fmt, page_size, slots, k, v, self.device)
            check_recent_copies(run, fmt, page_size, slots, k, v, self.device)
        finally:
            cuda_store._MOST_SINGLE = most
        return f"{2 * HEADS * len(slots)} vectors"

    def gather(self, fmt: KVFormat, page_size: int, dtype: torch.dtype, rotated: bool) -> str:
        def run(pages: Tensor, table: Tensor, start: int, stop: int, out: Any, **options: Any) -> None:
            room = room_of(pages.cpu(), self.device)
            gather(room[:, 1:], table, start, stop, out=out, backend=self.backend, **options)
            pages_in(room)

        ranges = [(0, 2 * page_size), (5, page_size + 3), (9, 10)]
        check_gather(run, fmt, page_size, ranges, self.device, rotated=rotated, dtype=dtype)
        return f"{len(ranges)} ranges"

    def decode(
        self,
        case: Case,
        lengths: list[int],
        options: dict[str, Any],
        *,
        planned: bool = True,
        ctas: int = CTAS,
        plan: str = "",
    ) -> str:
        """Decode against the reference.

        Args:
            case, lengths, options: the kernel, the sequences, and options of the call.
            planned: with a schedule for `ctas` CTAs, or with the call's own.
            plan: what the plan must have: "tickets" that CTAs draw, a "lead" of every task, or nothing in particular.
        """
        batch = batch_of(case.fmt, lengths, heads=HEADS, page_size=case.page_size)
        options = options_for(case, lengths, options)
        if case.ring:
            options["recent"] = rings(batch, [min(case.ring, n) for n in lengths], case.ring, case.dtype)
        generator = torch.Generator().manual_seed(3)
        shape = len(lengths) * case.queries, HEADS * case.group, case.head_dim
        q = (2 * torch.randn(shape, generator=generator)).to(case.dtype)
        room = room_of(batch.pages, self.device)
        got = self._decode(q, batch, room[:, 1:], case, options, ctas if planned else 0, plan)
        pages_in(room)
        out, lse = (x.cpu() for x in got)
        wanted, wanted_lse = reference(q, batch, **options)
        error = relative_error(out, wanted)
        assert error <= MAX_ERROR, f"relative error {error:.1e}"
        finite = wanted_lse.isfinite()
        assert torch.equal(lse[~finite].double(), wanted_lse[~finite]), "lse is finite elsewhere"
        assert not finite.any() or (lse - wanted_lse)[finite].abs().max() <= MAX_ERROR, "lse"
        return f"error {error:.1e}"

    def _decode(
        self, q: Tensor, batch: Batch, pages: Tensor, case: Case, options: dict[str, Any], ctas: int, kind: str
    ) -> tuple[Tensor, Tensor]:
        device = self.device
        out = torch.full(q.shape, math.nan, dtype=case.out).to(device)
        on_device = dict(options)
        for name in ("q_lens", "seq_starts"):
            on_device[name] = ints(options.get(name), device)
        if "sinks" in options:
            on_device["sinks"] = options["sinks"].to(device)
        recent = None
        if case.ring:
            recent = on_device["recent"] = Recent(*(x.to(device) for x in options["recent"]))
        q, seq_lens = q.to(device), batch.seq_lens.to(device)
        if ctas:
            lens = {
                "q_lens": on_device["q_lens"],
                "seq_starts": on_device["seq_starts"],
                "window": options.get("window"),
            }
            if self.backend == "triton" and recent is None:
                on_device["schedule"] = schedule.plan(seq_lens, **lens)
            elif self.backend == "cuda":
                with few_ctas(ctas):
                    plan = cuda_schedule.make_schedule(
                        q, pages, seq_lens, fmt=batch.fmt, out_dtype=case.out, ring_size=case.ring
                    )
                assert plan.variant.row_tiles == case.variant.row_tiles, "another kernel than the case is for"
                plan.workspace.fill_(math.nan)
                plan.update(seq_lens, **lens, recent_counts=None if recent is None else recent.counts)
                drawn, lead, taper = plan.plan[4:7].tolist()
                assert kind != "tickets" or drawn, "no chunk is drawn by ticket"
                assert kind != "lead" or (lead and taper), "tasks have no lead, or shares do not fall"
                on_device["schedule"] = plan
        return decode(
            q, pages, batch.block_table.to(device), seq_lens, scale=SCALE, out=out, backend=self.backend,
            **on_device, **batch.format_options(device),
        )  # fmt: skip


@contextmanager
def few_ctas(count: int) -> Iterator[None]:
    """Schedules of the cuda backend that are made meanwhile are for at most `count` CTAs: an instrumented launch is slow."""
    kernels = cuda_schedule.kernels

    def fewer(*args: Any) -> Kernels:
        loaded, per_multiprocessor = kernels(*args), args[0].ctas_per_sm
        ctas = min(loaded.ctas, count)
        return loaded._replace(ctas=ctas, multiprocessors=-(-ctas // per_multiprocessor))

    cuda_schedule.kernels = fewer
    try:
        yield
    finally:
        cuda_schedule.kernels = kernels


def lengths_of(case: Case) -> list[int]:
    """`LENGTHS`; for the kernels for many tasks with so many empty sequences and sequences of one token that they are chosen."""
    return LENGTHS if case.few else LENGTHS + [0, 1] * (FEW_TASKS // HEADS // 2)


def options_for(case: Case, lengths: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """Options for `LENGTHS` for longer lists; with options there are also q_lens, and rows of padding."""
    options, more = dict(options), len(lengths) - len(LENGTHS)
    if options or case.queries > 1:
        options["q_lens"] = case.q_lens + [1] * more
    if "seq_starts" in options:
        options["seq_starts"] = options["seq_starts"] + [0] * more
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-2, 3, HEADS * case.group)
    return options


def part_of(checks: Iterable[tuple[str, Check]], part: str) -> list[tuple[str, Check]]:
    """The I-th of N parts of the checks, given as "I/N" with I from 1 to N; ValueError for anything else."""
    numbers = re.fullmatch(r"(\d+)/(\d+)", part)
    index, count = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"part must be I/N with I from 1 to N, got {part!r}")
    return list(checks)[index - 1 :: count]


def run(checks: Iterable[tuple[str, Check]]) -> int:
    """Runs checks, a line each; the number of those that failed."""
    failed = 0
    for name, check in checks:
        start = time.monotonic()
        try:
            word, found = "ok", check()
        except AssertionError as error:
            word, found = "FAILED", " ".join(str(error).split())[:200]
            failed += 1
        print(f"{word:6} {name}: {found} ({time.monotonic() - start:.1f} s)", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", nargs="?", default="cuda", choices=("cuda", "triton"))
    parser.add_argument("--quick", action="store_true", help="fewer formats and kernels")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts of the checks")
    given = parser.parse_args()
    reason = backends.unavailable(given.backend, "decode", device_of(given.backend), KVFormat.from_name("k4v4", 128))
    if reason:
        print(f"backend {given.backend!r} can't run here: {reason}", file=sys.stderr)
        return 2
    where = "Triton's interpreter" if interpreted(given.backend) else torch.cuda.get_device_name()
    try:
        checks = part_of(Checks(given.backend, given.quick), given.part)
    except ValueError as error:
        parser.error(str(error))
    failed = run(checks)
    result = f"{failed} of {len(checks)} FAILED" if failed else f"all {len(checks)} passed"
    print(f"{given.backend} on {where}, part {given.part}: {result}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
