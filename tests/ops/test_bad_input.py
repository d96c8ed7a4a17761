"""What is wrong with an argument is said in the error, with its value, and nothing has been written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.ops import backends, decode, gather, prefix_attention, store
from support import Batch, batch_of, ints, same_bits

Change = dict[str, Any]
FMT = KVFormat.from_name("k4v4", 64)
OUTLIERS = KVFormat.from_name("k4v4-o16", 64)


@pytest.fixture
def batch() -> Batch:
    return batch_of(FMT, [20, 33])


def store_arguments(batch: Batch) -> Change:
    k, v = torch.randn(2, 3, 2, 64)
    return {"k": k, "v": v, "pages": batch.pages, "slot_mapping": torch.tensor([1, -1, 5]), "fmt": batch.fmt}


def decode_arguments(batch: Batch) -> Change:
    return {
        "q": torch.randn(2, 4, 64), "pages": batch.pages, "block_table": batch.block_table,
        "seq_lens": batch.seq_lens, "fmt": batch.fmt, "scale": 0.1,
    }  # fmt: skip


def gather_arguments(batch: Batch) -> Change:
    table = batch.block_table[:, :2]
    return {"pages": batch.pages, "block_table": table, "start": 3, "stop": 20, "fmt": batch.fmt}


def prefix_arguments(batch: Batch) -> Change:
    arguments = decode_arguments(batch)
    k, v = torch.randn(2, 2, 2, 64)
    return arguments | {"k": k, "v": v, "prefix_lens": arguments.pop("seq_lens"), "q_lens": ints([1, 1], "cpu")}


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[[Batch], Change]]] = {
    "store": (store, store_arguments),
    "decode": (decode, decode_arguments),
    "gather": (gather, gather_arguments),
    "prefix": (prefix_attention, prefix_arguments),
}


def refused(operation: str, batch: Batch, change: Change, message: str, error: type[Exception] = ValueError) -> None:
    function, arguments = OPERATIONS[operation]
    function(**arguments(batch))  # without the change it works
    before = batch.pages.clone()
    out = change.get("out")
    with pytest.raises(error, match=message):
        function(**arguments(batch) | change)
    assert same_bits(before, batch.pages), "something was written"
    for x in (out,) if isinstance(out, Tensor) else out or ():
        assert x.dtype == torch.int32 or (x == 7).all(), "something was written"


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


BAD_PAGES: list[tuple[str, Change]] = [
    (
        "pages must be uint8 [num_pages, num_kv_heads, page_bytes], got torch.int8",
        {"pages": torch.zeros(4, 2, 2112).char()},
    ),
    ("got torch.uint8 [4, 2112]", {"pages": torch.zeros(4, 2112).byte()}),
    (
        "1088 (page_size 16), 2176 (page_size 32), 4352 (page_size 64) bytes per head, got 1000",
        {"pages": torch.zeros(4, 2, 1000).byte()},
    ),
    ("bytes per head, got 0", {"pages": torch.zeros(4, 2, 0).byte()}),
    ("at least 1 KV head, got [4, 0, 1088]", {"pages": torch.zeros(4, 0, 1088).byte()}),
    ("must be contiguous, got strides (4352, 2176, 1)", {"pages": torch.zeros(4, 2, 2176).byte()[..., :1088]}),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("message,change", BAD_PAGES, ids=range(len(BAD_PAGES)))
def test_pages_that_are_none(batch: Batch, operation: str, message: str, change: Change) -> None:
    refused(operation, batch, change, re.escape(message))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_name_in_place_of_a_format(batch: Batch, operation: str) -> None:
    refused(operation, batch, {"fmt": "k4v4"}, "fmt must be a KVFormat such as .*, got 'k4v4'")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_unknown_backend(batch: Batch, operation: str) -> None:
    names = ", ".join(backends.BACKENDS)
    refused(operation, batch, {"backend": "cudnn"}, f"'auto' or one of {names}, got 'cudnn'")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_outlier_channels(operation: str) -> None:
    batch = batch_of(OUTLIERS, [20, 33])
    function, arguments = OPERATIONS[operation]
    good = {"outlier_channels": batch.channels}
    before = batch.pages.clone()
    for channels, message in [
        (None, r"'k4v4-o16' needs outlier_channels \[2, 16\], got None"),
        (torch.zeros(2, 15, dtype=torch.int64), r"must be torch.int64 \[2, 16\], got torch.int64 \[2, 15\]"),
        (torch.zeros(2, 16, dtype=torch.int32), r"must be torch.int64 \[2, 16\], got torch.int32"),
        (torch.full((2, 16), 64), "must be distinct and from 0 to 63, got"),
        (torch.zeros(2, 16, dtype=torch.int64), "must be distinct and from 0 to 63, got"),
        (meta(2, 16).long(), "outlier_channels must be on cpu, got meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(**arguments(batch) | good | {"outlier_channels": channels})
    assert same_bits(before, batch.pages)


STORE: dict[str, tuple[str, Change]] = {
    "k-shape": ("k must be [tokens, heads, 64] for 'k4v4', got [3, 2, 32]", {"k": torch.zeros(3, 2, 32)}),
    "k-dims": ("k must be [tokens, heads, 64] for 'k4v4', got [3, 128]", {"k": torch.zeros(3, 128)}),
    "k-device": ("k must be on the pages' device cpu, got meta", {"k": meta(3, 2, 64)}),
    "v-tokens": ("must both be [T, 2, d], got [3, 2, 64] and [2, 2, 64]", {"v": torch.zeros(2, 2, 64)}),
    "heads": ("must both be [T, 2, d]", {"k": torch.zeros(3, 4, 64), "v": torch.zeros(3, 4, 64)}),
    "slots-dtype": (
        "slot_mapping must be torch.int64 [3], got torch.int32 [3]",
        {"slot_mapping": ints([1, 2, 3], "cpu")},
    ),
    "slots-count": (
        "slot_mapping must be torch.int64 [3], got torch.int64 [2]",
        {"slot_mapping": torch.tensor([1, 2])},
    ),
    "slot-high": ("slot_mapping must be from -1 to 111, got 112", {"slot_mapping": torch.tensor([1, 112, 2])}),
    "slot-low": ("slot_mapping must be from -1 to 111, got -2", {"slot_mapping": torch.tensor([1, -2, 2])}),
}


@pytest.mark.parametrize("message,change", STORE.values(), ids=STORE.keys())
def test_store(batch: Batch, message: str, change: Change) -> None:
    refused("store", batch, change, re.escape(message))


def rings(*shape: int) -> Change:
    """Rings that a store fills, of the shape [2, 2, 2, 8, 64] if none is given."""
    return {"recent_rows": torch.full(shape or (2, 2, 2, 8, 64), 7.0), "recent_slots": torch.tensor([3, -1, 15])}


RINGS: dict[str, tuple[str, Change]] = {
    "no-slots": ("give both or none, got recent_rows without recent_slots", {"recent_slots": None}),
    "no-rows": ("give both or none, got recent_slots without recent_rows", {"recent_rows": None}),
    "rows-dtype": (
        "recent_rows must be torch.float32 [any, 2, 2, any, 64], got torch.float16 [2, 2, 2, 8, 64]",
        {"recent_rows": torch.full((2, 2, 2, 8, 64), 7.0).half()},
    ),
    "rows-heads": ("recent_rows must be torch.float32 [any, 2, 2, any, 64], got torch.float32 [2, 4,", rings(2, 4, 2, 8, 64)),
    "rows-dims": ("[any, 2, 2, any, 64], got torch.float32 [2, 2, 8, 64]", rings(2, 2, 8, 64)),
    "ring-size": ("recent_rows must hold 8, 16, 32 tokens per ring, got 12 ([2, 2, 2, 12, 64])", rings(2, 2, 2, 12, 64)),
    "rows-strides": (
        "recent_rows must be contiguous, got strides (4096, 2048, 1024, 64, 1)",
        {"recent_rows": torch.full((2, 2, 2, 16, 64), 7.0)[:, :, :, :8]},
    ),
    "rows-device": ("recent_rows must be on cpu, got meta", {"recent_rows": meta(2, 2, 2, 8, 64)}),
    "slots-dtype": (
        "recent_slots must be torch.int64 [3], got torch.int32 [3]",
        {"recent_slots": ints([1, 2, 3], "cpu")},
    ),
    "slots-count": ("recent_slots must be torch.int64 [3], got torch.int64 [2]", {"recent_slots": torch.tensor([1, 2])}),
    "slot-high": ("recent_slots must be from -1 to 15, got 16", {"recent_slots": torch.tensor([1, 16, 2])}),
    "slot-low": ("recent_slots must be from -1 to 15, got -2", {"recent_slots": torch.tensor([1, -2, 2])}),
    "v-dtype": (
        "k and v must have one dtype to go into recent_rows, got torch.float32 and torch.float16",
        {"v": torch.zeros(3, 2, 64).half()},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message,change", RINGS.values(), ids=RINGS.keys())
def test_rings_of_a_store(batch: Batch, message: str, change: Change) -> None:
    good = rings()
    store(**store_arguments(batch) | good)
    change = rings() | change
    refused("store", batch, change, re.escape(message))
    rows = change["recent_rows"]
    assert rows is None or rows.is_meta or (rows == 7).all(), "something was written"


@pytest.mark.parametrize("operation,name", [("store", "k"), ("store", "v"), ("decode", "q"), ("prefix", "k")])
def test_vectors_that_are_not_floating_point(batch: Batch, operation: str, name: str) -> None:
    x = torch.zeros(3, 2, 64, dtype=torch.int32)
    refused(operation, batch, {name: x}, f"{name} must be one of .*bfloat16.*, got torch.int32", TypeError)


COMMON: dict[str, tuple[str, Change]] = {
    "q-shape": ("q must be [tokens, heads, 64] for 'k4v4', got [2, 4, 80]", {"q": torch.zeros(2, 4, 80)}),
    "q-device": ("q must be on the pages' device cpu, got meta", {"q": meta(2, 4, 64)}),
    "q-heads": ("query heads must be a multiple of the 2 KV heads, got 5", {"q": torch.zeros(2, 5, 64)}),
    "no-q-heads": ("query heads must be a multiple of the 2 KV heads, got 0", {"q": torch.zeros(2, 0, 64)}),
    "table-dtype": (
        "block_table must be torch.int32 [any, any], got torch.int64 [2, 4]",
        {"block_table": torch.zeros(2, 4).long()},
    ),
    "page-low": ("block_table must be from 0 to 6, got -1", {"block_table": torch.full((2, 4), -1, dtype=torch.int32)}),
    "page-high": ("block_table must be from 0 to 6, got 7", {"block_table": torch.full((2, 4), 7, dtype=torch.int32)}),
    "starts-dtype": ("seq_starts must be torch.int32 [2], got torch.int64 [2]", {"seq_starts": torch.tensor([0, 0])}),
    "starts-count": ("seq_starts must be torch.int32 [2], got torch.int32 [1]", {"seq_starts": ints([0], "cpu")}),
    "starts-low": ("seq_starts must be from 0 to 2147483647, got -3", {"seq_starts": ints([0, -3], "cpu")}),
    "window": ("window must be at least 1, got -5", {"window": -5}),
    "window-fraction": ("window must be a whole number, got 1.5", {"window": 1.5}),
    "no-window": ("window must be at least 1, got 0", {"window": 0}),
    "soft-cap": ("soft_cap must be positive, got 0", {"soft_cap": 0.0}),
    "soft-cap-nan": ("soft_cap must be positive, got nan", {"soft_cap": float("nan")}),
    "sinks-shape": ("sinks must be torch.float32 [4], got torch.float32 [2]", {"sinks": torch.zeros(2)}),
    "sinks-dtype": ("sinks must be torch.float32 [4], got torch.float64 [4]", {"sinks": torch.zeros(4).double()}),
}


@pytest.mark.parametrize("operation", ["decode", "prefix"])
@pytest.mark.parametrize("message,change", COMMON.values(), ids=COMMON.keys())
def test_decode_and_prefix_attention(batch: Batch, operation: str, message: str, change: Change) -> None:
    refused(operation, batch, change, re.escape(message))


LENGTHS = {
    "dtype": ("must be torch.int32 [2], got torch.int64 [2]", torch.tensor([1, 1])),
    "count": ("must be torch.int32 [2], got torch.int32 [3]", ints([1, 1, 1], "cpu")),
    "longer-than-its-pages": ("must be from 0 to 64, got 65", ints([65, 3], "cpu")),
    "negative": ("must be from 0 to 64, got -1", ints([5, -1], "cpu")),
}


@pytest.mark.parametrize("operation,name", [("decode", "seq_lens"), ("prefix", "prefix_lens")])
@pytest.mark.parametrize("message,lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_lengths(batch: Batch, operation: str, name: str, message: str, lengths: Tensor) -> None:
    refused(operation, batch, {name: lengths}, re.escape(f"{name} {message}"))


DECODE: dict[str, tuple[str, Change]] = {
    "rows": ("q must have one row per sequence (2) without q_lens, got 3", {"q": torch.zeros(3, 4, 64)}),
    "q-lens-high": ("q_lens must be from 0 to 8, got 9", {"q_lens": ints([1, 9], "cpu")}),
    "q-lens-low": ("q_lens must be from 0 to 8, got -1", {"q_lens": ints([1, -1], "cpu")}),
    "q-lens-sum": ("q_lens sum to 3, q has 2 rows", {"q_lens": ints([1, 2], "cpu")}),
    "q-lens-dtype": ("q_lens must be torch.int32 [2], got torch.int64 [2]", {"q_lens": torch.tensor([1, 1])}),
    "q-lens-above": (
        "q_lens must not be above seq_lens, got [0, 2] and [20, 1]",
        {"q_lens": ints([0, 2], "cpu"), "seq_lens": ints([20, 1], "cpu")},
    ),
    "out-shape": (
        "out must be floating point [2, 4, 64] on cpu, got torch.float32 [2, 4, 32]",
        {"out": torch.full((2, 4, 32), 7.0)},
    ),
    "out-dtype": (
        "out must be floating point [2, 4, 64] on cpu, got torch.int32",
        {"out": torch.zeros(2, 4, 64).int()},
    ),
}


@pytest.mark.parametrize("message,change", DECODE.values(), ids=DECODE.keys())
def test_decode(batch: Batch, message: str, change: Change) -> None:
    refused("decode", batch, change, re.escape(message))


def test_decode_writes_nothing_into_out_when_it_refuses(batch: Batch) -> None:
    out = torch.full((2, 4, 64), 7.0)
    refused("decode", batch, {"out": out, "seq_lens": ints([5, 70], "cpu")}, "seq_lens must be from 0 to 64, got 70")


GATHER: dict[str, tuple[str, Change]] = {
    "backwards": ("0 <= start <= stop <= 32, got start 9, stop 8", {"start": 9, "stop": 8}),
    "below": ("0 <= start <= stop <= 32, got start -1, stop 8", {"start": -1, "stop": 8}),
    "beyond": ("0 <= start <= stop <= 32, got start 0, stop 33", {"stop": 33, "start": 0}),
    "page": ("block_table must be from 0 to 6, got 7", {"block_table": ints([0, 7], "cpu")[None]}),
    "table": ("block_table must be torch.int32 [any, any], got torch.int32 [2]", {"block_table": ints([0, 1], "cpu")}),
    "out": (
        "out[1] must be floating point [2, 17, 2, 64] on cpu, got torch.float32 [2, 17, 64]",
        {"out": (torch.full((2, 17, 2, 64), 7.0), torch.full((2, 17, 64), 7.0))},
    ),
    "dtype": ("out[0] must be floating point [2, 17, 2, 64] on cpu, got torch.int32", {"dtype": torch.int32}),
}


@pytest.mark.parametrize("message,change", GATHER.values(), ids=GATHER.keys())
def test_gather(batch: Batch, message: str, change: Change) -> None:
    refused("gather", batch, change, re.escape(message))


PREFIX: dict[str, tuple[str, Change]] = {
    "q-lens-sum": ("sum to the 2 rows of q, got [1, 3]", {"q_lens": ints([1, 3], "cpu")}),
    "q-lens-low": (
        "q_lens must not be negative and sum to the 2 rows of q, got [3, -1]",
        {"q_lens": ints([3, -1], "cpu")},
    ),
    "k-rows": ("k and v must both be [2, 2, 64], got [3, 2, 64] and [2, 2, 64]", {"k": torch.zeros(3, 2, 64)}),
    "kv-heads": (
        "k and v must both be [2, 2, 64], got [2, 4, 64]",
        {"k": torch.zeros(2, 4, 64), "v": torch.zeros(2, 4, 64)},
    ),
}


@pytest.mark.parametrize("message,change", PREFIX.values(), ids=PREFIX.keys())
def test_prefix_attention(batch: Batch, message: str, change: Change) -> None:
    refused("prefix", batch, change, re.escape(message))


def test_backends_name_what_there_is() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="operation must be one of store, decode, gather, got 'attend'"):
        backends.unavailable("reference", "attend", cpu, FMT)
    assert backends.choose("auto", "decode", cpu, FMT) == "reference"
    assert backends.unavailable("reference", "decode", cpu, KVFormat.from_name("qjl3", 128)) is None
