"""Calls that have been checked are not checked again; any that differs in what the checks look at is.

Tensors are on the meta device, where, as on a GPU, no value is looked at; a backend that only writes down its calls stands in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.ops import backends, calls, checks, decode, store
from support import batch_of

Arguments = dict[str, Any]
FMT = KVFormat.from_name("k4v4-o16", 64)
BATCH, HEADS, GROUP, PAGES = 2, 2, 2, 5


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.int32)


def pages() -> Tensor:
    return meta(PAGES, HEADS, FMT.page_bytes(32), dtype=torch.uint8)


def channels() -> Tensor:
    return meta(HEADS, 16, dtype=torch.int64)


def decode_arguments() -> Arguments:
    return {
        "q": meta(BATCH, HEADS * GROUP, 64), "pages": pages(), "block_table": ints(BATCH, 7), "seq_lens": ints(BATCH), "fmt": FMT,
        "scale": 0.1, "q_lens": ints(BATCH), "seq_starts": ints(BATCH), "window": 9, "soft_cap": 2.0,
        "sinks": meta(HEADS * GROUP, dtype=torch.float32), "outlier_channels": channels(), "out": meta(BATCH, HEADS * GROUP, 64),
    }  # fmt: skip


def store_arguments() -> Arguments:
    k, v = meta(3, HEADS, 64), meta(3, HEADS, 64)
    slots = meta(3, dtype=torch.int64)
    return {
        "k": k, "v": v, "pages": pages(), "slot_mapping": slots, "fmt": FMT, "outlier_channels": channels(),
        "recent_rows": meta(4, HEADS, 2, 16, 64), "recent_slots": meta(3, dtype=torch.int64),
    }  # fmt: skip


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "decode": (decode, decode_arguments),
    "store": (store, store_arguments),
}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    """The calls that reached a backend; nothing that another test has left behind is known."""
    seen: list[Arguments] = []

    def record(*args: Any, **options: Any) -> str:
        seen.append({"args": args, **options})
        return "lse"

    monkeypatch.setattr(backends, "load", lambda *_: record)
    for function, _ in OPERATIONS.values():
        monkeypatch.setitem(function.__globals__, "_CHECKED", calls.CheckedCalls())
    return seen


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are checked."""
    names: list[str] = []
    check = checks.check_tensor

    def counted(name: str, *args: Any) -> None:
        names.append(name)
        check(name, *args)

    monkeypatch.setattr(checks, "check_tensor", counted)
    return names


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_call_like_one_before_reaches_the_backend_unchecked_with_its_own_tensors(
    operation: str, stand_in: list[Arguments], checked: list[str]
) -> None:
    function, arguments = OPERATIONS[operation]
    function(**arguments())
    first = len(checked)
    assert first > 0
    own = arguments()
    result = function(**own)
    assert len(checked) == first, "a second call is not checked"
    given = [x for x in own.values() if isinstance(x, Tensor)]
    passed = [*stand_in[1].pop("args"), *stand_in[1].values()]
    assert {id(x) for x in given} == {id(x) for x in passed if isinstance(x, Tensor)}
    if operation == "decode":
        assert result[0] is own["out"] and result[1] == "lse"
    numbers = {name: own[name] for name in ("scale", "window", "soft_cap", "fmt") if name in own}
    assert numbers.items() <= stand_in[1].items()


