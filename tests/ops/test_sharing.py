"""One schedule for all layers of a step: made once, made anew when lengths change, never used for others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.ops import decode
from kvturbo.ops.decode.cuda_schedule import Schedule
from kvturbo.ops.sharing import MOST_KINDS, SharedSchedules
from support import BACKENDS_UNDER_TEST, Batch, batch_of, device_of, ints, relative_error, same_bits

FMT = KVFormat.from_name("k4v4", 64)
LENGTHS = [300, 0, 140]


def get(shared: SharedSchedules, kind: Any, lens: tuple[Tensor | None, ...], make: Callable[[Any], Any]) -> Any:
    """As a backend does it."""
    seq_lens, q_lens, seq_starts = lens
    assert seq_lens is not None
    return shared.find(kind, seq_lens, q_lens, seq_starts) or shared.make(kind, seq_lens, q_lens, seq_starts, make)


def made_for(*lens: Tensor | None) -> tuple[SharedSchedules, Callable[[], int]]:
    """Shared schedules, and what gets the number of the schedule for these lengths: the first made is 1."""
    shared, count = SharedSchedules(), iter(range(1, 100))
    return shared, lambda: get(shared, "kind", lens, lambda _: next(count))


def test_a_schedule_is_made_once_for_the_same_tensors() -> None:
    _, number = made_for(ints([3, 4], "cpu"), None, None)
    assert [number() for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize("which", range(3))
def test_lengths_that_changed_in_place_or_are_others_get_a_new_schedule(which: int) -> None:
    lens: list[Tensor | None] = [ints([3, 4], "cpu") for _ in range(3)]
    shared, made = SharedSchedules(), []

    def twice() -> list[int]:
        return [get(shared, "kind", tuple(lens), lambda last: made.append(last) or len(made)) for _ in range(2)]

    assert twice() == [1, 1]
    tensor = lens[which]
    assert tensor is not None
    tensor[0] = 5
    assert twice() == [2, 2]
    lens[which] = tensor.clone()
    assert twice() == [3, 3]
    if which:
        lens[which] = None
        assert twice() == [4, 4]
    assert made == [None, 1, 2, 3][: len(made)], "memory of the last one may be used again"


def test_new_tensors_in_inference_mode_get_a_new_schedule() -> None:
    shared = SharedSchedules()
    with torch.inference_mode():
        for want in (1, 2):
            lens = ints([3, want], "cpu")
            assert [get(shared, "kind", (lens, None, None), lambda last: (last or 0) + 1) for _ in range(2)] == [
                want,
                want,
            ]


def test_what_fails_is_not_kept() -> None:
    shared, lens, other = SharedSchedules(), (ints([3], "cpu"), None, None), (ints([4], "cpu"), None, None)
    assert get(shared, "kind", lens, lambda _: "first") == "first"
    with pytest.raises(ZeroDivisionError):
        get(shared, "kind", other, lambda _: 1 // 0)
    assert get(shared, "kind", lens, lambda last: (last, "second")) == (None, "second"), (
        "its memory may be half written"
    )


def test_kinds_are_kept_apart_and_their_number_is_bounded() -> None:
    shared, lens = SharedSchedules(), (ints([3], "cpu"), None, None)
    for i in range(1, 3 * MOST_KINDS):
        assert get(shared, i, lens, lambda _, i=i: i) == i
        assert get(shared, i, lens, lambda _: "another") == i
        assert len(shared._made) <= MOST_KINDS


def test_a_copy_makes_its_own() -> None:
    shared, number = made_for(ints([3, 4], "cpu"), None, None)
    number()
    assert not copy.deepcopy({"cache": shared})["cache"]._made and shared._made


def queries(batch: Batch, rows: int, seed: int = 0) -> Tensor:
    x = torch.randn(rows, 4, 64, generator=torch.Generator().manual_seed(seed))
    return x.to(batch.pages.device)


@pytest.mark.parametrize("backend", [b for b in BACKENDS_UNDER_TEST if b != "reference"])
def test_layers_share_a_plan_and_steps_do_not(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that cross a block's end, a number of queries, a window and starts; twice each, as of two layers."""
    made = count_plans(backend, monkeypatch)
    batch, shared = batch_of(FMT, LENGTHS, device=device_of(backend)), SharedSchedules()
    device = batch.pages.device
    steps: list[dict[str, Any]] = [
        {"seq_lens": [120, 0, 128]}, {"seq_lens": [130, 0, 129]}, {"seq_lens": [300, 0, 140], "q_lens": [3, 0, 2]},
        {"seq_lens": [300, 0, 140], "q_lens": [1, 0, 4]}, {"seq_lens": [300, 0, 140], "window": 40},
        {"seq_lens": [300, 0, 140]}, {"seq_lens": [300, 0, 140], "seq_starts": [290, 0, 1]},
        {"seq_lens": [300, 0, 140], "seq_starts": [2, 0, 139]}, {"seq_lens": [7, 0, 1]},
    ]  # fmt: skip
    for i, step in enumerate(steps):
        options = {name: ints(x, device) if isinstance(x, list) else x for name, x in step.items()}
        lens = options.pop("seq_lens")
        rows = sum(step.get("q_lens", [1, 1, 1]))
        for layer in range(2):
            q = queries(batch, rows, layer)
            common = {"scale": 0.2, **batch.format_options(), **options}
            got = decode(q, batch.pages, batch.block_table, lens, schedule=shared, backend=backend, **common)
            alone = decode(q, batch.pages, batch.block_table, lens, backend=backend, **common)
            want = decode(q, batch.pages, batch.block_table, lens, backend="reference", **common)
            assert same_bits(got[0], alone[0]) and same_bits(got[1], alone[1])
            assert relative_error(got[0], want[0]) <= 1e-3
        assert len(made) == 3 * (i + 1), "one plan for both layers with shared schedules, one for each without"


def count_plans(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with every plan that is made."""
    made: list[None] = []
    owner, name = (Schedule, "plan_at") if backend == "cuda" else (import_module("kvturbo.ops.decode.triton"), "plan")
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: made.append(None) or real(*args, **options))
    return made
