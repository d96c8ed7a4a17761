"""Decode in Triton: rotate the queries, attend split by split (triton_attend), merge the splits and un-rotate (triton_merge).

Three launches of fixed shape.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.cuda.jit import current_stream
from kvturbo.layout import PageLayout
from kvturbo.ops import triton_common as common
from kvturbo.ops.checks import MAX_Q_LEN
from kvturbo.ops.decode import triton_attend, triton_merge
from kvturbo.ops.recent import Recent
from kvturbo.ops.schedule import BLOCK, Schedule, plan
from kvturbo.ops.sharing import SharedSchedules

LOG2E = math.log2(math.e)
INTERPRETED_WORKERS = 5
ROTATE_ROWS = 16
ROTATE_PLACES = 64
SPREAD_BELOW = 256
"""With fewer pairs of a query and a KV head than this, a program merges one head; with more, a whole group."""


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_workers(device: torch.device, num_kv_heads: int, per_processor: int) -> int:
    """Workers per KV head: together as many as the GPU holds at once."""
    if device.type != "cuda":
        return INTERPRETED_WORKERS
    return max(1, _processors(device) * per_processor // num_kv_heads)


def _register_limit(device: torch.device, per_processor: int) -> dict[str, int]:
    """Launch options that keep a worker's registers low enough for `per_processor` of them; NVIDIA only."""
    if device.type != "cuda" or torch.version.hip or per_processor < 3:
        return {}
    return {"maxnreg": 168}


def workspace_bytes(queries: int, workers: int, batch: int, num_q_heads: int, head_dim: int, max_q_len: int = 1) -> int:
    """Upper bound of the memory that a call takes beside its results.

    Rotated queries, two bfloat16 parts of at most 2 * d + 32 places each, and (workers + B) partial results per query head, of at
    most max_q_len queries rounded up to a tile of 16 rows per KV head. It does not depend on the lengths of the sequences.
    """
    rotated = queries * num_q_heads * (2 * head_dim + 32) * 2 * 2
    partial = (workers + batch) * num_q_heads * (max_q_len + 15) * (head_dim + 2) * 4
    return rotated + partial


