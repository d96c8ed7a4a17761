"""The decode and schedule kernels, thread by thread on the CPU, against the reference in float64."""

from __future__ import annotations

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated_decode import CASES, CTAS, HEADS, LENGTHS, OPTIONS, SCALE, SM_90, Runner, starts
from emulator import EmulatedKernel
from kvturbo import KVFormat
from kvturbo.config import HEAD_DIMS, PAGE_SIZES, Side
from kvturbo.ops.decode import cuda, variants
from kvturbo.ops.decode.cuda_schedule import _stream_memory, idle_schedules, make_schedule, shape_of
from kvturbo.ops.sharing import SharedSchedules
from support import ints, same_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def test_the_list_has_every_shape() -> None:
    assert {case.head_dim for case in CASES} == set(HEAD_DIMS)
    assert {case.page_size for case in CASES} == set(PAGE_SIZES)
    assert {case.fmt.outliers for case in CASES} == {0, 16, 32}
    assert {case.variant.row_tiles for case in CASES} == {1, 2, 3, 4}
    assert {(case.variant.warps, case.variant.stages) for case in CASES} == {(4, 8), (8, 16)}
    assert {case.fmt.page_bytes(case.page_size) % 128 for case in CASES if case.page_size > 16} == {0, 64}


def test_a_ragged_batch_in_pieces(run: Runner) -> None:
    batch = run.batch()
    q_lens = None if run.case.queries == 1 else run.case.q_lens
    run.check(run.queries(batch), batch, q_lens=q_lens)
    assert pieces(run.plan) > 0, "no task crosses a chunk"


def pieces(plan: Tensor) -> int:
    """How many chunks begin inside a task."""
    total, lead = int(plan[2]), int(plan[5])
    records = plan[8 : 8 + 8 * CTAS].view(-1, 8).tolist()
    chunks = zip(starts(plan, CTAS), records, strict=True)
    return sum((at - r[1]) % (r[2] + lead) > lead for at, r in chunks if at < total)


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
    schedule = make_schedule(q, batch.pages, batch.seq_lens, fmt=batch.fmt)
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


@pytest.mark.parametrize("kernel", [CASES[0]], ids=lambda case: case.label, indirect=True)
def test_strides_of_dimensions_of_one_do_not_count(run: Runner) -> None:
    batch = run.batch([9])
    q, wanted = run.queries(batch), run(run.queries(batch), batch)
    pages, table = batch.pages[batch.block_table[0, 0]].unsqueeze(0), torch.zeros(1, 1, dtype=torch.int32)
    odd = pages.as_strided(pages.shape, (8, *pages.stride()[1:])), table.as_strided((1, 1), (1, 99))
    for found in (odd, (pages, table)):
        schedule = make_schedule(q, found[0], batch.seq_lens, fmt=batch.fmt, out_dtype=wanted[0].dtype)
        schedule.update(batch.seq_lens)
        out = torch.empty_like(wanted[0])
        cuda.decode(q, *found, batch.seq_lens, out, scale=SCALE, schedule=schedule, **batch.format_options())
        assert same_bits(out, wanted[0])


@pytest.mark.parametrize("kernel", [CASES[2]], ids=lambda case: case.label, indirect=True)
def test_layers_share_a_plan_and_steps_do_not(
    run: Runner, schedule_kernel: EmulatedKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers' calls in each of several steps; later ones use the memory of the first one's plan.

    Calls without a schedule make one each, and so do calls in a graph's capture, which keep nothing.
    """
    for cache in (idle_schedules, _stream_memory):
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
    assert len(idle_schedules(shape_of(run.case.variant, len(LENGTHS), HEADS, batch.pages.device), 0)) == 1


LIMITS_OF = {
    "sm_80": variants.Limits(163 * 1024, 164 * 1024),
    "sm_86": variants.Limits(99 * 1024, 100 * 1024),
    "sm_90": SM_90,
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
