"""Who has which ring of raw tokens: the kernel, thread by thread on the CPU, in engines that do all that engines do."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from emulator import EmulatedKernel
from kvturbo.vllm.rings import MACROS, SOURCE, THREADS, Launch, Plan, Rings
from ring_engine import LOADS, Load, engine_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

FEW_THREADS = 64


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """The kernel with two warps: faster here, and large batches go round its loops."""
    return _kernel(tmp_path_factory.mktemp("few"), FEW_THREADS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    return _kernel(tmp_path_factory.mktemp("whole"), THREADS)


def _kernel(folder: Path, threads: int) -> Launch:
    kernel = EmulatedKernel(SOURCE.read_text(), MACROS | {"THREADS": threads}, "rings", folder)
    return lambda parameters: kernel.launch(1, threads, parameters, 0)


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("name", LOADS)
def test_rings_hold_the_newest_tokens_of_their_rows(few: Launch, name: str, size: int) -> None:
    seen = Counter[str]()
    for seed in range(4):
        engine = engine_of(few, LOADS[name], seed, size)
        for _ in range(150):
            engine.step()
        seen += engine.seen
    assert seen["kept"] > 300 and seen["full"] > 200, seen


def test_the_loads_have_all_that_can_happen(few: Launch) -> None:
    seen = Counter[str]()
    for name, load in LOADS.items():
        engine = engine_of(few, load, seed=len(name), count=12 if load.sequences > 16 else load.sequences)
        for _ in range(200):
            engine.step()
        seen += engine.seen
    happened = (
        "preempted",
        "out of blocks",
        "blocks found",
        "found while they are written",
        "rejected",
        "inherited",
        "lost",
        "rows without",
        "dummy runs",
        "taken from the last step",
    )
    assert all(seen[name] > 0 for name in happened), seen


@pytest.mark.parametrize("name", LOADS)
def test_with_as_many_rings_as_sequences_no_row_is_without(few: Launch, name: str) -> None:
    load = LOADS[name]
    engine = engine_of(few, load, seed=11, count=load.sequences)
    for _ in range(150):
        engine.step()
    assert engine.seen["rows"] > 100 and engine.seen["rows without"] == 0, engine.seen


def test_short_answers_find_rings_of_sequences_that_have_just_ended(few: Launch) -> None:
    load = Load(sequences=4, leaving=0.3, missing=0.0, longest=30, budget=500)
    engine = engine_of(few, load, seed=5, count=4)
    for _ in range(100):
        engine.step()
    assert engine.seen["taken from the last step"] > 30 and engine.seen["rows without"] == 0, engine.seen


def test_the_whole_cta_does_the_same(few: Launch, whole: Launch) -> None:
    load = Load(sequences=100, blocks=900, budget=900, longest=60, leaving=0.1)
    engines = [engine_of(launch, load, seed=7, count=90) for launch in (few, whole)]
    for _ in range(30):
        for engine in engines:
            engine.step()
        assert engines[0].seen == engines[1].seen
        assert torch.equal(engines[0].rings.token_slots, engines[1].rings.token_slots)


class Rows:
    """Steps by hand: rows are (blocks, length, new tokens), blocks of 16 tokens."""

    def __init__(self, launch: Launch, count: int = 2, size: int = 16, idle: int = 0, most: int = 4) -> None:
        self.rings = Rings(Plan(size, count, idle), 16, most, max(64, most), torch.device("cpu"), launch)

    def __call__(self, *rows: tuple[list[int], int, int]) -> tuple[list[int], list[int]]:
        """Rings and counts of the rows after a step."""
        tokens = [count for _, _, count in rows]
        self.rings.update(
            SimpleNamespace(
                num_reqs=len(rows), num_actual_tokens=sum(tokens), slot_mapping=torch.arange(sum(tokens)),
                block_table_tensor=torch.tensor([blocks + [0] * (6 - len(blocks)) for blocks, _, _ in rows]).int(),
                seq_lens=torch.tensor([length for _, length, _ in rows]).int(),
                query_start_loc=torch.tensor([0, *tokens]).cumsum(0).int(),
            ),
            200,
        )  # fmt: skip
        return self.rings.slots.tolist()[: len(rows)], self.rings.counts.tolist()[: len(rows)]


def test_a_sequence_keeps_its_ring_and_fills_it(few: Launch) -> None:
    step = Rows(few)
    assert step(([1, 2], 20, 20)) == ([0], [16])
    assert step(([1, 2], 21, 1)) == ([0], [16])
    assert step(([7], 3, 3), ([1, 2], 29, 8)) == ([1, 0], [3, 16])
    assert step(([1, 2], 24, 1), ([7], 4, 1)) == ([0, 1], [11, 4]), "six drafts took the places of older tokens"
    assert step.rings.token_slots.tolist() == [23 % 16, 16 + 3, *[-1] * 62]


def test_a_prompts_last_tokens_are_stored(few: Launch) -> None:
    step = Rows(few, size=8)
    assert step(([1, 2], 20, 20)) == ([0], [8])
    assert step.rings.token_slots.tolist()[:22] == [*[-1] * 12, *(p % 8 for p in range(12, 20)), -1, -1]


def test_a_prefix_that_was_found_begins_with_an_empty_ring(few: Launch) -> None:
    assert Rows(few)(([1, 2, 3], 36, 4)) == ([0], [4])


def test_a_ring_that_no_row_has_is_given_away_at_once(few: Launch) -> None:
    step = Rows(few, count=1)
    step(([1], 4, 4))
    assert step(([5, 6], 3, 3)) == ([0], [3])
    assert step(([1], 5, 1)) == ([0], [1]), "what it held is gone"


def test_where_rings_are_few_they_are_given_away_after_some_steps_without_use(few: Launch) -> None:
    step = Rows(few, count=1, idle=4)
    step(([1], 4, 4))
    for length in range(3, 7):
        assert step(([5, 6], length, 1)) == ([-1], [0])
    assert step(([5, 6], 7, 1)) == ([0], [1])
    assert step(([1], 5, 1)) == ([-1], [0])


def test_rings_that_were_unused_longest_are_given_away_first(few: Launch) -> None:
    step = Rows(few, count=4)
    assert step(([1], 4, 4), ([2], 4, 4), ([3], 4, 4)) == ([0, 1, 2], [4, 4, 4])
    assert step(([3], 5, 1)) == ([2], [5])
    assert step(([1], 5, 1)) == ([0], [5])
    assert step(([5], 1, 1), ([1], 6, 1), ([6], 2, 2), ([7], 3, 3)) == ([3, 0, 1, 2], [1, 6, 2, 3]), "3 was never used"
    assert step(([1], 7, 1)) == ([0], [7])
    assert step(([8], 1, 1), ([9], 1, 1), ([10], 1, 1)) == ([1, 2, 3], [1, 1, 1]), "the lower one of two"


def test_rows_beyond_the_ctas_threads_get_rings_of_their_own(few: Launch) -> None:
    step, rows = Rows(few, count=170, most=180), [([block], 1, 1) for block in range(1, 181)]
    assert step(*rows) == ([*range(170), *[-1] * 10], [1] * 170 + [0] * 10)
    again = [(blocks, 2, 1) for blocks, _, _ in (*rows[100:], *rows[:30])]
    assert step(*again)[0] == [*range(100, 170), *range(30, 40), *range(30)]


def test_a_clock_that_overflows_tells_ages_still(few: Launch) -> None:
    step = Rows(few, count=3)
    step.rings._state["clock"][0] = 2**31 - 3
    step(([1], 4, 4), ([2], 4, 4))
    step(([2], 5, 1))
    assert step(([2], 6, 1)) == ([1], [6])
    assert step.rings._state["clock"][0] < 0
    assert step(([5], 1, 1), ([6], 1, 1), ([7], 1, 1)) == ([2, 0, 1], [1, 1, 1])


def test_of_two_rows_that_ask_for_a_ring_the_first_has_it(few: Launch) -> None:
    step = Rows(few)
    step(([1, 2], 17, 17))
    assert step(([1, 3], 17, 1), ([1, 2], 18, 1)) == ([0, 1], [16, 1])


def test_a_block_that_another_row_writes_is_forgotten(few: Launch) -> None:
    step = Rows(few, count=1, idle=4)
    step(([1], 10, 10))
    step(([1], 10, 10))  # another sequence of the same length in the same block, which found no ring
    assert step(([1], 11, 1)) == ([-1], [0])


@pytest.mark.parametrize("behind", [False, True])
def test_a_prefix_that_another_row_writes_in_the_same_step_has_no_ring_of_what_lay_there(
    few: Launch, behind: bool
) -> None:
    step = Rows(few, count=3)
    step(([1, 2], 32, 32))  # ends; its last block is taken for other tokens, which the next row shares at once
    rows = [([3, 2, 4], 40, 40), ([3, 2, 5], 34, 2)]
    assert step(*(rows if behind else rows[::-1]))[1] == ([16, 2] if behind else [2, 16])


def test_a_block_that_a_row_fills_does_not_give_its_ring_to_a_row_that_shares_it(few: Launch) -> None:
    step = Rows(few)
    step(([1, 2, 3], 28, 28))
    step(([1, 2, 3], 33, 5))  # the last two of four drafts are rejected, so the ring's token 31 is one of these
    assert step(([1, 2, 5], 34, 2), ([1, 2, 3], 32, 1)) == ([1, 0], [2, 15])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_block_of_a_prompt_is_forgotten(few: Launch, place: int) -> None:
    step, end = Rows(few, count=4), 16 * (place + 1)
    step(([*range(1, place + 1), 10], end, end))
    prompt = [*range(11, 11 + place), 10]  # block 10 holds other tokens now
    step(([*prompt, 15], end + 12, end + 12))
    assert step(([*prompt, 16], end + 2, 2))[1] == [2], "a row that shares them finds no ring of the one before"


def test_a_length_within_the_last_rows_tokens_reads_what_is_stored_now(few: Launch) -> None:
    step = Rows(few)
    step(([1, 2], 24, 4))
    assert step(([1, 2], 18, 1)) == ([0], [1]), "its ring begins with token 20"


def test_batches_and_tensors_that_the_kernel_can_not_read_are_refused(few: Launch) -> None:
    step = Rows(few)
    with pytest.raises(ValueError, match="made for 4 sequences and 64 tokens at once, got 1 and 65; turn them off"):
        step(([1, 2, 3, 4, 5], 65, 65))
    with pytest.raises(ValueError, match="made for 4 sequences .* got 5 and 5"):
        step(*[([block], 1, 1) for block in range(5)])
    wrong = SimpleNamespace(
        num_reqs=1, num_actual_tokens=1, slot_mapping=torch.zeros(1, dtype=torch.int32), seq_lens=torch.ones(1).int(),
        block_table_tensor=torch.ones(1, 6).int(), query_start_loc=torch.tensor([0, 1]).int(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="stored must be torch.int64 on cpu in rows without gaps, got torch.int32"):
        step.rings.update(wrong, 20)
