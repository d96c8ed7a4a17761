"""The GPU backends at real shapes: against float64 attention over the same packed cache, in graphs, and their memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_cases import Cache, cache_of, check, queries, run, vectors
from kernel_checks import by_slot, check_vectors, pick
from kvturbo import KVFormat, dequantize, quantize
from kvturbo.config import HEAD_DIMS, SIDES
from kvturbo.layout import PageLayout
from kvturbo.ops import decode, gather, store
from kvturbo.ops.schedule import plan
from kvturbo.ops.warmup import warmup
from support import channels_for, relative_error, same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cuda", "triton"])]

LENGTHS = [1000, 0, 1, 15, 33333, 16, 17]
HEADS = 2
OPERATIONS = ("store", "decode", "gather")


def check_all(cache: Cache, group: int, backend: str) -> None:
    for std in (1.0, 8.0):
        for dtype in (torch.bfloat16, torch.float16):
            check(cache, queries(cache, len(cache.k), group, std, dtype), backend)


@pytest.fixture(scope="module")
def plain() -> Cache:
    return cache_of("k4v4", 128, LENGTHS)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16])
def test_decode_for_every_group(backend: str, plain: Cache, group: int) -> None:
    check_all(plain, group, backend)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_decode_for_every_head_dim(backend: str, head_dim: int) -> None:
    check_all(cache_of("k4v4", head_dim, LENGTHS, 32), 4, backend)


FORMATS = ["k4v3", "k4v2", "k3v3", "k3v2", "k2v2", "k8v4", "lite4", "k4v4-o16", "k3v2-o32"]


@pytest.mark.parametrize("name", FORMATS)
def test_decode_for_every_format(backend: str, name: str) -> None:
    check_all(cache_of(name, 128, LENGTHS, 64), 7, backend)


@pytest.mark.parametrize(
    "name,head_dim", [("k3v3-o16", 80), ("k8v4", 112), ("k2v2-o16", 64), ("k4v2-o32", 192), ("k3v2", 96)]
)
def test_decode_of_formats_in_other_head_dims(backend: str, name: str, head_dim: int) -> None:
    check_all(cache_of(name, head_dim, LENGTHS), 8, backend)


@pytest.mark.parametrize("group", [4, 7])
@pytest.mark.parametrize("q_lens", [[2, 0, 1, 2, 2, 1, 2], [8, 0, 1, 3, 5, 8, 2]])
def test_several_queries_per_sequence_and_padding_rows(
    backend: str, plain: Cache, q_lens: list[int], group: int
) -> None:
    check(plain, queries(plain, sum(q_lens) + 3, group, 4.0, torch.bfloat16), backend, q_lens=q_lens)


OPTIONS: list[dict[str, Any]] = [
    {"window": 1}, {"window": 300}, {"soft_cap": 3.0}, {"seq_starts": [900, 5, 0, 15, 129, 0, 3]},
    {"window": 5000, "soft_cap": 2.0, "seq_starts": [10, 0, 0, 3, 30000, 1, 2], "q_lens": [3, 0, 1, 2, 4, 1, 2]},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("has_sinks", [False, True])
def test_decode_with_options(backend: str, plain: Cache, options: dict[str, Any], has_sinks: bool) -> None:
    group = 4
    sinks = torch.linspace(-3, 5, HEADS * group, device="cuda") if has_sinks else None
    rows = sum(options.get("q_lens", [1] * len(LENGTHS)))
    check(plain, queries(plain, rows, group, 2.0, torch.bfloat16), backend, sinks=sinks, **options)


def test_a_batch_of_many_short_sequences(backend: str) -> None:
    lengths = [(37 * i) % 400 for i in range(300)]
    cache = cache_of("k4v4", 64, lengths)
    check(cache, queries(cache, 300, 4, 1.0, torch.bfloat16), backend)


def test_decode_is_bitwise_deterministic(backend: str, plain: Cache) -> None:
    q = queries(plain, len(LENGTHS), 4, 1.0, torch.bfloat16)
    first = run(plain, q, backend=backend)
    for _ in range(5):
        assert all(same_bits(a, b) for a, b in zip(first, run(plain, q, backend=backend), strict=True))


def planner_of(backend: str, q: Tensor, cache: Cache, seq_lens: Tensor) -> Callable[[], Any]:
    """Something that makes a step's schedule on the device."""
    if backend == "triton":
        return lambda: plan(seq_lens)
    schedule = import_module("kvturbo.ops.decode.cuda_schedule").make_schedule(q, cache.pages, seq_lens, fmt=cache.fmt)
    return lambda: schedule.update(seq_lens) or schedule


