"""Decode: attention of the newest tokens over the packed cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.ops import backends, checks
from kvturbo.ops.calls import CheckedCalls, traits
from kvturbo.ops.recent import Recent, check_recent
from kvturbo.ops.sharing import SharedSchedules

Run = Callable[..., tuple[Tensor, Tensor]]
"""Takes q, pages, block_table, seq_lens, out (or None), q_lens, seq_starts, sinks, outlier_channels, schedule, recent.

Returns out, lse.
"""
_CHECKED: CheckedCalls[Run] = CheckedCalls()


def decode(
    q: Tensor,
    pages: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
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
    out: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence's last tokens over its pages, those tokens' own keys and values included.

    Query i of a sequence with q_len n and seq_len L stands at position L - n + i and sees positions up to its own.

    Args:
        q: [T, num_q_heads, d], the sequences' queries one after another; rows beyond sum(q_lens) are padding.
        pages: [num_pages, num_kv_heads, page_bytes] uint8.
        block_table: [B, any] int32, the pages of each sequence in order.
        seq_lens: [B] int32, tokens in the cache, the queries' own included; 0 for an empty sequence.
        fmt: the format.
        scale: factor on the scores, usually d ** -0.5.
        q_lens: [B] int32, 0 to 8 queries per sequence (default 1 each, T = B).
        seq_starts: [B] int32, positions below it are padding (default 0); it may lie beyond the sequence's end.
        window: a query at p sees positions above p - window only.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sinks: [num_q_heads] fp32, a logit per head in the softmax without a value.
        outlier_channels: [num_kv_heads, fmt.channel_count] int64, as given to store.
        recent: raw keys and values of the newest tokens, which are read instead of the packed ones (default: none).
        schedule: a plan of splits made once for all layers of a step, or `kvturbo.ops.sharing.SharedSchedules`, which has
            it made (GPU backends; default: made here, in every call).
        out: [T, num_q_heads, d] to write into, of any floating dtype; it must not share memory with q.
        backend: "auto" or one of `kvturbo.ops.backends.BACKENDS`.

    Returns:
        out [T, num_q_heads, d] in q's dtype, and lse [T, num_q_heads] fp32 (fp64 for fp64 queries), natural logarithm,
        sinks included. Rows that see nothing, padding rows too, are 0 with lse -inf (with sinks: the sink).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device; a page id, a length or a q_len is out of
            range (seen on the CPU only: no synchronisation on a GPU); or the backend is not available.
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        kind = (
            q.shape, q.is_contiguous() or q.stride(), q.dtype, q.device,
            pages.shape, pages.is_contiguous() or pages.stride(), pages.dtype, pages.device,
            block_table.shape, block_table.is_contiguous() or block_table.stride(), block_table.dtype, block_table.device,
            seq_lens.shape, seq_lens.is_contiguous() or seq_lens.stride(), seq_lens.dtype, seq_lens.device,
            fmt, scale, window, soft_cap, backend,
            q_lens if q_lens is None else traits(q_lens), seq_starts if seq_starts is None else traits(seq_starts),
            sinks if sinks is None else traits(sinks), out if out is None else traits(out),
            outlier_channels if outlier_channels is None else traits(outlier_channels),
            recent if recent is None else (*map(traits, recent),),
        )  # fmt: skip
        last, run = _CHECKED.last
        if last != kind:
            run = _CHECKED.get(kind)
        if run is not None:
            return run(
                q, pages, block_table, seq_lens, out, q_lens, seq_starts, sinks, outlier_channels, schedule, recent
            )
    page_size = checks.check_pages(pages, fmt)
    checks.check_vectors("q", q, fmt, pages)
    checks.check_heads(q, pages)
    checks.check_tables(block_table, seq_lens, "seq_lens", pages, page_size)
    checks.check_outliers(outlier_channels, fmt, pages)
    checks.check_starts(seq_starts, seq_lens.shape[0], pages)
    checks.check_scores(scale, window, soft_cap, sinks, q)
    _check_queries(q, seq_lens, q_lens, pages)
    check_recent(recent, q, seq_lens, pages)
    if out is not None and (out.shape != q.shape or out.dtype not in checks.FLOATS or out.device != q.device):
        raise ValueError(f"out must be floating point {list(q.shape)} on {q.device}, got {out.dtype} {list(out.shape)}")
    if compiling:
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        if schedule is not None and not isinstance(schedule, SharedSchedules):
            raise ValueError("schedule can't be passed inside torch.compile; leave it out")
        lse = torch.ops.kvturbo.decode(
            q, pages, block_table, seq_lens, out, fmt.name, fmt.seed, scale,
            q_lens, seq_starts, window, soft_cap, sinks, outlier_channels, backend, *(recent or (None, None, None)),
        )  # fmt: skip
        return out, lse
    tensors = q, pages, block_table, seq_lens, out, q_lens, seq_starts, sinks, outlier_channels
    name = backends.choose(backend, "decode", pages.device, fmt)
    run = _prepared(name, tensors, recent, fmt=fmt, scale=scale, window=window, soft_cap=soft_cap)
    _CHECKED.remember(kind, run, pages.device, scale, window, soft_cap)
    return run(*tensors, schedule, recent)


def _prepared(backend: str, tensors: tuple[Tensor | None, ...], recent: Recent | None, **options: Any) -> Run:
    """A backend's decode with its options filled in; the cuda backend works out more of a call beforehand."""
    if backend == "cuda":
        return backends.load("decode", "cuda", "prepare")(*tensors, recent, **options)
    decode = backends.load("decode", backend)

    def run(
        q: Tensor,
        pages: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        out: Tensor | None,
        q_lens: Tensor | None,
        seq_starts: Tensor | None,
        sinks: Tensor | None,
        outlier_channels: Tensor | None,
        schedule: Any,
        recent: Recent | None,
    ) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        return out, decode(
            q, pages, block_table, seq_lens, out, q_lens=q_lens, seq_starts=seq_starts, sinks=sinks,
            outlier_channels=outlier_channels, recent=recent, schedule=schedule, **options,
        )  # fmt: skip

    return run


def _check_queries(q: Tensor, seq_lens: Tensor, q_lens: Tensor | None, pages: Tensor) -> None:
    batch = seq_lens.shape[0]
    if q_lens is None:
        if q.shape[0] != batch:
            raise ValueError(f"q must have one row per sequence ({batch}) without q_lens, got {q.shape[0]}")
        return
    checks.check_tensor("q_lens", q_lens, (batch,), torch.int32, pages)
    checks.check_range("q_lens", q_lens, 0, checks.MAX_Q_LEN)
    if q_lens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if int(q_lens.sum()) > q.shape[0]:
        raise ValueError(f"q_lens sum to {int(q_lens.sum())}, q has {q.shape[0]} rows")
    if ((q_lens > seq_lens) & (seq_lens > 0)).any():
        raise ValueError(f"q_lens must not be above seq_lens, got {q_lens.tolist()} and {seq_lens.tolist()}")
