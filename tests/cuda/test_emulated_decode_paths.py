"""Paths of the emulated decode kernels that only some calls take: newest tokens read raw, and long batches in shares."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from emulated_decode import CASES, HEADS, LENGTHS, RECENT_CASES, Runner, reference, rings, starts
from emulator import EmulatedKernel
from kvturbo.config import Side
from kvturbo.ops.decode import variants
from support import relative_error

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


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


@pytest.mark.parametrize("kernel", [RECENT_CASES[i] for i in (0, 1, 3)], ids=lambda case: case.label, indirect=True)
def test_a_task_in_more_pieces_than_a_warp_has_lanes(run: Runner) -> None:
    run.ctas, run.launches = 150, 2
    batch = run.batch([2_750 * run.case.variant.warps, 40])
    q, size = run.queries(batch), run.case.ring
    recent = rings(batch, [min(size, 13), 5], size, q.dtype)
    run.check(q, batch, q_lens=None if run.case.queries == 1 else [run.case.queries, 1], recent=recent)
    share, steps = int(run.plan[0]), int(run.plan[10])  # of the first CTA; of the first task
    assert steps > 33 * share


@pytest.mark.parametrize("kernel", RECENT_CASES[:1], ids=lambda case: case.label, indirect=True)
def test_rings_that_begin_between_16_bytes_are_refused(run: Runner) -> None:
    batch = run.batch()
    q = run.queries(batch)
    recent = rings(batch, [min(run.case.ring, n) for n in LENGTHS], run.case.ring, q.dtype)
    room = torch.zeros(recent.rows.numel() + 1, dtype=q.dtype)
    with pytest.raises(ValueError, match="recent.rows must begin at a multiple of 16 bytes, got address 0x"):
        run(q, batch, recent=recent._replace(rows=room[1:].view(recent.rows.shape)))


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


@pytest.mark.parametrize("kernel", [CASES[0]], ids=lambda case: case.label, indirect=True)
def test_chunks_drawn_by_ticket_give_the_same_bits_in_any_order(run: Runner) -> None:
    run.ctas = 2
    batch = run.batch([3600] * 4)
    run.check(run.queries(batch), batch)
    assert run.plan[4] >= 2, "too few chunks are left to be drawn"


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
    assert run.plan[6] > 0, "shares do not fall"


@pytest.mark.parametrize("ctas, alone", [(7, False), (5, False), (3, True)])
@pytest.mark.parametrize("kernel", [CASES[3], CASES[5]], ids=lambda case: case.label, indirect=True)
def test_shares_that_fall_from_rank_to_rank(run: Runner, ctas: int, alone: bool) -> None:
    """The last rank is not full, and pages of a CTA's tasks lie differently in lines (CASES[5])."""
    run.ctas, run.alone, run.launches = ctas, alone, 2
    batch = run.batch([9000, 15000, 9000])
    run.check(run.queries(batch), batch)
    assert run.plan[5] > 0 and run.plan[7] == run.multiprocessors
    assert bool(run.plan[6] > 0) != alone, "a CTA that is alone on its multiprocessor is preferred to nobody"


@pytest.mark.parametrize("kernel", [CASES[3]], ids=lambda case: case.label, indirect=True)
def test_ctas_without_work_claim_their_chunks_too(run: Runner, tmp_path: Path) -> None:
    text, share = variants.schedule_source(), "x.big = (total + x.tapered()"
    assert share in text
    run.schedule = EmulatedKernel(text.replace(share, "x.big = (2 * total + x.tapered()"), {}, "schedule", tmp_path)
    run.ctas, run.launches = 6, 2
    batch = run.batch([9000, 15000, 9000])
    run.check(run.queries(batch), batch)
    assert run.plan[6] > 0 and starts(run.plan, 6)[4] > run.plan[2], "every CTA has work"