def test_a_graph_replays_with_other_lengths_and_tokens(backend: str) -> None:
    """Store and decode captured once; replayed after lengths, slots, tokens and queries have changed in place."""
    cache = cache_of("k4v4", 128, [5000, 700, 0, 129])
    group, generator = 4, torch.Generator("cuda").manual_seed(2)
    q = queries(cache, 4, group, 1.0, torch.bfloat16)
    k, v = vectors(4, HEADS, 128, generator).bfloat16()
    seq_lens = torch.tensor([4000, 1, 0, 128], dtype=torch.int32, device="cuda")
    slots = torch.full((4,), -1, dtype=torch.int64, device="cuda")

    planner = planner_of(backend, q, cache, seq_lens)

    def step() -> tuple[Tensor, Tensor]:
        store(k, v, cache.pages, slots, backend=backend, **cache.options)
        return decode(
            q, cache.pages, cache.block_table, seq_lens, scale=1.0, schedule=planner(), backend=backend, **cache.options
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step()
    for lengths in ([4000, 1, 0, 128], [4999, 650, 0, 17], [17, 0, 0, 129], [5000, 700, 0, 1]):
        seq_lens.copy_(torch.tensor(lengths))
        last = (seq_lens.long() - 1).clamp(min=0)
        at = cache.block_table.gather(1, (last // 16)[:, None])[:, 0].long() * 16 + last % 16
        slots.copy_(torch.where(seq_lens > 0, at, -1))
        k.copy_(vectors(4, HEADS, 128, generator)[0])
        q.copy_(queries(cache, 4, group, 1.0, torch.bfloat16).roll(lengths[0], 0))
        graph.replay()
        replayed = out.clone(), lse.clone()
        eager = step()
        assert all(same_bits(a, b) for a, b in zip(replayed, eager, strict=True))
        got = dequantize(quantize(k[:1], cache.fmt, "k"), cache.fmt, "k")
        stored, _ = gather(
            cache.pages, cache.block_table[:1], lengths[0] - 1, lengths[0], dtype=torch.float32, backend=backend,
            **cache.options,
        )  # fmt: skip
        assert relative_error(stored[0], got) <= 1e-2
    graph.reset()


def test_memory_beside_the_results_is_bounded_whatever_the_lengths(backend: str, plain: Cache) -> None:
    kernels = import_module(f"kvturbo.ops.decode.{backend}")
    q = queries(plain, len(LENGTHS), 4, 1.0, torch.bfloat16)
    out = torch.empty_like(q)
    run(plain, q, out, backend=backend)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(plain, q, out, backend=backend)
    limit = 64 * 1024
    if backend == "triton":  # the cuda backend keeps its workspace from call to call
        workers = kernels.num_workers(q.device, HEADS, 3)
        limit += kernels.workspace_bytes(len(q), workers, len(LENGTHS), HEADS * 4, 128)
    assert torch.cuda.max_memory_allocated() - before <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "name,head_dim", [("k4v4", 128), ("k3v2-o16", 80), ("k8v4", 256), ("k3v3", 112), ("k2v2-o32", 192)]
)
def test_store_of_many_scales_agrees_with_the_codec(backend: str, name: str, head_dim: int, dtype: torch.dtype) -> None:
    fmt, count = KVFormat.from_name(name, head_dim, seed=4), 20000
    generator = torch.Generator("cuda").manual_seed(1)
    k, v = vectors(count, HEADS, head_dim, generator).to(dtype)
    channels = channels_for(fmt, HEADS)
    channels = None if channels is None else channels.cuda()
    slots = torch.randperm(count + 16, generator=generator, device="cuda")[:count]
    slots[: count // 2] = torch.arange(count // 2, device="cuda")
    slots[count // 2 :] = slots[count // 2 :].sort().values + count  # distinct from the first half
    pages = torch.zeros(-(-int(slots.max() + 1) // 16), HEADS, fmt.page_bytes(16), dtype=torch.uint8, device="cuda")
    store(k, v, pages, slots, fmt=fmt, outlier_channels=channels, backend=backend)
    layout = PageLayout.of(fmt, 16)
    for side, x in zip(SIDES, (k, v), strict=True):
        packed, wanted = layout.read(pages, side), quantize(x, fmt, side, channels)
        got = pick(by_slot(packed), (slots // 16, slots % 16))
        check_vectors(fmt, side, wanted, got, x.float(), channels)


@pytest.fixture
def kernels_loaded(backend: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Says how many kernels a backend has compiled or loaded so far."""
    if backend == "triton":
        store, decode, gather = (import_module(f"kvturbo.ops.{operation}.triton") for operation in OPERATIONS)
        attend, merge = decode.triton_attend, decode.triton_merge
        kernels = [store._store, attend.rotate_queries, attend.attend, merge.merge, gather._gather]
        return lambda: sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
    jit = import_module("kvturbo.cuda.jit")
    loaded, load = [], jit.Kernel.__init__
    monkeypatch.setattr(jit.Kernel, "__init__", lambda *args, **options: loaded.append(args) or load(*args, **options))
    return lambda: len(loaded)


def test_warm_kernels_do_not_compile_again(backend: str, kernels_loaded: Callable[[], int]) -> None:
    """After a warm-up, other batch sizes, lengths and tables launch what is there."""
    fmt = KVFormat.from_name("k4v3", 128, seed=11)
    warmup(
        fmt, num_q_heads=8, num_kv_heads=HEADS, page_size=16, dtype=torch.bfloat16, device="cuda", backend=backend
    )  # fmt: skip
    before = kernels_loaded()
    for lengths in ([3], [700, 1], [16, 17, 1000, 5, 0], [1] * 200):
        cache = cache_of(fmt.name, 128, lengths)
        q = queries(cache, len(lengths), 4, 1.0, torch.bfloat16)
        run(cache, q, backend=backend)
        k, v = vectors(len(lengths), HEADS, 128, torch.Generator("cuda")).bfloat16()
        slots = torch.full((len(lengths),), -1, device="cuda")
        store(k, v, cache.pages, slots, backend=backend, **cache.options)
        gather(cache.pages, cache.block_table[:1], 0, lengths[0], backend=backend, **cache.options)
    assert kernels_loaded() == before
