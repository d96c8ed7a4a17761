"""What tests of the decode kernels are made of: cases, and their decode on emulated kernels and by the reference in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emulator import EmulatedKernel
from kvturbo import KVFormat
from kvturbo.ops.decode import cuda, variants
from kvturbo.ops.decode.cuda_schedule import make_schedule
from kvturbo.ops.decode.loading import Kernels
from kvturbo.ops.decode.reference import decode as reference_decode
from kvturbo.ops.recent import Recent
from support import Batch, batch_of, ints, relative_error, same_bits

RELATIVE_ERROR = 5e-4
LSE_ERROR = 1e-3
SCALE = 0.11
HEADS = 2
LENGTHS = [700, 0, 3, 257, 64, 130]
CTAS = 7
SM_90 = variants.Limits(227 * 1024, 228 * 1024, bulk_copies=True)
LIMITS = replace(SM_90, bulk_copies=False)  # the emulator has none


@dataclass(frozen=True)
class Case:
    """A kernel.

    Attributes:
        name, head_dim, page_size: format and pages.
        group, queries: query heads per KV head, and rows of q per sequence.
        dtype, out: of q and of the output.
        few: whether it is the kernel for few tasks.
        ring: newest tokens that it reads raw, 0: none.
    """

    name: str
    head_dim: int
    page_size: int
    group: int
    queries: int = 1
    dtype: torch.dtype = torch.float32
    out: torch.dtype = torch.float32
    few: bool = False
    ring: int = 0

    @property
    def label(self) -> str:
        few = ("-few" if self.few else "") + (f"-recent{self.ring}" if self.ring else "")
        return f"{self.name}-{self.head_dim}-{self.page_size}-{self.group}x{self.queries}{few}"

    @property
    def fmt(self) -> KVFormat:
        return KVFormat.from_name(self.name, self.head_dim, seed=5)

    @property
    def variant(self) -> variants.Variant:
        return variants.variant_for(
            self.fmt,
            self.page_size,
            self.dtype,
            self.out,
            self.group,
            self.queries,
            self.few,
            LIMITS if self.few else variants.Limits(),
            self.ring,
        )

    @property
    def bound(self) -> float:
        """On the output's relative error, the rounding of its dtype included."""
        return RELATIVE_ERROR + (torch.finfo(self.out).eps / 2 if self.out != torch.float32 else 0)

    @property
    def q_lens(self) -> list[int]:
        """For `LENGTHS`: a sequence without queries, an empty one with a query, and rows of padding at the end."""
        return [1, 1, 0, 2, 1, 0] if self.queries == 1 else [self.queries, 1, 3, 0, self.queries, 2]


CASES = (
    Case("k4v4", 128, 16, 4, dtype=torch.bfloat16),
    Case("k4v4", 128, 16, 8, few=True),
    Case("k3v3", 80, 16, 3, 3),
    Case("k2v2", 64, 32, 8, out=torch.bfloat16),
    Case("k8v4", 96, 64, 16, dtype=torch.float16),
    Case("k4v3", 112, 32, 7, 3, out=torch.float16),
    Case("lite4", 64, 64, 1),
    Case("k4v4-o16", 192, 16, 8),
    Case("k4v4-o32", 256, 32, 4),
    Case("k3v2-o16", 80, 64, 4, few=True),
    Case("k2v2-o32", 128, 64, 3, 4),
    Case("k8v4", 256, 64, 1, 8),
)

RECENT_CASES = (
    Case("k4v4", 128, 32, 4, dtype=torch.bfloat16, ring=16),
    Case("k4v3", 80, 16, 3, 3, ring=8),
    Case("k4v4-o16", 192, 16, 8, dtype=torch.float16, ring=32),
    Case("k4v4-o16", 128, 32, 8, few=True, ring=16),
)

OPTIONS: dict[str, dict[str, Any]] = {
    "window and starts": {"window": 150, "seq_starts": [0, 0, 2, 120, 70, 5]},
    "soft cap and sinks": {"soft_cap": 1.5, "sinks": True},
    "all": {"window": 66, "soft_cap": 2.0, "sinks": True, "seq_starts": [5, 0, 0, 250, 0, 129]},
}


