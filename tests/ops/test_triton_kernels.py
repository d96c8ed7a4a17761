"""What the Triton kernels rest on: addresses in a page, tables of levels, the schedule; and that they compile for a GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvturbo import KVFormat
from kvturbo.codebook import CODEBOOKS
from kvturbo.config import HEAD_DIMS
from kvturbo.layout import bit_positions, word_order
from kvturbo.ops import backends, decode
from kvturbo.ops.recent import Recent
from kvturbo.ops.schedule import BLOCK, Schedule, plan
from kvturbo.rotation import rotate
from support import batch_of, ints

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

common = import_module("kvturbo.ops.triton_common")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = [(d, (16, 32, 64)[i % 3]) for i, d in enumerate(HEAD_DIMS)] + [(128, 32), (80, 32), (112, 64), (192, 64)]


@triton.jit
def key_addresses(words, shifts, WIDTH: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    slot, u = tl.arange(0, P)[:, None], tl.arange(0, 4 * SP)[None, :]
    word, shift = common.key_word(slot, u, WIDTH, SP, D, P)
    tl.store(words + slot * 4 * SP + u, word)
    tl.store(shifts + slot * 4 * SP + u, shift + word * 0)


@triton.jit
def value_addresses(words, shifts, WIDTH: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, P: tl.constexpr):
    octet, column = tl.arange(0, P // 8)[:, None], tl.arange(0, DV)[None, :]
    word, shift = common.value_word(octet, column, WIDTH, D, P)
    tl.store(words + octet * DV + column, word)
    tl.store(shifts + octet * DV + column, shift + word * 0)


@triton.jit
def levels_of(words, out, BITS: tl.constexpr):
    n = tl.arange(0, 16)
    word = tl.load(words + n)
    for e in tl.static_range(8):
        tl.store(out + n * 8 + e, common.level(word, word, e, BITS))


def addresses(kernel: Any, rows: int, columns: int, *constants: int) -> tuple[np.ndarray, np.ndarray]:
    words, shifts = (torch.zeros(rows, columns, dtype=torch.int32, device=DEVICE) for _ in range(2))
    kernel[(1,)](words, shifts, *constants)
    return words.cpu().numpy(), shifts.cpu().numpy()


@pytest.mark.parametrize(
    "d,page_size,width", [(*layout, width) for layout in LAYOUTS for width in (1, 2, 4, 8)] + [(16, 16, 8), (32, 64, 8)]
)
def test_key_words_are_where_the_layout_puts_them(d: int, page_size: int, width: int) -> None:
    sp = common.steps_padded(d)
    words, shifts = addresses(key_addresses, page_size, 4 * sp, width, sp, d, page_size)
    u, e = np.nonzero(common.unit_channels(d) >= 0)
    half = u % sp == d // 32
    slot = np.arange(page_size)[:, None]
    order = word_order("k", width, d, page_size)[slot, common.unit_channels(d)[u, e]]
    word, element = order // (32 // width), order % (32 // width)
    if width == 8:
        np.testing.assert_array_equal(word, words[slot, u] + np.where(half, 0, e // 4))
        np.testing.assert_array_equal(element, np.broadcast_to(e % 4, element.shape))
    elif width == 4:
        np.testing.assert_array_equal(word, words[slot, u])
        np.testing.assert_array_equal(element, e + 4 * (half & (slot // 2 % 2 == 1)))
    else:
        np.testing.assert_array_equal(word, words[slot, u])
        np.testing.assert_array_equal(bit_positions(width)[element, 0], 4 * e + shifts[slot, u])


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("d,page_size", LAYOUTS)
def test_value_words_are_where_the_layout_puts_them(d: int, page_size: int, width: int) -> None:
    channels = common.column_channels(d)
    words, shifts = addresses(value_addresses, page_size // 8, len(channels), width, d, len(channels), page_size)
    column = np.nonzero(channels >= 0)[0]
    assert sorted(channels[column]) == list(range(d))
    slot = np.arange(page_size)[:, None]
    order = word_order("v", width, d, page_size)[slot, channels[column]]
    word, element = order // (32 // width), order % (32 // width)
    np.testing.assert_array_equal(word, words[slot // 8, column])
    if width == 4:
        np.testing.assert_array_equal(element, np.broadcast_to(slot % 8, element.shape))
    else:
        np.testing.assert_array_equal(bit_positions(width)[element, 0], 4 * (slot % 8) + shifts[slot // 8, column])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_code_becomes_its_level(bits: int) -> None:
    codes = np.arange(128).reshape(16, 8) % (1 << bits)
    words = np.zeros(16, dtype=np.uint32)
    for e in range(8):
        at = bit_positions(4)[e] if bits == 4 else 4 * e + np.arange(bits)
        for j, bit in enumerate(at):
            words |= ((codes[:, e] >> j & 1) << int(bit)).astype(np.uint32)
    out = torch.zeros(16, 8, device=DEVICE)
    levels_of[(1,)](torch.from_numpy(words.view(np.int32)).to(DEVICE).view(torch.uint32), out, bits)
    wanted = np.array(CODEBOOKS[bits].levels)[codes] / CODEBOOKS[bits].T
    np.testing.assert_allclose(out.cpu().numpy() * common.UNITS[bits], wanted, rtol=1e-6)
    assert torch.equal(out.bfloat16().float(), out), "levels must be exact in bfloat16"


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_rotation_matrices_rotate(d: int, side: Any) -> None:
    matrix = common.rotation_matrix(d, 7, side, True, torch.device("cpu")).float()
    places = common.key_places(d) if side == "k" else common.column_channels(d)
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(0))
    y = x @ matrix.T * common.norm(d, True)
    torch.testing.assert_close(y[:, places >= 0], rotate(x, 7)[:, places[places >= 0]], rtol=1e-5, atol=1e-5)
    assert (y[:, places < 0] == 0).all()


def pieces(schedule: Schedule, workers: int) -> dict[int, list[tuple[int, int, int]]]:
    """(worker, first block, end) of every sequence, by the rule that the kernels follow: equal runs of one line of blocks."""
    blocks = schedule.blocks.tolist()
    per = -(-blocks[-1] // workers)
    found: dict[int, list[tuple[int, int, int]]] = {}
    for b, (start, stop) in enumerate(itertools.pairwise(blocks)):
        for worker in range(workers):
            low, high = max(start, worker * per), min(stop, (worker + 1) * per)
            if low < high:
                found.setdefault(b, []).append((worker, low - start, high - start))
    return found


@given(data=st.data())
def test_the_schedule_covers_what_queries_see_once_and_slots_of_splits_differ(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 6), label="batch")
    lengths = data.draw(st.lists(st.integers(0, 3000), min_size=batch, max_size=batch), label="lengths")
    q_lens = [data.draw(st.integers(0, min(8, length)), label="q_len") for length in lengths]
    starts = [data.draw(st.integers(0, length + 300), label="start") for length in lengths]
    window = data.draw(st.none() | st.integers(1, 1000), label="window")
    workers = data.draw(st.integers(1, 9), label="workers")
    tensors = {"q_lens": ints(q_lens, "cpu"), "seq_starts": ints(starts, "cpu")}
    schedule = plan(torch.tensor(lengths, dtype=torch.int32), window=window, **tensors)
    found = pieces(schedule, workers)
    slots = [worker + b for b, parts in found.items() for worker, _, _ in parts]
    assert len(slots) == len(set(slots)) and max(slots, default=0) < workers + batch
    for b, (length, n, start) in enumerate(zip(lengths, q_lens, starts, strict=True)):
        covered = [block for _, low, high in found.get(b, []) for block in range(low, high)]
        assert covered == list(range(len(covered)))
        first = max(start, 0 if window is None else length - n - window + 1)
        seen = range(first // BLOCK, -(-length // BLOCK)) if n else range(0)
        assert len(covered) >= len(seen)
        assert len(covered) == (len(seen) if first < length else len(covered))


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    fmt = KVFormat.from_name("k4v4", 64)
    batch = batch_of(fmt, [20, 33], device=DEVICE)
    q = torch.zeros(2, 2, 64, device=DEVICE)
    args = (q, batch.pages, batch.block_table, batch.seq_lens)
    options: dict[str, Any] = {"fmt": fmt, "scale": 0.1, "backend": "triton"}
    for lens, window, message in ((batch.seq_lens[:1], None, "1 sequences, got 2"), (batch.seq_lens, 5, "window 5")):
        with pytest.raises(ValueError, match=message):
            decode(*args, schedule=plan(lens, window=window), **options)
    with pytest.raises(ValueError, match="planned with q_lens"):
        decode(*args, schedule=plan(batch.seq_lens, q_lens=ints([1, 1], DEVICE)), **options)
    with pytest.raises(TypeError, match="schedule must be a kvturbo.ops.schedule.Schedule, got list"):
        decode(*args, schedule=[1], **options)
    with pytest.raises(ValueError, match="max_q_len must be from 1 to 8, got 9"):
        plan(batch.seq_lens, max_q_len=9)
    with_schedule, without = (decode(*args, schedule=s, **options)[0] for s in (plan(batch.seq_lens), None))
    assert torch.equal(with_schedule, without)


def test_the_backend_says_why_it_can_not_run() -> None:
    meta, fmt = torch.device("meta"), KVFormat.from_name("qjl3", 128)
    assert "'qjl3' is not among its formats" in str(backends.unavailable("triton", "decode", meta, fmt))
    with pytest.raises(ValueError, match="backend 'triton' can't run decode: format 'tq2.5'"):
        backends.choose("triton", "decode", torch.device("cpu"), KVFormat.from_name("tq2.5", 64))
    assert backends.choose("auto", "store", torch.device("cpu"), KVFormat.from_name("k4v4", 64)) == "reference"


def test_misaligned_pages_are_refused() -> None:
    fmt = KVFormat.from_name("k4v4", 64)
    room = torch.zeros(2 * fmt.page_bytes(16) + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 16 + 4
    pages = room[start : start + 2 * fmt.page_bytes(16)].view(2, 1, -1)
    store = import_module("kvturbo.ops.store.triton").store
    with pytest.raises(ValueError, match="pages must start at a multiple of 16 bytes"):
        store(torch.zeros(1, 1, 64), torch.zeros(1, 1, 64), pages, torch.tensor([0]), fmt=fmt)


def test_rings_that_the_kernels_cannot_take_are_refused() -> None:
    fmt = KVFormat.from_name("k4v4", 64)
    batch = batch_of(fmt, [20], heads=1, device=DEVICE)
    rows = torch.zeros(2 * 8 * 64 + 1, device=DEVICE)[1:].view(1, 1, 2, 8, 64)
    k, slots, before = torch.zeros(1, 1, 64, device=DEVICE), torch.tensor([0], device=DEVICE), batch.pages.clone()
    store, message = (
        import_module("kvturbo.ops.store.triton").store,
        "rows must start at a multiple of 16 bytes, got address 0x",
    )
    with pytest.raises(ValueError, match=message):
        store(k, k, batch.pages, slots, fmt=fmt, recent_rows=rows, recent_slots=slots)
    with pytest.raises(TypeError, match="bf16, fp16 or fp32 for the triton backend, got torch.float64"):
        store(k.double(), k.double(), batch.pages, slots, fmt=fmt, recent_rows=rows.double(), recent_slots=slots)
    recent = Recent(rows, ints([0], DEVICE), ints([1], DEVICE))
    with pytest.raises(ValueError, match=message):
        decode(k, batch.pages, batch.block_table, batch.seq_lens, fmt=fmt, scale=1.0, recent=recent, backend="triton")
    assert torch.equal(before, batch.pages) and not rows.any()


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """Triton's interpreter takes programs that its compiler refuses, so some of each kernel are compiled too."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).parent / "compile_for_gpu.py"
    result = subprocess.run(
        [sys.executable, script, "90", "k4v4:128:16", "k3v2-o16:80:32"], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 2 * 12
    for kernel in kernels:
        assert kernel["shared"] <= 100 * 1024, kernel
        assert kernel["stack"] <= 128, kernel
