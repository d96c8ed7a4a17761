"""How far a run of benchmarks/vllm_serving.py has come: what waits for which GPU, what is left when an engine fails, and which
figures new ones replace.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvturbo.bench.vllm_rows import Job


class Queue:
    """Engines that wait for a GPU, for the threads that serve one each.

    Args:
        todo: the engines of every round of every model.

    Attributes:
        closed: whether what is at work is not to go on either.
    """

    def __init__(self, todo: Sequence[Sequence[Job]]) -> None:
        self._todo = [list(engines) for engines in todo if engines]
        self._served: dict[int, set[tuple[str, str]]] = defaultdict(set)
        self._lock = threading.Lock()
        self.closed = False

    def close(self) -> None:
        """Leaves nothing to do."""
        with self._lock:
            self.closed, self._todo = True, []

    def next(self, gpu: int | None = None) -> list[Job]:
        """The engines of the next process, none if none is left: all of the next round, or for one of several GPUs one of the next
        round's, of a cache dtype that this GPU has not served yet if there is one: then rounds are measured on different GPUs.
        """
        with self._lock:
            if not self._todo:
                return []
            if gpu is None:
                return self._todo.pop(0)
            served, engines = self._served[gpu], self._todo[0]
            new = (job for job in engines if (job.model, job.cache_dtype) not in served)
            job = next(new, engines[0])
            engines.remove(job)
            self._todo = [left for left in self._todo if left]
            served.add((job.model, job.cache_dtype))
            return [job]


@dataclass
class Progress:
    """How far a process of benchmarks/vllm_serving.py has come, as its lines tell.

    Attributes:
        engines: its jobs.
        begun: how many of them have begun.
        measure: the last one's present measure, if any.
        values: figures of the last one so far.
        failed: whether the last one failed.
    """

    engines: Sequence[Job]
    begun: int = 0
    measure: str | None = None
    values: int = 0
    failed: bool = False

    def note(self, line: Mapping[str, Any]) -> bool:
        """Notes a line; returns whether it is for others to take: a figure or a failure."""
        if "engine" in line:
            self.begun, self.measure, self.values = self.begun + 1, None, 0
        elif "measure" in line:
            self.measure = line["measure"]
        else:
            self.failed = "error" in line
            self.values += not self.failed
        return not {"engine", "measure"} & set(line)

    def failure(self, error: str) -> dict[str, Any]:
        """The line of a process that died: of the engine that is at work, of all if none has begun."""
        at_work = self.engines[self.begun - 1 : self.begun] if self.begun else self.engines
        names = ", ".join(job.cache_dtype for job in at_work)
        return at_work[-1].facts() | {"kv_cache_dtype": names, "error": error}

    def rest(self) -> list[Job]:
        """What is left to measure: the measures after the one that failed, if the engine has given figures, and later engines.
        Nothing if no engine has begun: that would fail again.
        """
        if not self.begun:
            return []
        last, later = self.engines[self.begun - 1], list(self.engines[self.begun :])
        if self.failed and self.values and self.measure:
            measures = last.measures[last.measures.index(self.measure) + 1 :]
            later = [replace(last, measures=measures)] * bool(measures) + later
        return later


def add_value(values: list[dict[str, Any]], value: dict[str, Any]) -> None:
    """Adds a figure, and drops those of other commits that it replaces: a median is of one commit's runs. Figures of other sizes of
    rings stay, and have medians of their own.
    """

    def replaced(old: Mapping[str, Any]) -> bool:
        return old["commit"][:12] != value["commit"][:12] and all(
            old[name] == value[name] for name in ("what", "model", "kv_cache_dtype", "recent")
        )

    values[:] = [*(old for old in values if not replaced(old)), value]
