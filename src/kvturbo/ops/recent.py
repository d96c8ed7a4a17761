"""The newest tokens, raw, beside the packed pages.

A token that was written a moment ago is read with a large weight, and on its own: its error is averaged with no other's. So the
few newest tokens of each sequence can be kept as they came, in a ring per sequence. They lie in pages too, and are read there
once newer ones have taken their places.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kvturbo.ops import checks

RING_SIZES = (8, 16, 32)


class Recent(NamedTuple):
    """Rings of raw keys and values, and which of them each sequence reads.

    Attributes:
        rows: [rings, num_kv_heads, 2, R, d] in the queries' dtype, R 8, 16 or 32: keys, then values; those of position p at
            index p % R.
        slots: [B] int32, the ring of each sequence; not looked at where the count is 0.
        counts: [B] int32, 0 to R: how many of the sequence's newest tokens are read from its ring and not from pages.
    """

    rows: Tensor
    slots: Tensor
    counts: Tensor

    @property
    def size(self) -> int:
        """Tokens of a ring."""
        return self.rows.shape[3]


def check_recent(recent: Recent | None, q: Tensor, seq_lens: Tensor, pages: Tensor) -> None:
    """Raises ValueError unless the rings fit the queries, the pages and the lengths."""
    if recent is None:
        return
    _check_rows("recent.rows", recent.rows, q, pages)
    for name, x in (("recent.slots", recent.slots), ("recent.counts", recent.counts)):
        checks.check_tensor(name, x, (len(seq_lens),), torch.int32, pages)
    checks.check_range("recent.counts", recent.counts, 0, recent.size)
    if seq_lens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if (recent.counts > seq_lens).any():
        raise ValueError(
            f"recent.counts must not be above seq_lens, got {recent.counts.tolist()} and {seq_lens.tolist()}"
        )
    checks.check_range("recent.slots", recent.slots[recent.counts > 0], 0, len(recent.rows) - 1)


def check_recent_places(rows: Tensor | None, slots: Tensor | None, k: Tensor, v: Tensor, pages: Tensor) -> None:
    """Raises ValueError unless a store's rings and places in them fit its keys, values and pages, or both are None."""
    if rows is None or slots is None:
        if (rows is None) != (slots is None):
            given, missing = ("recent_slots", "recent_rows") if rows is None else ("recent_rows", "recent_slots")
            raise ValueError(
                f"recent_rows and recent_slots go together: give both or none, got {given} without {missing}"
            )
        return
    if k.dtype != v.dtype:
        raise ValueError(f"k and v must have one dtype to go into recent_rows, got {k.dtype} and {v.dtype}")
    _check_rows("recent_rows", rows, k, pages)
    checks.check_tensor("recent_slots", slots, (len(k),), torch.int64, pages)
    checks.check_range("recent_slots", slots, -1, rows.shape[0] * rows.shape[3] - 1)


def _check_rows(name: str, rows: Tensor, like: Tensor, pages: Tensor) -> None:
    """Raises ValueError unless rows are rings as `Recent.rows` for queries or keys `like`."""
    checks.check_tensor(name, rows, (None, pages.shape[1], 2, None, like.shape[2]), like.dtype, pages)
    if rows.shape[3] not in RING_SIZES:
        valid = ", ".join(map(str, RING_SIZES))
        raise ValueError(f"{name} must hold {valid} tokens per ring, got {rows.shape[3]} ({list(rows.shape)})")
    if not rows.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {rows.stride()}")
