"""Times of GPU work: the median of CUDA-graph replays with a cold L2 cache. Times of the host: the median of eager calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

WARMUP_CALLS = 3
COPY_BYTES = 1 << 32
HOST_CALLS, HOST_WARMUP_CALLS = 200, 20


def graph_us(call: Callable[[], Any], milliseconds: int = 50) -> float:
    """Microseconds of one call, captured in a CUDA graph; L2 is overwritten before each replay.

    Args:
        call: launches work on the current stream; no host synchronisation inside.
        milliseconds: how long to repeat.
    """
    from triton.testing import do_bench

    for _ in range(WARMUP_CALLS):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        call()
    milli = do_bench(graph.replay, warmup=10, rep=milliseconds, return_mode="median")
    graph.reset()
    return float(milli) * 1e3


def copy_gb_per_s(nbytes: int = COPY_BYTES) -> float:
    """Bandwidth of a device-to-device copy in GB/s, bytes read and bytes written both counted."""
    from triton.testing import do_bench

    source = torch.empty(nbytes, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    milli = do_bench(lambda: target.copy_(source), warmup=10, rep=100, return_mode="median")
    return 2 * nbytes / float(milli) / 1e6


def host_us(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Host time of an eager call in microseconds, the median of `HOST_CALLS` that are not waited for."""
    medians = {}
    for name, call in calls.items():
        times = []
        torch.cuda.synchronize()
        for _ in range(HOST_WARMUP_CALLS + HOST_CALLS):
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
        torch.cuda.synchronize()
        medians[name] = statistics.median(times[HOST_WARMUP_CALLS:]) / 1e3
    return medians
