"""What is compared: providers of decode attention, each in a module of `kvturbo.bench.providers`.

A *provider* turns a case into a call that does one layer's decode attention, 16-bit queries in and 16-bit outputs out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from kvturbo.config import PAGE_SIZE
from kvturbo.eval.registry import Registry

if TYPE_CHECKING:
    from kvturbo.bench.decode import Inputs

Call = Callable[[], Any]


class MissingError(RuntimeError):
    """A provider is not installed here or can't do a case; the message says why."""


@dataclass(frozen=True)
class Case:
    """A shape of decode attention.

    Attributes:
        batch, context: sequences, and tokens of each in the cache (the longest, if ragged).
        kv_heads, group, head_dim: heads, query heads per KV head, channels.
        q_len: new tokens of each sequence.
        format: name of kvturbo's format; other providers do not look at it.
        ragged: lengths log-uniform from `SHORTEST` to context instead of all equal.
        page_size: tokens per page, for every provider.
        recent: newest tokens that kvturbo reads raw, from rings; other providers do not look at it.
    """

    batch: int
    context: int
    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128
    q_len: int = 1
    format: str = "k4v4"
    ragged: bool = False
    page_size: int = PAGE_SIZE
    recent: int = 0

    SHORTEST = 128

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if not self.ragged:
            return [self.context] * self.batch
        exponent = torch.rand(self.batch, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return [int(self.SHORTEST * (self.context / self.SHORTEST) ** float(e)) for e in exponent]

    def baseline(self) -> Case:
        """The same shape in the default format, all packed: what other providers depend on."""
        return replace(self, format=Case.format, recent=Case.recent)


@dataclass(frozen=True)
class Provider:
    """Something that does decode attention.

    Attributes:
        prepare: (inputs) -> a call; raises `MissingError` where it can't.
        packed: whether it reads kvturbo's pages, so that its result can be checked.
        every_format: whether it is timed for other formats than the default and for raw tokens, which compiles a kernel for
            each.
    """

    prepare: Callable[[Inputs], Call]
    packed: bool = False
    every_format: bool = True


PROVIDERS: Registry[Provider] = Registry("provider", "kvturbo.bench.providers")