class Runner:
    """Decode of one case on the emulated kernels.

    Attributes:
        ctas: of the GPU that plans are for.
        alone: whether each has a multiprocessor to itself; else as few as can be.
        schedule: another schedule kernel than the usual one.
        launches: of each plan, into the same memory.
    """

    def __init__(self, case: Case, decode: EmulatedKernel, ctas: int) -> None:
        self.case, self.kernel, self.ctas = case, decode, ctas
        self.alone = False
        self.schedule: EmulatedKernel | None = None
        self.launches = 1

    @property
    def multiprocessors(self) -> int:
        """Of the GPU that plans are for."""
        return -(-self.ctas // (1 if self.alone else self.case.variant.ctas_per_sm))

    def kernels(self, schedule: EmulatedKernel) -> Kernels:
        """In place of `kvturbo.ops.decode.loading.kernels`; schedule: the usual schedule kernel."""
        return Kernels(self.kernel, self.schedule or schedule, self.ctas, self.multiprocessors)  # type: ignore[arg-type]

    def batch(self, lengths: list[int] = LENGTHS) -> Batch:
        return batch_of(self.case.fmt, lengths, heads=HEADS, page_size=self.case.page_size)

    def queries(self, batch: Batch) -> Tensor:
        rows = len(batch.seq_lens) * self.case.queries
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(rows, HEADS * self.case.group, self.case.head_dim, generator=generator)
        return (2 * x).to(self.case.dtype)

    def __call__(self, q: Tensor, batch: Batch, *, backwards: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
        """Out and lse; memory that the kernel has to write is NaN before."""
        self.kernel.backwards = backwards
        out = torch.full(q.shape, math.nan, dtype=self.case.out)
        recent = options.get("recent")
        schedule = make_schedule(
            q, batch.pages, batch.seq_lens, fmt=batch.fmt, out_dtype=out.dtype, ring_size=self.case.ring
        )
        assert schedule.variant == self.case.variant
        schedule.workspace.fill_(math.nan)
        lens = [ints(options.pop(name, None), "cpu") for name in ("q_lens", "seq_starts")]
        tensors = {"q_lens": lens[0], "seq_starts": lens[1]}
        counts = None if recent is None else recent.counts
        schedule.update(batch.seq_lens, **tensors, window=options.get("window"), recent_counts=counts)
        for _ in range(self.launches):
            lse = cuda.decode(
                q, batch.pages, batch.block_table, batch.seq_lens, out.fill_(math.nan),
                scale=SCALE, schedule=schedule, **batch.format_options(), **tensors, **options,
            )  # fmt: skip
            assert not schedule.counters.any(), "counters must be zero for the next launch"
        self.plan = schedule.plan
        return out, lse

    def check(self, q: Tensor, batch: Batch, *, looser: float = 1, **options: Any) -> tuple[Tensor, Tensor]:
        """The result, which is the reference's and does not depend on the order in which CTAs run and copies arrive."""
        out, lse = self(q, batch, **options)
        other = self(q, batch, backwards=True, **options)
        assert same_bits(out, other[0]) and same_bits(lse, other[1])
        wanted, wanted_lse = reference(q, batch, **options)
        assert relative_error(out, wanted) <= looser * self.case.bound
        finite = wanted_lse.isfinite()
        torch.testing.assert_close(lse[~finite].double(), wanted_lse[~finite], equal_nan=True)
        assert not finite.any() or (lse - wanted_lse)[finite].abs().max() <= looser * LSE_ERROR
        return out, lse


def starts(plan: Tensor, ctas: int) -> list[int]:
    """Where the CTAs' own chunks begin: CTAs of a rank have a share each, those of the next rank `taper` less."""
    big, taper, per_rank = (int(plan[i]) for i in (0, 6, 7))
    shares = [big - c // per_rank * taper for c in range(ctas)]
    return [sum(shares[:c]) for c in range(ctas)]


def reference(q: Tensor, batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=torch.float64)
    for name in ("q_lens", "seq_starts"):
        options[name] = ints(options.get(name), "cpu")
    if options.get("recent") is not None:
        options["recent"] = options["recent"]._replace(rows=options["recent"].rows.double())
    lse = reference_decode(
        q.double(), batch.pages, batch.block_table, batch.seq_lens, out,
        scale=SCALE, **batch.format_options(), **options,
    )  # fmt: skip
    return out, lse


def build(case: Case, folder: Path) -> EmulatedKernel:
    variant = case.variant
    return EmulatedKernel(variant.source(), variant.macros(), "decode", folder, variant.shared_bytes)


def rings(batch: Batch, counts: list[int], size: int, dtype: torch.dtype) -> Recent:
    """Rings of other keys and values than the pages have; everything that nobody is to read is NaN."""
    heads, head_dim = batch.k[0].shape[1:]
    rows = torch.full((len(counts) + 2, heads, 2, size, head_dim), math.nan, dtype=dtype)
    slots = torch.tensor([(3 * i + 1) % (len(counts) + 1) for i in range(len(counts))], dtype=torch.int32)
    for i, count in enumerate(counts):
        for p in range(len(batch.k[i]) - count, len(batch.k[i])):
            rows[slots[i], :, 0, p % size], rows[slots[i], :, 1, p % size] = 0.8 * batch.k[i][p], 1.2 * batch.v[i][p]
    slots[torch.tensor(counts) == 0] = -1
    return Recent(rows, slots, torch.tensor(counts, dtype=torch.int32))
