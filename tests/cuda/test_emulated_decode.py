"""The decode and schedule kernels, thread by thread on the CPU, against the reference in float64."""

from __future__ import annotations

import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from emulator import EmulatedKernel
from kvturbo import KVFormat
from kvturbo.config import HEAD_DIMS, PAGE_SIZES, Side
from kvturbo.ops.decode import cuda, variants
from kvturbo.ops.decode.reference import decode as reference_decode
from kvturbo.ops.recent import Recent
from kvturbo.ops.sharing import SharedSchedules
from support import Batch, batch_of, ints, relative_error, same_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

RELATIVE_ERROR = 5e-4
LSE_ERROR = 1e-3
SCALE = 0.11
HEADS = 2
LENGTHS = [700, 0, 3, 257, 64, 130]
CTAS = 7
LIMITS = variants.Limits(227 * 1024, 228 * 1024)


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


def test_the_list_has_every_shape() -> None:
    assert {case.head_dim for case in CASES} == set(HEAD_DIMS)
    assert {case.page_size for case in CASES} == set(PAGE_SIZES)
    assert {case.fmt.outliers for case in CASES} == {0, 16, 32}
    assert {case.variant.row_tiles for case in CASES} == {1, 2, 3, 4}
    assert {(case.variant.warps, case.variant.stages) for case in CASES} == {(4, 8), (8, 24)}


