"""The 16-bit windows of a layer: the first `sink` and the last `recent` tokens of every row, beside the packed pages.

Tokens of a row are in order: sink, packed, recent. A new token goes to the sink until that is full, then to the recent
window; what leaves the recent window at its front is packed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Fill:
    """How many tokens of each row are in the sink and in the recent window."""

    sink: list[int]
    recent: list[int]

    @classmethod
    def empty(cls, batch: int) -> Fill:
        return cls([0] * batch, [0] * batch)

    def select(self, index: list[int]) -> None:
        """Row i becomes what row index[i] was."""
        self.sink = [self.sink[i] for i in index]
        self.recent = [self.recent[i] for i in index]


@dataclass
class Moves:
    """Where a step's tokens go, for one layout of windows. Sources count a row's recent window first, then its new columns.

    Attributes:
        packed: per row, the sources that are packed, in order.
        sink: (row, place in the sink, source) of tokens that enter the sink.
        recent: per row, the sources that make up the recent window afterwards.
    """

    packed: list[list[int]] = field(default_factory=list)
    sink: list[tuple[int, int, int]] = field(default_factory=list)
    recent: list[list[int]] = field(default_factory=list)


def plan_moves(fill: Fill, sink: int, recent: int, places: list[list[int]]) -> Moves:
    """Distributes new tokens.

    Args:
        fill: the windows now.
        sink, recent: their sizes in tokens.
        places: per row, the new columns that are tokens.
    """
    moves = Moves()
    for row, columns in enumerate(places):
        sources = [recent + column for column in columns]
        entering = min(sink - fill.sink[row], len(sources))
        moves.sink += [(row, fill.sink[row] + i, source) for i, source in enumerate(sources[:entering])]
        queue = list(range(fill.recent[row])) + sources[entering:]
        leaving = max(0, len(queue) - recent)
        moves.packed.append(queue[:leaving])
        moves.recent.append(queue[leaving:])
    return moves


class WindowTensors:
    """The windows of one layer.

    Args:
        batch, sink, recent: rows and sizes in tokens.
        like: a tensor [..., heads, tokens, d] of the layer's keys, for shape and device; the windows are fp16 if it is, else bf16.
    """

    def __init__(self, batch: int, sink: int, recent: int, like: Tensor) -> None:
        heads, d = like.shape[1], like.shape[3]
        dtype = torch.float16 if like.dtype == torch.float16 else torch.bfloat16
        self.sink = like.new_zeros(2, batch, sink, heads, d, dtype=dtype)
        self.recent = like.new_zeros(2, batch, recent, heads, d, dtype=dtype)

    @classmethod
    def of(cls, sink: Tensor, recent: Tensor) -> WindowTensors:
        """Windows with given contents, [2, batch, tokens, heads, d] each."""
        windows = cls.__new__(cls)
        windows.sink, windows.recent = sink, recent
        return windows

    @property
    def tensors(self) -> list[Tensor]:
        return [self.sink, self.recent]

    def select(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        self.sink = self.sink.index_select(1, index.to(self.sink.device))
        self.recent = self.recent.index_select(1, index.to(self.recent.device))

    def insert(self, k: Tensor, v: Tensor, plan: WindowPlan) -> None:
        """Takes new keys and values [batch, tokens, heads, d] in; what leaves must have been packed before."""
        for side, new in enumerate((k.to(self.sink.dtype), v.to(self.sink.dtype))):
            if plan.sink_rows is not None:
                assert plan.sink_places is not None
                assert plan.sink_columns is not None
                self.sink[side, plan.sink_rows, plan.sink_places] = new[plan.sink_rows, plan.sink_columns]
            if plan.recent_old is not None:
                assert plan.recent_new is not None
                assert plan.recent_from_old is not None
                rows = torch.arange(new.shape[0], device=new.device)[:, None]
                old = self.recent[side][rows, plan.recent_old]
                self.recent[side] = torch.where(plan.recent_from_old, old, new[rows, plan.recent_new])


class WindowPlan:
    """`Moves` as index tensors on a device, for all layers of a step.

    Args:
        moves: where tokens go.
        recent: size of the recent window.
        device: of the layers.
    """

    def __init__(self, moves: Moves, recent: int, device: torch.device) -> None:
        self.sink_rows = self.sink_places = self.sink_columns = None
        self.recent_old = self.recent_new = self.recent_from_old = None
        if moves.sink:
            rows, places, sources = torch.tensor(moves.sink, device=device).T
            self.sink_rows, self.sink_places, self.sink_columns = rows, places, sources - recent
        if recent:
            padded = [sources + [0] * (recent - len(sources)) for sources in moves.recent]
            source = torch.tensor(padded, device=device)
            self.recent_old, self.recent_new = source.clamp(max=recent - 1), (source - recent).clamp(min=0)
            self.recent_from_old = (source < recent)[..., None, None]
