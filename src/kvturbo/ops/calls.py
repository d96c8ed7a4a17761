"""Calls that have been checked before. A decode step makes one call per layer, each like the last, and the host must keep up.

Checks look at shapes, strides, dtypes and devices, and at values only where those are on the host. So a call on a GPU that
differs from a checked one in nothing but values and addresses would pass them again.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import torch
from torch import Tensor

Run = TypeVar("Run")
MOST_KINDS = 1024
"""Kinds of calls that are remembered per operation; a model has a few, and more as its block tables grow wider."""


def traits(x: Tensor) -> Hashable:
    """What the checks see of a tensor that is not on the host; `ops.decode` and `ops.store` write it out where every call has one.

    True instead of a contiguous tensor's strides takes half the time.
    """
    return (x.shape, x.is_contiguous() or x.stride(), x.dtype, x.device)


class CheckedCalls(Generic[Run]):
    """What runs each kind of call that passed its checks.

    Attributes:
        last: the last call's kind and what ran it. A caller compares kinds itself: that takes half the time of `get`.
    """

    def __init__(self) -> None:
        self._runs: dict[Hashable, Run] = {}
        self.last: tuple[Hashable, Run | None] = None, None

    def get(self, kind: Hashable) -> Run | None:
        """What runs a kind of call, or None if it must be checked."""
        run = self._runs.get(kind)
        if run is not None:
            self.last = kind, run
        return run

    def remember(self, kind: Hashable, run: Run, device: torch.device, *numbers: object) -> None:
        """Notes that a kind of call has passed, unless its checks depend on more than its kind.

        Args:
            kind: everything the checks depend on, for tensors their `traits`.
            run: what runs it.
            device: of its tensors; on the host values are looked at, in every call.
            numbers: options that are in `kind` by value; tensors among them could change.
        """
        if device.type == "cpu" or not all(x is None or isinstance(x, float | int) for x in numbers):
            return
        if len(self._runs) >= MOST_KINDS:
            self._runs.clear()
        self._runs[kind] = run
