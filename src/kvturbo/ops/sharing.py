"""Schedules that the layers of a step share without anybody having to make them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

MOST_KINDS = 16
"""Kinds of layers whose schedules are kept."""
Lens = tuple[Tensor | None, ...]


class SharedSchedules:
    """Passed as `schedule` to every decode of a model: the first layer of each kind makes a step's plan, the others use it.

    Layers are of a kind if one plan serves them all: the same batch, heads, dtypes, window, stream. A plan is made anew when
    seq_lens, q_lens or seq_starts is another tensor than in the kind's last call, or has been changed in place since. (torch
    does not count changes of tensors made in inference mode; give a step new tensors there.) Calls in a CUDA graph's capture
    or in torch.compile share nothing. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Lens, tuple[int, ...], Any]] = {}

    def get(self, kind: Hashable, lens: Lens, make: Callable[[Any], Any]) -> Any:
        """The schedule of a kind of layer for these lengths.

        Args:
            kind: everything but the lengths that a schedule depends on.
            lens: seq_lens, q_lens, seq_starts.
            make: makes a schedule; it gets the kind's last one, whose memory it may use again, or None.
        """
        versions = tuple([-1 if x is None or x.is_inference() else x._version for x in lens])
        made = self._made.pop(kind, None)  # gone if `make` fails
        if made is None or made[1] != versions or any(a is not b for a, b in zip(made[0], lens, strict=True)):
            if len(self._made) >= MOST_KINDS:
                self._made.clear()
            made = lens, versions, make(made and made[2])
        self._made[kind] = made
        return made[2]

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps on the device, workspaces that others use too not counted."""
        return [x for lens, _, schedule in self._made.values() for x in (*lens, *schedule.tensors) if x is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSchedules:
        """One without schedules: a copy of a cache makes its own."""
        return SharedSchedules()
