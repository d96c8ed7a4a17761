"""Schedules that the layers of a step share without anybody having to make them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

MOST_KINDS = 16
"""Kinds of layers whose schedules are kept."""


@dataclass(frozen=True)
class _Made:
    """A schedule, and the lengths it was made for as they were then."""

    seq_lens: Tensor
    q_lens: Tensor | None
    seq_starts: Tensor | None
    versions: list[tuple[Tensor, int]]
    schedule: Any

    @property
    def tensors(self) -> list[Tensor]:
        lens = self.seq_lens, self.q_lens, self.seq_starts
        return [x for x in (*lens, *self.schedule.tensors) if x is not None]


class SharedSchedules:
    """Passed as `schedule` to every decode of a model: the first layer of each kind makes a step's plan, the others use it.

    Layers are of a kind if one plan serves them all: the same batch, heads, dtypes, window, stream. A plan is made anew when
    seq_lens, q_lens or seq_starts is another tensor than in the kind's last call, or has been changed in place since. (torch
    does not count changes of tensors made in inference mode; give a step new tensors there.) Calls in a CUDA graph's capture
    or in torch.compile share nothing. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, _Made] = {}

    def find(self, kind: Hashable, seq_lens: Tensor, q_lens: Tensor | None, seq_starts: Tensor | None) -> Any:
        """The schedule that a kind of layer has for these lengths, or None if it must be made."""
        made = self._made.get(kind)
        if (
            made is None
            or made.seq_lens is not seq_lens
            or made.q_lens is not q_lens
            or made.seq_starts is not seq_starts
        ):
            return None
        for x, version in made.versions:
            if x._version != version:
                return None
        return made.schedule

    def make(
        self,
        kind: Hashable,
        seq_lens: Tensor,
        q_lens: Tensor | None,
        seq_starts: Tensor | None,
        make: Callable[[Any], Any],
    ) -> Any:
        """Makes a schedule and keeps it.

        Args:
            kind: everything but the lengths that a schedule depends on.
            seq_lens, q_lens, seq_starts: as in `kvturbo.ops.decode`.
            make: gets the kind's last schedule, whose memory it may use again, or None.
        """
        last = self._made.pop(kind, None)  # gone if `make` fails
        if len(self._made) >= MOST_KINDS:
            self._made.clear()
        lens = [x for x in (seq_lens, q_lens, seq_starts) if x is not None]
        versions = [(x, x._version) for x in lens if not x.is_inference()]
        schedule = make(last and last.schedule)
        self._made[kind] = _Made(seq_lens, q_lens, seq_starts, versions, schedule)
        return schedule

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps on the device, workspaces that others use too not counted."""
        return [x for made in self._made.values() for x in made.tensors]

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSchedules:
        """One without schedules: a copy of a cache makes its own."""
        return SharedSchedules()