class Runner:
    """Decode of one case on the emulated kernels."""

    def __init__(self, case: Case, decode: EmulatedKernel, ctas: int) -> None:
        self.case, self.kernel, self.ctas = case, decode, ctas

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
        schedule = cuda.make_schedule(
            q, batch.pages, batch.seq_lens, fmt=batch.fmt, out_dtype=out.dtype, ring_size=self.case.ring
        )
        assert schedule.variant == self.case.variant
        schedule.workspace.fill_(math.nan)
        lens = [ints(options.pop(name, None), "cpu") for name in ("q_lens", "seq_starts")]
        tensors = {"q_lens": lens[0], "seq_starts": lens[1]}
        counts = None if recent is None else recent.counts
        schedule.update(batch.seq_lens, **tensors, window=options.get("window"), recent_counts=counts)
        lse = cuda.decode(
            q, batch.pages, batch.block_table, batch.seq_lens, out,
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


@pytest.fixture(scope="module")
def schedule_kernel(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernel:
    text = (variants.FOLDER / "schedule.cu").read_text()
    return EmulatedKernel(text, {}, "schedule", tmp_path_factory.mktemp("schedule"))


def build(case: Case, folder: Path) -> EmulatedKernel:
    variant = case.variant
    return EmulatedKernel(variant.source(), variant.macros(), "decode", folder, variant.shared_bytes)


@pytest.fixture(params=CASES, ids=lambda case: case.label, scope="module")
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return SimpleNamespace(case=request.param, decode=build(request.param, tmp_path_factory.mktemp("decode")))


@pytest.fixture
def run(kernel: SimpleNamespace, schedule_kernel: EmulatedKernel, monkeypatch: pytest.MonkeyPatch) -> Runner:
    runner = Runner(kernel.case, kernel.decode, CTAS)
    monkeypatch.setattr(cuda, "_kernels", lambda *_: (runner.kernel, schedule_kernel, runner.ctas))
    monkeypatch.setattr(cuda, "limits_of", lambda _: LIMITS if kernel.case.few else variants.Limits())
    monkeypatch.setattr(cuda, "current_stream", lambda _: 0)
    return runner


def test_a_ragged_batch_in_pieces(run: Runner) -> None:
    batch = run.batch()
    q_lens = None if run.case.queries == 1 else run.case.q_lens
    run.check(run.queries(batch), batch, q_lens=q_lens)
    assert pieces(run.plan) > 0, "no task crosses a chunk"


def pieces(plan: Tensor) -> int:
    """How many chunks begin inside a task."""
    big, total, lead = int(plan[0]), int(plan[2]), int(plan[5])
    records = plan[8 : int(plan[4])].view(-1, 8)[:CTAS].tolist()
    return sum((c * big - r[1]) % (r[2] + lead) > lead for c, r in enumerate(records) if c * big < total)


RECENT_CASES = (
    Case("k4v4", 128, 32, 4, dtype=torch.bfloat16, ring=16),
    Case("k4v3", 80, 16, 3, 3, ring=8),
    Case("k4v4-o16", 192, 16, 8, dtype=torch.float16, ring=32),
    Case("k4v4", 128, 16, 8, few=True, ring=16),
)


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


@pytest.mark.parametrize(
    "options", [{}, {"window": 10}, {"window": 150, "sinks": True, "soft_cap": 1.5}, {"starts": True}]
)
@pytest.mark.parametrize("kernel", RECENT_CASES, ids=lambda case: case.label, indirect=True)
def test_newest_tokens_are_read_raw(run: Runner, options: dict[str, Any]) -> None:
    batch, size = run.batch(), run.case.ring
    options = dict(options, q_lens=None if run.case.queries == 1 else run.case.q_lens)
    if options.pop("starts", False):
        options["seq_starts"] = [690, 0, 1, 250, 70, 128]
    if "sinks" in options:
        options["sinks"] = torch.linspace(-2, 3, HEADS * run.case.group)
    q = run.queries(batch)
    for counts in ([size, 0, 3, 5, size, 1], [0] * 6, [min(size, n) for n in LENGTHS]):
        recent = rings(batch, counts, size, q.dtype)
        run.check(q, batch, recent=recent, **options)
    packed, raw = (reference(q, batch, recent=x, **options)[0] for x in (None, recent))
    assert relative_error(packed, raw) > 5 * run.case.bound, "raw tokens make no difference"


@pytest.mark.parametrize("side, value", [("k", math.inf), ("k", math.nan), ("v", -math.inf), ("v", math.nan)])
@pytest.mark.parametrize("kernel", RECENT_CASES[1:2], ids=lambda case: case.label, indirect=True)
def test_a_raw_token_that_is_not_finite_makes_exactly_the_rows_that_see_it_nan(
    run: Runner, side: Side, value: float
) -> None:
    batch, size = run.batch(), run.case.ring
    q, counts = run.queries(batch), [min(size, n) for n in LENGTHS]
    clean, spoilt = (rings(batch, counts, size, q.dtype) for _ in range(2))
    for sequence, position in ((0, 698), (3, 250)):  # the last two queries of sequence 0; sequence 3 has none
        spoilt.rows[spoilt.slots[sequence], :, "kv".index(side), position % size, 5] = value
    options: dict[str, Any] = {"q_lens": run.case.q_lens, "soft_cap": 1.5}
    assert run(q, batch, recent=clean, **options)[0].isfinite().all()
    out, lse = run.check(q, batch, recent=spoilt, **options)
    bad = {run.case.q_lens[0] - 2, run.case.q_lens[0] - 1}
    assert {row for row in range(len(q)) if out[row].isnan().any()} == bad and out[sorted(bad)].isnan().all()
    assert side == "v" or lse[sorted(bad)].isnan().all()


OPTIONS: dict[str, dict[str, Any]] = {
    "window and starts": {"window": 150, "seq_starts": [0, 0, 2, 120, 70, 5]},
    "soft cap and sinks": {"soft_cap": 1.5, "sinks": True},
    "all": {"window": 66, "soft_cap": 2.0, "sinks": True, "seq_starts": [5, 0, 0, 250, 0, 129]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_with_queries_of_many_lengths_and_padding(run: Runner, options: dict[str, Any]) -> None:
    batch = run.batch()
    options = dict(options, q_lens=run.case.q_lens)
    if "sinks" in options:
        options["sinks"] = torch.linspace(-2, 3, HEADS * run.case.group)
    run.check(run.queries(batch), batch, **options)


@pytest.mark.parametrize("side", ["k", "v"])
def test_a_nan_scale_makes_exactly_the_rows_that_see_it_nan(run: Runner, side: Side) -> None:
    clean, dirty, spoilt = run.batch(), run.batch(), run.batch()
    options: dict[str, Any] = {"q_lens": run.case.q_lens, "window": 120, "seq_starts": [0, 0, 1, 200, 0, 33]}
    q = run.queries(clean)
    for sequence, position in ((0, 0), (0, 570), (2, 0), (3, 199), (5, 32)):  # before the window or the start
        dirty.put(sequence, position, side, math.nan)
    wanted, got = run(q, clean, **options), run(q, dirty, **options)
    assert wanted[0].isfinite().all()
    assert same_bits(wanted[0], got[0]) and same_bits(wanted[1], got[1])
    for sequence, position in ((0, 699), (4, 40)):  # the last query of sequence 0 only, all of sequence 4
        spoilt.put(sequence, position, side, math.nan)
    out, _ = run.check(q, spoilt, **options)
    first = [sum(options["q_lens"][:i]) for i in range(len(LENGTHS) + 1)]
    bad = {first[1] - 1, *range(first[4], first[5])}
    assert {row for row in range(len(q)) if out[row].isnan().any()} == bad
    assert out[sorted(bad)].isnan().all()


@pytest.mark.parametrize("kernel", [CASES[0]], ids=lambda case: case.label, indirect=True)
def test_chunks_drawn_by_ticket_give_the_same_bits_in_any_order(run: Runner) -> None:
    run.ctas = 2
    batch = run.batch([3600] * 4)
    run.check(run.queries(batch), batch)
    big, small, total = run.plan[:3].tolist()
    assert -(-(total - 2 * big) // small) >= 2, "too few chunks are left to be drawn"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kernel", [CASES[0], CASES[3], RECENT_CASES[1]], ids=lambda case: case.label, indirect=True)
def test_long_batches_in_weighted_shares(run: Runner, seed: int) -> None:
    rng = random.Random(seed)
    run.ctas = 2
    lengths = [rng.choice([0, 1, rng.randrange(3000), rng.randrange(3000, 6000)]) for _ in range(rng.randrange(2, 6))]
    lengths = [4700] * 4 if seed % 3 == 0 and run.case.variant.row_tiles > 1 else [*lengths, 5000, 4500]
    batch = run.batch(lengths)
    options: dict[str, Any] = {"window": rng.choice([None, None, 4800])}
    if run.case.queries > 1:
        options["q_lens"] = [rng.randint(0, min(3, n)) for n in lengths]
    q = run.queries(batch)
    if run.case.ring:
        counts = [rng.randint(0, min(run.case.ring, n)) for n in lengths]
        options["recent"] = rings(batch, counts, run.case.ring, q.dtype)
    run.check(q, batch, **options)
    assert run.plan[5] > 0, "no task has a lead"


@pytest.mark.parametrize("kernel", [CASES[1]], ids=lambda case: case.label, indirect=True)
def test_a_ring_of_three_stages_is_used_more_than_once(run: Runner) -> None:
    run.ctas = 2
    batch = run.batch([2100, 130])
    run.check(run.queries(batch), batch)
    assert int(run.plan[0]) > run.case.variant.stages


@pytest.mark.parametrize("kernel", [CASES[0], CASES[2], CASES[4]], ids=lambda case: case.label, indirect=True)
def test_scores_that_climb_far_beyond_the_first_steps(run: Runner) -> None:
    """Sums that leave the range of the reference they began with, even that of fp32: the step is done again with a new one."""
    run.ctas = 1
    batch = run.batch([1400, 90])
    late = batch.k[0][1350].repeat_interleave(run.case.group, 0)  # every query looks for it
    q = run.queries(batch) + (250 / SCALE / late.square().sum(-1, keepdim=True) * late).to(run.case.dtype)
    scores = q[0, 0].double() @ batch.k[0][:, 0].T * SCALE / math.log(2)
    assert scores[1350] - scores[:1024].max() > 130
    run.check(q, batch, looser=20)


@pytest.mark.parametrize("kernel", [CASES[0], CASES[5]], ids=lambda case: case.label, indirect=True)
def test_starts_far_beyond_the_end_leave_nothing_to_see(run: Runner) -> None:
    batch = run.batch()
    most = 2**31 - 1
    out, lse = run.check(run.queries(batch), batch, q_lens=run.case.q_lens, seq_starts=[most, 0, 0, most - 63, most, 3])
    rows = run.case.q_lens[0]
    assert not out[:rows].any() and (lse[:rows] == -math.inf).all()


@pytest.mark.parametrize("kernel", [CASES[0]], ids=lambda case: case.label, indirect=True)
def test_what_the_kernel_would_read_wrongly_is_refused(run: Runner) -> None:
    batch = run.batch()
    q = run.queries(batch)
    schedule = cuda.make_schedule(q, batch.pages, batch.seq_lens, fmt=batch.fmt)
    with pytest.raises(ValueError, match=r"seq_lens must be contiguous .* got strides \(2,\)"):
        schedule.update(torch.stack((batch.seq_lens, batch.seq_lens), 1)[:, 0])
    options = {"fmt": batch.fmt, "scale": SCALE, "schedule": schedule}
    with pytest.raises(RuntimeError, match="the schedule has no plan"):
        cuda.decode(q, batch.pages, batch.block_table, batch.seq_lens, torch.empty_like(q), **options)
    schedule.update(batch.seq_lens)
    with pytest.raises(ValueError, match="out must be contiguous"):
        cuda.decode(q, batch.pages, batch.block_table, batch.seq_lens, torch.empty_like(q).transpose(1, 2), **options)
    pages = batch.pages.as_strided(batch.pages.shape, (8, *batch.pages.stride()[1:]))
    with pytest.raises(ValueError, match="16 bytes and lie less than 4 GiB apart, got stride 8"):
        cuda.decode(q, pages, batch.block_table, batch.seq_lens, torch.empty_like(q), **options)


@pytest.mark.parametrize("kernel", [CASES[2]], ids=lambda case: case.label, indirect=True)
def test_layers_share_a_plan_and_steps_do_not(
    run: Runner, schedule_kernel: EmulatedKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers' calls in each of several steps; later ones use the memory of the first one's plan.

    Calls without a schedule make one each, and so do calls in a graph's capture, which keep nothing.
    """
    for cache in (cuda._idle_schedules, cuda._stream_memory):
        cache.cache_clear()  # none has been made with another number of CTAs
    plans: list[int] = []
    launch = schedule_kernel.launch
    monkeypatch.setattr(schedule_kernel, "launch", lambda *args: plans.append(1) or launch(*args))
    shared, batch = SharedSchedules(), run.batch()
    steps: list[dict[str, Any]] = [
        {"q_lens": [1, 1, 0, 2, 1, 0]}, {"q_lens": run.case.q_lens}, {"q_lens": run.case.q_lens, "window": 150},
        {"q_lens": run.case.q_lens, "seq_starts": [690, 0, 0, 250, 60, 129]}, {"q_lens": run.case.q_lens},
    ]  # fmt: skip
    for step in steps:
        options: dict[str, Any] = {n: ints(x, "cpu") if isinstance(x, list) else x for n, x in step.items()}
        results = []
        calls = (
            (shared, False, 1),
            (shared, False, 0),
            (None, False, 1),
            (None, False, 1),
            (shared, True, 1),
            (None, True, 1),
        )
        for schedule, capturing, made in calls:
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
            plans.clear()
            q, out = run.queries(batch), torch.full(run.queries(batch).shape, math.nan)
            lse = cuda.decode(
                q, batch.pages, batch.block_table, batch.seq_lens, out,
                scale=SCALE, schedule=schedule, **batch.format_options(), **options,
            )  # fmt: skip
            results.append((out, lse))
            assert len(plans) == made
        alone = run(q, batch, **step)
        assert all(same_bits(a, b) for result in results for a, b in zip(result, alone, strict=True))
    assert len({id(made.schedule) for made in shared._made.values()}) == 2, "with a window and without"
    assert len(cuda._idle_schedules(cuda._shape(run.case.variant, len(LENGTHS), HEADS, batch.pages.device), 0)) == 1


LIMITS_OF = {
    "sm_80": variants.Limits(163 * 1024, 164 * 1024),
    "sm_86": variants.Limits(99 * 1024, 100 * 1024),
    "sm_90": variants.Limits(227 * 1024, 228 * 1024, True),
    "sm_120": variants.Limits(99 * 1024, 100 * 1024, True),
}


SHAPES = [
    (name, head_dim, page_size)
    for name in ("k4v4", "k3v3", "k2v2", "k8v4", "lite4", "k4v4-o16", "k4v4-o32")
    for head_dim in HEAD_DIMS
    if head_dim >= 128 or name != "k4v4-o32"
    for page_size in PAGE_SIZES
]
TOO_LARGE = {"sm_86": [("k8v4", 256, 64)], "sm_120": [("k8v4", 256, 64)]}


def kernels_of(shape: tuple[str, int, int], limits: variants.Limits) -> list[variants.Variant]:
    """For few and for many tasks, and one to four tiles of rows."""
    name, head_dim, page_size = shape
    fmt, dtype = KVFormat.from_name(name, head_dim), torch.bfloat16
    calls = ((8, 4), (999, 4), (999, 8), (999, 16))
    return [variants.variant_for(fmt, page_size, dtype, dtype, rows, 1, tasks, limits) for tasks, rows in calls]


@pytest.mark.parametrize("arch", LIMITS_OF)
def test_kernels_fit_the_gpu_or_are_refused_by_name(arch: str) -> None:
    limits = LIMITS_OF[arch]
    for shape in SHAPES:
        if shape in TOO_LARGE.get(arch, []):
            with pytest.raises(ValueError, match="needs .* bytes of shared memory"):
                kernels_of(shape, limits)
            continue
        for variant in kernels_of(shape, limits):
            assert variant.shared_bytes + variant.static_shared_bytes <= limits.shared_per_cta
            assert limits.bulk_copies or variant.stages % variant.warps == 0
            assert variant.stages > variant.warps
