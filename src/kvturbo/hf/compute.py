"""Attention of a packed layer's new tokens: over their own raw keys and values, the 16-bit windows and the packed pages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvturbo import ops
from kvturbo.hf.group import Group, Step
from kvturbo.hf.layer import Staged
from kvturbo.hf.rows import NewColumns
from kvturbo.hf.windows import WindowTensors
from kvturbo.ops.checks import MAX_Q_LEN
from kvturbo.ops.dense import attend, causal_mask, merge

ROWS_AT_ONCE = 1024
"""Queries for which a mask is made at once where torch's attention can't be used."""


@dataclass(frozen=True)
class Scoring:
    """How scores become weights.

    Attributes:
        scale: factor on the scores.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sinks: [query heads] fp32, a logit per head without a value.
    """

    scale: float
    soft_cap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's attention can do it."""
        return self.soft_cap is None and self.sinks is None

    @property
    def options(self) -> dict[str, Any]:
        """As arguments of `kvturbo.ops`."""
        return {"scale": self.scale, "soft_cap": self.soft_cap, "sinks": self.sinks}


def attend_packed(staged: Staged, query: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Stores what a layer has staged and attends to it and to everything before it.

    The first chunk attends to its raw keys and values. Later, up to 8 new tokens are packed and read back with the pages;
    more of them, or any with 16-bit windows, attend to their own raw keys and values and to what was there before them.

    Args:
        staged: the layer, its raw keys and values.
        query: [batch, query heads, count, d].
        mask: see `PackedStore.begin`.
        scoring: how scores become weights.

    Returns:
        [batch, count, query heads, d] in query's dtype; 0 for padding.
    """
    layer, k, v = staged.layer, staged.k, staged.v
    step = layer.begin(k, mask)
    group, store = layer.group, layer.store
    if store.first:
        out = attend_first(query, k, v, step.new, store.pattern, scoring)
        layer.finish(k, v)
        return out
    store.packed_tokens_read += sum(step.before)
    rows = _Rows(step, query, k, v, scoring)
    if group.windowed:
        windows = group.window(layer.position, k)
        assert windows is not None
        out = rows.windowed(group, layer.position, windows)
        layer.finish(k, v)
    elif query.shape[2] <= MAX_Q_LEN:
        layer.finish(k, v)
        out = rows.decode(group, layer.position)
    else:
        out = rows.prefix(group, layer.position)[0]
        layer.finish(k, v)
    return rows.unflatten(out)


def attend_first(
    query: Tensor, k: Tensor, v: Tensor, new: NewColumns, pattern: Tensor | None, scoring: Scoring
) -> Tensor:
    """Attention of a first chunk over itself, without a mask unless the pattern is not causal.

    Args:
        query: [batch, query heads, count, d].
        k, v: [batch, heads, count, d].
        new: which columns are tokens.
        pattern: [batch, 1, count, count] bool, or None for causal attention.
        scoring: how scores become weights.

    Returns:
        [batch, count, query heads, d]; 0 for padding.
    """
    if pattern is not None:
        if not scoring.plain:
            return attend_dense(query, k, v, pattern, scoring)
        out = F.scaled_dot_product_attention(query, k, v, pattern, scale=scoring.scale, enable_gqa=True)
        return out.transpose(1, 2)
    if new.tokens is None:
        return _causal(query, k, v, scoring).transpose(1, 2)
    out = torch.zeros_like(query)
    for row in range(new.batch):
        columns = new.tokens[row].nonzero().flatten().to(query.device)
        q_row, k_row, v_row = (x[row : row + 1, :, columns] for x in (query, k, v))
        out[row, :, columns] = _causal(q_row, k_row, v_row, scoring)[0]
    return out.transpose(1, 2)


def attend_dense(query: Tensor, k: Tensor, v: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Plain attention with a mask [batch, 1, count, columns]: [batch, count, query heads, d]."""
    rows = []
    for q_row, k_row, v_row, mask_row in zip(query, k, v, mask, strict=True):
        q, keys, values = (x.transpose(0, 1) for x in (q_row, k_row, v_row))
        rows.append(attend(q, keys, values, mask=mask_row[0], **scoring.options)[0])
    return torch.stack(rows).to(query.dtype)


def _causal(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """Causal attention over [batch, heads, count, d] without padding."""
    if scoring.plain:
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, scale=scoring.scale, enable_gqa=True)
    out = torch.empty_like(q)
    for row in range(q.shape[0]):
        for start in range(0, q.shape[2], ROWS_AT_ONCE):
            stop = min(start + ROWS_AT_ONCE, q.shape[2])
            mask = causal_mask(stop - start, 0, stop, start, device=q.device)
            queries, keys, values = q[row, :, start:stop], k[row, :, :stop], v[row, :, :stop]
            parts = (x.transpose(0, 1) for x in (queries, keys, values))
            piece, _ = attend(*parts, mask=mask, **scoring.options)
            out[row, :, start:stop] = piece.transpose(0, 1).to(q.dtype)
    return out


class _Rows:
    """A later step's new tokens of one layer, row after row without padding."""

    def __init__(self, step: Step, query: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> None:
        self.step, self.shape, self.scoring = step, query.shape, scoring
        self.raw = k, v
        self.q = self._flatten(query)

    def unflatten(self, out: Tensor) -> Tensor:
        """[tokens, heads, d] -> [batch, count, heads, d], 0 for padding."""
        batch, heads, count, d = self.shape
        if self.step.flat is not None:
            out = out.new_zeros(batch * count, heads, d).index_copy(0, self.step.flat, out)
        return out.view(batch, count, heads, d)

    def decode(self, group: Group, layer: int) -> Tensor:
        """Over the pages, the new tokens included."""
        step = self.step
        single = self.shape[2] == 1 and step.flat is None
        return ops.decode(
            self.q, group.pages.pages[layer], step.table, step.lens, q_lens=None if single else step.q_lens,
            schedule=group.schedules, **self.scoring.options, **_page_options(group, layer),
        )[0]  # fmt: skip

    def prefix(self, group: Group, layer: int) -> tuple[Tensor, Tensor]:
        """Over the raw chunk and the pages before it."""
        step = self.step
        k, v = (self._flatten(x) for x in self.raw)
        return ops.prefix_attention(
            self.q, k, v, group.pages.pages[layer], step.table, step.lens_before,
            q_lens=step.q_lens, **self.scoring.options, **_page_options(group, layer),
        )  # fmt: skip

    def windowed(self, group: Group, layer: int, windows: WindowTensors) -> Tensor:
        """Over the raw chunk, the windows and the pages before them."""
        if self.shape[2] > MAX_Q_LEN:
            parts = [self.prefix(group, layer), self._over_windows(windows)]
        else:
            parts = [self._over_windows_and_chunk(group, windows)]
            if any(self.step.before):
                parts.append(self._over_pages(group, layer))
        return merge(parts)[0].to(self.q.dtype)

    def _flatten(self, x: Tensor) -> Tensor:
        """[batch, heads, count, d] -> [tokens, heads, d]."""
        rows = x.transpose(1, 2).flatten(0, 1)
        return rows if self.step.flat is None else rows[self.step.flat]

    def _over_pages(self, group: Group, layer: int) -> tuple[Tensor, Tensor]:
        """Every token over the pages that were there before, as a sequence of its own: there is no order among them."""
        table, lens = self.step.by_token()
        return ops.decode(
            self.q, group.pages.pages[layer], table, lens, schedule=group.schedules,
            **replace(self.scoring, sinks=None).options, **_page_options(group, layer),
        )  # fmt: skip

    def _over_windows_and_chunk(self, group: Group, windows: WindowTensors) -> tuple[Tensor, Tensor]:
        """All rows at once, with a mask that keeps them apart: there are few tokens."""
        sides = [
            torch.cat((windows.sink[i], windows.recent[i], raw.transpose(1, 2)), 1).flatten(0, 1)
            for i, raw in enumerate(self.raw)
        ]
        return attend(self.q, *sides, mask=group.near_mask(), **self.scoring.options)

    def _over_windows(self, windows: WindowTensors) -> tuple[Tensor, Tensor]:
        parts, start = [], 0
        for row, count in enumerate(self.step.new.lengths):
            sink, recent = self.step.sink[row], self.step.recent[row]
            k, v = (torch.cat((windows.sink[i, row, :sink], windows.recent[i, row, :recent])) for i in range(2))
            mask = torch.ones(1, 1, dtype=torch.bool, device=k.device).expand(count, len(k))
            options = replace(self.scoring, sinks=None).options
            parts.append(attend(self.q[start : start + count], k, v, mask=mask, **options))
            start += count
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _page_options(group: Group, layer: int) -> dict[str, Any]:
    pages = group.pages
    channels = None if pages.outlier_channels is None else pages.outlier_channels[layer]
    return {"fmt": pages.fmt, "outlier_channels": channels, "backend": pages.backend}
