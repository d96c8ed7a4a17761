"""Prefix attention: a chunk of new tokens attends to its own raw keys and values and to the packed prefix before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.ops import checks
from kvturbo.ops.dense import attend, attend_flash, causal_mask, first_seen, has_flash, merge
from kvturbo.ops.gather import gather
from kvturbo.quantizer import has_rotated_form
from kvturbo.rotation import rotate, unrotate

PIECE_TOKENS = 8192
"""Tokens of a prefix dequantised at once: the workspace is 2 * PIECE_TOKENS * num_kv_heads * d 16-bit elements."""

Attend = Callable[..., tuple[Tensor, Tensor]]


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    block_table: Tensor,
    prefix_lens: Tensor,
    *,
    fmt: KVFormat,
    scale: float,
    q_lens: Tensor,
    seq_starts: Tensor | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    outlier_channels: Tensor | None = None,
    attend: Attend = attend,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal attention of a chunk over packed prefix and raw chunk, merged by log-sum-exp.

    The result depends on where chunks end, because a chunk sees its own keys and values before they are quantised.

    Args:
        q: [T, num_q_heads, d], the sequences' chunks one after another.
        k, v: [T, num_kv_heads, d], the chunks' raw keys and values.
        pages, block_table: as in decode.
        prefix_lens: [B] int32, tokens of each sequence that come before its chunk and are in the cache.
        fmt, scale, seq_starts, window, soft_cap, sinks, outlier_channels, backend: as in decode; positions count from
            the sequence's first token, prefix included.
        q_lens: [B] int32, tokens in each chunk.
        attend: dense attention with the signature of `kvturbo.ops.dense.attend`, for what torch's flash attention can't do
            (on a GPU, 16-bit queries without window, soft cap, sinks or padding go there).

    Returns:
        out [T, num_q_heads, d] in q's dtype and lse [T, num_q_heads] fp32 (fp64 for fp64 queries).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype or device, or a length is out of range.
    """
    page_size = checks.check_pages(pages, fmt)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.check_vectors(name, x, fmt, pages)
    checks.check_heads(q, pages)
    checks.check_tables(block_table, prefix_lens, "prefix_lens", pages, page_size)
    checks.check_starts(seq_starts, prefix_lens.shape[0], pages)
    checks.check_scores(scale, window, soft_cap, sinks, q)
    checks.check_outliers(outlier_channels, fmt, pages)
    checks.check_tensor("q_lens", q_lens, (prefix_lens.shape[0],), torch.int32, pages)
    counts, prefixes = q_lens.tolist(), prefix_lens.tolist()
    if min(counts, default=0) < 0 or sum(counts) != q.shape[0]:
        raise ValueError(f"q_lens must not be negative and sum to the {len(q)} rows of q, got {counts}")
    wanted = [q.shape[0], pages.shape[1], fmt.head_dim]
    if list(k.shape) != wanted or list(v.shape) != wanted:
        raise ValueError(f"k and v must both be {wanted}, got {list(k.shape)} and {list(v.shape)}")
    starts = [0] * len(counts) if seq_starts is None else seq_starts.tolist()
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    row = 0
    for b, (count, prefix, seq_start) in enumerate(zip(counts, prefixes, starts, strict=True)):
        rows = slice(row, row + count)
        row += count
        view = _View(count, prefix, seq_start, window, scale, soft_cap, attend)
        parts = [view.attend(q[rows], k[rows], v[rows], prefix, prefix + count, sinks)]
        parts += _over_prefix(view, q[rows], pages, block_table[b : b + 1], fmt, outlier_channels, backend)
        result, lse[rows] = merge(parts)
        out[rows] = result.to(q.dtype)
    return out, lse


class _View:
    """One sequence's chunk and what it may see."""

    def __init__(
        self,
        count: int,
        prefix: int,
        seq_start: int,
        window: int | None,
        scale: float,
        soft_cap: float | None,
        attend: Attend,
    ) -> None:
        self.count, self.prefix, self.seq_start, self.window = count, prefix, seq_start, window
        self.scale, self.soft_cap, self.dense = scale, soft_cap, attend

    @property
    def first_seen(self) -> int:
        """The first position of the prefix that some query sees."""
        return first_seen(self.prefix, self.window, self.seq_start)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, start: int, stop: int, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        plain = self.dense is attend and self.window is None and self.soft_cap is None and sinks is None
        if plain and self.seq_start <= start < stop and len(q) and has_flash(q):
            return attend_flash(q, k, v, scale=self.scale, causal=start == self.prefix)
        mask = causal_mask(
            self.count, start, stop, self.prefix, window=self.window, seq_start=self.seq_start, device=q.device
        )
        return self.dense(q, k, v, scale=self.scale, mask=mask, soft_cap=self.soft_cap, sinks=sinks)


def _over_prefix(
    view: _View,
    q: Tensor,
    pages: Tensor,
    table: Tensor,
    fmt: KVFormat,
    outlier_channels: Tensor | None,
    backend: str,
) -> list[tuple[Tensor, Tensor]]:
    """Attention over the packed prefix, merged piece by piece (their number grows with the prefix) and un-rotated.

    At most one (out, lse).
    """
    rotated = has_rotated_form(fmt.k) and has_rotated_form(fmt.v)
    turn = rotated and fmt.k.rotate
    query = rotate(q, fmt.seed).to(q.dtype) if turn else q
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(view.first_seen, view.prefix, PIECE_TOKENS):
        stop = min(start + PIECE_TOKENS, view.prefix)
        k, v = gather(
            pages, table, start, stop,
            fmt=fmt, rotated=rotated, outlier_channels=outlier_channels, dtype=q.dtype, backend=backend,
        )  # fmt: skip
        parts = [merge([*parts, view.attend(query, k[0], v[0], start, stop)])]
    if not parts:
        return []
    out, lse = parts[0]
    return [(unrotate(out, fmt.seed) if turn else out, lse)]