def bad(operation: str) -> dict[str, tuple[str, Arguments]]:
    """What is wrong in a call, and the error it must get however often a good one came before."""
    changes: dict[str, tuple[str, Arguments]] = {
        "pages-dtype": ("pages must be uint8", {"pages": pages().char()}),
        "pages-bytes": ("bytes per head, got 100", {"pages": meta(PAGES, HEADS, 100, dtype=torch.uint8)}),
        "pages-gap": ("must be contiguous, got strides", {"pages": pages()[:, :1].expand(PAGES, HEADS, -1)}),
        "no-channels": ("needs outlier_channels", {"outlier_channels": None}),
        "channels-dtype": ("outlier_channels must be torch.int64", {"outlier_channels": channels().int()}),
        "channels-device": (
            "outlier_channels must be on meta, got cpu",
            {"outlier_channels": torch.arange(16).expand(HEADS, 16).contiguous()},
        ),
        "format": ("bytes per head, got", {"fmt": KVFormat.from_name("k4v4", 64)}),
        "backend": ("backend must be 'auto' or one of", {"backend": "cudnn"}),
    }  # fmt: skip
    if operation == "store":
        return changes | {
            "k-dtype": ("k must be one of", {"k": meta(3, HEADS, 64).int()}),
            "k-tokens": ("k and v must both be", {"k": meta(4, HEADS, 64)}),
            "k-device": ("k must be on the pages' device", {"k": torch.zeros(3, HEADS, 64, dtype=torch.float16)}),
            "v-heads": ("k and v must both be", {"v": meta(3, 3, 64)}),
            "slots-dtype": ("slot_mapping must be torch.int64", {"slot_mapping": ints(3)}),
            "slots-count": ("slot_mapping must be torch.int64", {"slot_mapping": meta(4, dtype=torch.int64)}),
            "no-rings": ("got recent_slots without recent_rows", {"recent_rows": None}),
            "rings-dtype": ("recent_rows must be torch.float16", {"recent_rows": meta(4, HEADS, 2, 16, 64).float()}),
            "ring-size": ("must hold 8, 16, 32 tokens per ring, got 4", {"recent_rows": meta(4, HEADS, 2, 4, 64)}),
            "no-places": ("got recent_rows without recent_slots", {"recent_slots": None}),
            "places-dtype": ("recent_slots must be torch.int64", {"recent_slots": ints(3)}),
            "places-count": ("recent_slots must be torch.int64", {"recent_slots": meta(2, dtype=torch.int64)}),
        }
    return changes | {
        "q-dtype": ("q must be one of", {"q": meta(BATCH, 4, 64).int()}),
        "q-heads": ("query heads must be a multiple", {"q": meta(BATCH, 5, 64)}),
        "q-dim": ("q must be", {"q": meta(BATCH, 4, 80)}),
        "q-rows": ("q must have one row per sequence", {"q": meta(5, 4, 64), "q_lens": None, "out": None}),
        "q-device": ("q must be on the pages' device", {"q": torch.zeros(BATCH, 4, 64, dtype=torch.float16)}),
        "table-dtype": ("block_table must be torch.int32", {"block_table": ints(BATCH, 7).long()}),
        "table-rows": ("seq_lens must be torch.int32", {"block_table": ints(3, 7)}),
        "lens-count": ("seq_lens must be torch.int32", {"seq_lens": ints(3)}),
        "lens-device": ("seq_lens must be on meta, got cpu", {"seq_lens": torch.ones(BATCH, dtype=torch.int32)}),
        "q-lens-dtype": ("q_lens must be torch.int32", {"q_lens": ints(BATCH).long()}),
        "starts-count": ("seq_starts must be torch.int32", {"seq_starts": ints(1)}),
        "sinks-dtype": ("sinks must be torch.float32", {"sinks": meta(4)}),
        "sinks-count": ("sinks must be torch.float32", {"sinks": meta(2, dtype=torch.float32)}),
        "scale": ("scale must be positive, got -0.1", {"scale": -0.1}),
        "scale-nan": ("scale must be positive, got nan", {"scale": float("nan")}),
        "window": ("window must be at least 1, got 0", {"window": 0}),
        "soft-cap": ("soft_cap must be positive, got 0", {"soft_cap": 0.0}),
        "out-shape": ("out must be floating point", {"out": meta(BATCH, 4, 32)}),
        "out-dtype": ("out must be floating point", {"out": ints(BATCH, 4, 64)}),
        "out-device": ("out must be floating point", {"out": torch.zeros(BATCH, 4, 64)}),
    }


CASES = [(operation, name) for operation in OPERATIONS for name in bad(operation)]


@pytest.mark.parametrize("operation,name", CASES, ids=lambda x: x)
def test_a_bad_call_after_good_ones_gets_its_error_and_nothing_runs(
    operation: str, name: str, stand_in: list[Arguments]
) -> None:
    function, arguments = OPERATIONS[operation]
    message, change = bad(operation)[name]
    for _ in range(2):
        function(**arguments())
    for _ in range(2):  # a bad call is not remembered either
        with pytest.raises((ValueError, TypeError), match=message):
            function(**arguments() | change)
    assert len(stand_in) == 2


def test_numbers_that_differ_reach_the_backend(stand_in: list[Arguments]) -> None:
    options: list[Arguments] = [
        {},
        {"scale": 0.2},
        {"window": None},
        {"window": 10},
        {"soft_cap": None},
        {"soft_cap": 3.0},
    ]
    for change in options + options:
        decode(**decode_arguments() | change)
    names = ("scale", "window", "soft_cap")
    for change, got in zip(options + options, stand_in, strict=True):
        assert {name: got[name] for name in names} == {n: (decode_arguments() | change)[n] for n in names}


def test_a_scale_in_a_tensor_is_read_in_every_call(stand_in: list[Arguments]) -> None:
    scale = torch.tensor(0.1)
    decode(**decode_arguments() | {"scale": scale})
    scale.fill_(-1)
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        decode(**decode_arguments() | {"scale": scale})


def test_values_on_the_host_are_looked_at_in_every_call() -> None:
    fmt = KVFormat.from_name("k4v4", 64)
    batch = batch_of(fmt, [20, 33])
    q, options = torch.randn(2, 4, 64), {"fmt": fmt, "scale": 0.1}
    decode(q, batch.pages, batch.block_table, batch.seq_lens, **options)
    batch.seq_lens[1] = 1000
    with pytest.raises(ValueError, match="seq_lens must be from 0 to 64, got 1000"):
        decode(q, batch.pages, batch.block_table, batch.seq_lens, **options)


def test_only_so_many_kinds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST_KINDS", 3)
    known: calls.CheckedCalls[int] = calls.CheckedCalls()
    for i in range(10):
        known.remember(i, i, torch.device("meta"))
        assert known.get(i) == i and len(known._runs) <= 3
