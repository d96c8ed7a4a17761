"""Registries of tasks, metrics and baselines: a new one is one file with a decorator on it.

A *task* measures a model with several caches, prompt by prompt; a *served task* asks vLLM servers the same questions. A *metric*
compares two caches' logits token by token. A *baseline* makes a cache that is not in one of kvturbo's formats, such as the 16-bit
one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from kvturbo.eval.caches import CacheSpec
    from kvturbo.eval.codec import Codec
    from kvturbo.eval.model import LoadedModel, PromptSource
    from kvturbo.eval.served_model import ServedModel, ServerSpec

T = TypeVar("T")
E = TypeVar("E")
Record = dict[str, Any]
"""What one prompt gave with one cache; anything JSON can hold."""


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: what they are called in error messages.
        package: a package whose modules register them; imported when they are first asked for.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind, self.package = kind, package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[E], E]:
        """A decorator that registers what it decorates.

        Raises:
            ValueError: the name is taken.
        """

        def enter(entry: E) -> E:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = cast(T, entry)
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            ValueError: there is none; the message lists the names.
        """
        if name not in self.names():
            raise ValueError(f"unknown {self.kind} {name!r}; valid: {', '.join(self.names())}")
        return self._entries[name]

    def names(self) -> list[str]:
        """All names in alphabetical order, whichever module was imported first."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        return sorted(self._entries)


class Task(Protocol):
    """A measurement. Implementations are dataclasses whose fields are the task's options, with defaults."""

    def count(self) -> int:
        """Number of prompts."""

    def check(self, loaded: PromptSource) -> None:
        """Raises ValueError or FileNotFoundError unless the task can be run with this model and its text."""

    def measure(self, loaded: LoadedModel, index: int, specs: list[CacheSpec]) -> dict[str, Record]:
        """Runs prompt `index`: one raw prefill, packed once per cache. Records by cache name."""

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        """The figures of one cache from the records of all prompts."""


@runtime_checkable
class ServedTask(Task, Protocol):
    """A task whose questions a server can be asked; the same options and prompts, and records without bytes.

    Attributes:
        alone: whether a server must read one prompt at a time, so that chunks end where its settings say.
    """

    alone: bool

    def check_served(self, served: ServedModel) -> None:
        """Raises ValueError unless the servers can be asked so and what they read of a packed cache is known."""

    def ask(self, served: ServedModel, spec: ServerSpec, index: int) -> Record:
        """Sends prompt `index` to one server.

        Raises:
            ServerError: it can't be reached or refuses.
        """

    def compare(self, pairs: list[tuple[Record, Record]]) -> dict[str, Any]:
        """Figures against the 16-bit cache, from its records and another's of the same prompts."""


@dataclass(frozen=True)
class Metric:
    """A number per scored token, and its summary.

    Attributes:
        per_token: (reference logits [n, V], logits [n, V], next tokens [n] int64) -> [n] float.
        summarise: [all scored tokens] float64 -> named figures.
    """

    per_token: Callable[[Tensor, Tensor, Tensor], Tensor]
    summarise: Callable[[Tensor], dict[str, float]]


@dataclass(frozen=True)
class Baseline:
    """Makes transformers caches that are not kvturbo's.

    A cache has `nbytes()`, `sixteen_bit_nbytes()` and `packed_tokens_read` (0 where nothing is packed) as a TurboCache has.

    Attributes:
        new: (model configuration) -> an empty cache.
        from_raw: (raw cache of a prefill) -> a cache with its contents; the raw one is not changed.
        codec: what its tokens are read through, None where they are kept as they are.
    """

    new: Callable[[Any], Any]
    from_raw: Callable[[Any], Any]
    codec: Codec | None = None


TASKS: Registry[Callable[..., Task]] = Registry("task", "kvturbo.eval.tasks")
SERVED_TASKS: Registry[Callable[..., ServedTask]] = Registry("task", "kvturbo.eval.served")
METRICS: Registry[Metric] = Registry("metric", "kvturbo.eval.metrics")
BASELINES: Registry[Baseline] = Registry("baseline", "kvturbo.eval.baselines")
