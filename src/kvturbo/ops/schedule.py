"""The schedule: which worker takes which part of which sequence, planned on the device, once per step for all layers.

Sequences are cut into blocks of `BLOCK` tokens. All blocks of a batch form one line, and every worker takes an equal run of it,
so a run may end one sequence and begin the next. The launch shape depends on nothing but the batch size: lengths stay on the
device, and a CUDA graph that was captured with some lengths replays with others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvturbo.cuda.source import pointer
from kvturbo.ops.checks import MAX_Q_LEN

BLOCK = 128
"""Tokens in a block."""


@dataclass(frozen=True)
class Schedule:
    """A plan for one step; valid for every layer with the same window.

    Attributes:
        blocks: [B + 1] int32, blocks of all sequences before each one, those that no query sees left out; the last is the total.
        rows: [B + 1] int32, queries before each sequence, or None if every sequence has one.
        window: the window it was planned for.
        max_q_len: no sequence has more queries than this.
        recent_counts: of the `kvturbo.ops.recent.Recent` it was planned for, or None.
    """

    blocks: Tensor
    rows: Tensor | None
    window: int | None
    max_q_len: int
    recent_counts: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds on the device."""
        return [self.blocks] if self.rows is None else [self.blocks, self.rows]

    def check(self, batch: int, window: int | None, q_lens: Tensor | None, recent_counts: Tensor | None) -> None:
        """Raises ValueError unless the schedule fits a call."""
        if self.blocks.shape[0] != batch + 1:
            raise ValueError(f"schedule is for {self.blocks.shape[0] - 1} sequences, got {batch}")
        if self.window != window:
            raise ValueError(f"schedule is for window {self.window}, got window {window}")
        if (self.rows is None) != (q_lens is None):
            raise ValueError(
                f"schedule was planned {'without' if self.rows is None else 'with'} q_lens, decode was not"
            )
        if pointer(self.recent_counts) != pointer(recent_counts):
            raise ValueError("schedule was planned with other recent_counts than those of this call's recent")


def plan(
    seq_lens: Tensor,
    *,
    q_lens: Tensor | None = None,
    seq_starts: Tensor | None = None,
    window: int | None = None,
    recent_counts: Tensor | None = None,
    max_q_len: int = MAX_Q_LEN,
) -> Schedule:
    """Plans a step; no host synchronisation.

    Args:
        seq_lens, q_lens, seq_starts, window: as in `kvturbo.ops.decode`.
        recent_counts: of the calls' `recent`: the very tensor.
        max_q_len: an upper bound of q_lens; a tighter one makes faster launches. Without q_lens it is 1.

    Raises:
        ValueError: max_q_len is not from 1 to 8.
    """
    if not 1 <= max_q_len <= MAX_Q_LEN:
        raise ValueError(f"max_q_len must be from 1 to {MAX_Q_LEN}, got {max_q_len}")
    packed = seq_lens if recent_counts is None else seq_lens - recent_counts
    counts = (packed + (BLOCK - 1)) // BLOCK
    if window is not None or seq_starts is not None:
        counts = counts - first_seen(seq_lens, q_lens, seq_starts, window) // BLOCK
    if q_lens is not None:
        counts = torch.where(q_lens > 0, counts, 0)
    rows = None if q_lens is None else _before(q_lens)
    return Schedule(_before(counts.clamp(min=0)), rows, window, 1 if q_lens is None else max_q_len, recent_counts)


def first_seen(seq_lens: Tensor, q_lens: Tensor | None, seq_starts: Tensor | None, window: int | None) -> Tensor:
    """The first position of each sequence that one of its queries may see: [B] int32."""
    first = torch.zeros_like(seq_lens)
    if window is not None:
        first = (seq_lens - (1 if q_lens is None else q_lens) - (window - 1)).clamp(min=0)
    return first if seq_starts is None else torch.maximum(first, seq_starts)


def _before(counts: Tensor) -> Tensor:
    total = torch.zeros(counts.shape[0] + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=total[1:])
    return total