def warmup(
    fmt: KVFormat,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    max_q_len: int | None = None,
    seq_starts: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: bool = False,
    ring_size: int = 0,
) -> None:
    """Compiles and loads what `decode` launches for such pages and queries of `dtype`, whatever the batch.

    Args:
        max_q_len: of the schedules to come with q_lens; None for calls without q_lens.
        seq_starts, sinks: whether calls have them.
        window, soft_cap: as in the calls; only whether they are None matters.
        ring_size: tokens of a ring of the calls' `recent`; 0 for calls without.
    """
    pages, channels = common.scratch_pages(fmt, page_size, num_kv_heads, device)
    for batch in (1, -(-SPREAD_BELOW // num_kv_heads)):
        q = torch.zeros(batch, num_q_heads, fmt.head_dim, dtype=dtype, device=device)
        lens = torch.zeros(batch, dtype=torch.int32, device=device)
        q_lens, starts = None if max_q_len is None else lens, lens if seq_starts else None
        recent = None
        if ring_size:
            rows = torch.zeros(1, num_kv_heads, 2, ring_size, fmt.head_dim, dtype=dtype, device=device)
            recent = Recent(rows, lens, lens)
        schedule = plan(
            lens, q_lens=q_lens, seq_starts=starts, window=window, recent_counts=recent and recent.counts,
            max_q_len=max_q_len or 1,
        )  # fmt: skip
        decode(
            q, pages, lens[:, None], lens, torch.empty_like(q), fmt=fmt, scale=1.0, q_lens=q_lens, seq_starts=starts,
            window=window, soft_cap=soft_cap, sinks=torch.zeros(num_q_heads, device=device) if sinks else None,
            outlier_channels=channels, recent=recent, schedule=schedule,
        )  # fmt: skip


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out: Tensor,
    *,
    fmt: KVFormat,
    scale: float,
    q_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    outlier_channels: Tensor | None = None,
    recent: Recent | None = None,
    schedule: Any = None,
) -> Tensor:
    """See `kvturbo.ops.decode`; writes into out and returns lse. Computes in fp32. Memory: `workspace_bytes`.

    Raises:
        TypeError: schedule is not a `kvturbo.ops.schedule.Schedule`.
        ValueError: the schedule does not fit the call, or pages or rings are not aligned to 16 bytes.
    """
    common.check_pages(pages)
    if recent is not None:
        common.check_rings("recent.rows", recent.rows)
    batch, (num_queries, num_heads) = seq_lens.shape[0], q.shape[:2]
    lse = torch.empty(num_queries, num_heads, dtype=torch.float32, device=q.device)
    if not num_queries or not batch:
        out.zero_()
        lse.copy_(torch.full_like(lse, -torch.inf) if sinks is None else sinks.expand_as(lse))
        return lse.to(torch.promote_types(q.dtype, torch.float32))
    schedule = _planned(schedule, seq_lens, q_lens, seq_starts, window, recent, num_queries)
    seq_lens, seq_starts, sinks, outlier_channels = common.contiguous(seq_lens, seq_starts, sinks, outlier_channels)
    recent = recent and Recent(recent.rows, *common.contiguous(recent.slots, recent.counts))
    block_table, q = common.rows_contiguous(block_table), common.rows_contiguous(q)
    call = _Call(q, pages, fmt, schedule, scale * (1.0 if soft_cap else LOG2E), window, soft_cap)
    rotated = call.rotate(q, outlier_channels)
    part, stats = call.attend(rotated, pages, block_table, seq_lens, seq_starts, recent)
    target = out if out.stride(-1) == 1 else torch.empty_like(out, memory_format=torch.contiguous_format)
    call.merge(part, stats, q, seq_lens, seq_starts, recent, sinks, target, lse)
    if target is not out:
        out.copy_(target)
    return lse.to(torch.promote_types(q.dtype, torch.float32))


def _planned(
    schedule: Any,
    seq_lens: Tensor,
    q_lens: Tensor | None,
    seq_starts: Tensor | None,
    window: int | None,
    recent: Recent | None,
    num_queries: int,
) -> Schedule:
    counts = None if recent is None else recent.counts
    bound = min(MAX_Q_LEN, num_queries)

    def make(_: Schedule | None = None) -> Schedule:
        return plan(
            seq_lens, q_lens=q_lens, seq_starts=seq_starts, window=window, recent_counts=counts, max_q_len=bound
        )

    device, shared = seq_lens.device, isinstance(schedule, SharedSchedules)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if schedule is None or (shared and (capturing or recent is not None)):  # shared plans don't know of rings
        return make()
    if shared:
        stream = current_stream(device.index) if device.type == "cuda" else 0
        kind = ("triton", len(seq_lens), window, bound, device, stream)
        lens = seq_lens, q_lens, seq_starts
        return schedule.find(kind, *lens) or schedule.make(kind, *lens, make)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a kvturbo.ops.schedule.Schedule, got {type(schedule).__name__}")
    schedule.check(seq_lens.shape[0], window, q_lens, counts)
    return schedule


class _Call:
    """Sizes of one call, and its three launches. score_factor: to base-2 logarithms, or what the soft cap takes."""

    def __init__(
        self,
        q: Tensor,
        pages: Tensor,
        fmt: KVFormat,
        schedule: Schedule,
        score_factor: float,
        window: int | None,
        soft_cap: float | None,
    ) -> None:
        self.score_factor, self.window, self.soft_cap = score_factor, window, soft_cap
        self.fmt, self.schedule, self.device = fmt, schedule, q.device
        self.constants = common.page_constants(fmt, PageLayout.page_size_of(fmt, pages.shape[2]))
        self.num_queries, self.num_heads, self.num_kv_heads = q.shape[0], q.shape[1], pages.shape[1]
        self.group = self.num_heads // self.num_kv_heads
        self.batch = schedule.blocks.shape[0] - 1
        rows = self.group * schedule.max_q_len
        self.half = 8 if rows <= 8 else 16
        self.tiles = -(-rows // self.half)
        self.per_processor = 3 if fmt.head_dim <= 128 and self.half == 8 else 2
        self.workers = num_workers(q.device, self.num_kv_heads, self.per_processor)
        self.shared = {
            "HQ": self.num_heads,
            "HKV": self.num_kv_heads,
            "G": self.group,
            "HAS_ROWS": schedule.rows is not None,
            "DOT": common.DOT,
        }

    def rotate(self, q: Tensor, outlier_channels: Tensor | None) -> Tensor:
        fmt, factor = self.fmt, self.score_factor
        places = 32 * self.constants["SP"]
        dtype = torch.float32 if common.INTERPRETED else torch.bfloat16
        rows = self.num_queries * self.num_heads
        out = torch.empty(2, rows, places + fmt.outliers, dtype=dtype, device=self.device)
        grid = (-(-rows // ROTATE_ROWS), -(-places // ROTATE_PLACES) + (1 if fmt.outliers else 0))
        matrix = common.rotation_matrix(fmt.head_dim, fmt.seed, "k", fmt.k.rotate, self.device)
        unit = common.UNITS[self.constants["KB"]] * common.norm(fmt.head_dim, fmt.k.rotate)
        triton_attend.rotate_queries[grid](
            q, out, matrix, outlier_channels, rows, q.stride(0), q.stride(1), factor * unit, factor,
            HQ=self.num_heads, G=self.group, D=fmt.head_dim, DV=self.constants["DV"], PLACES=places,
            OUTLIERS=fmt.outliers, ROWS=ROTATE_ROWS, CHUNK=ROTATE_PLACES, DOT=common.DOT, num_warps=8,
        )  # fmt: skip
        return out

    def attend(
        self,
        rotated: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        recent: Recent | None,
    ) -> tuple[Tensor, Tensor]:
        splits = (self.workers + self.batch) * self.num_kv_heads * self.tiles * self.half
        part = torch.empty(splits, self.fmt.head_dim, dtype=torch.float32, device=self.device)
        stats = torch.empty(splits, 2, dtype=torch.float32, device=self.device)
        triton_attend.attend[(self.workers, self.num_kv_heads, self.tiles)](
            rotated, pages, block_table, seq_lens, seq_starts, recent and recent.counts, self.schedule.blocks, self.schedule.rows,
            part, stats, self.batch, rotated.shape[1], pages.stride(0) // 16, block_table.stride(0), self.window or 0,
            float(self.soft_cap or 0.0), R=2 * self.half, BLOCK=BLOCK, HAS_STARTS=seq_starts is not None,
            HAS_WINDOW=self.window is not None, HAS_CAP=self.soft_cap is not None, HAS_RECENT=recent is not None,
            PAGE_BYTES=pages.shape[2], STAGES=2, num_warps=4,
            **self.shared, **self.constants, **_register_limit(self.device, self.per_processor),
        )  # fmt: skip
        return part, stats

    def merge(
        self,
        part: Tensor,
        stats: Tensor,
        q: Tensor,
        seq_lens: Tensor,
        seq_starts: Tensor | None,
        recent: Recent | None,
        sinks: Tensor | None,
        out: Tensor,
        lse: Tensor,
    ) -> None:
        fmt = self.fmt
        newest: tuple[Any, ...] = (None,) * 6 + (0, 0, 0, 0.0, 0.0)
        if recent is not None:
            numbers = q.stride(0), q.stride(1), self.window or 0, self.score_factor, float(self.soft_cap or 0.0)
            newest = (q, *recent, seq_lens, seq_starts, *numbers)
        spread = self.num_queries * self.num_kv_heads < SPREAD_BELOW
        heads = 1 if spread else triton.next_power_of_2(self.group)
        matrix = common.rotation_matrix(fmt.head_dim, fmt.seed, "v", fmt.v.rotate, self.device)
        unit = common.UNITS[self.constants["VB"]] * common.norm(fmt.head_dim, fmt.v.rotate)
        triton_merge.merge[(self.num_queries, self.num_kv_heads * -(-self.group // heads))](
            *newest, part, stats, self.schedule.blocks, self.schedule.rows, sinks, matrix, out, lse,
            self.batch, self.workers, self.tiles * self.half, out.stride(0), out.stride(1), unit,
            GT=heads, SPLITS=max(1, 16 // heads), HAS_SINKS=sinks is not None,
            RING=0 if recent is None else recent.size, HAS_STARTS=newest[5] is not None,
            HAS_WINDOW=recent is not None and self.window is not None, HAS_CAP=recent is not None and self.soft_cap is not None,
            D=fmt.head_dim, DV=self.constants["DV"],
            CHUNK=64, num_warps=4, **self.shared, **({} if recent is None else {"num_stages": 2}),  # shared memory is short
        )  # fmt: skip
