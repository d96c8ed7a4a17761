"""Runs tasks over caches, prompt by prompt, and picks up where an interrupted run stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from kvturbo.eval.caches import REFERENCE
from kvturbo.eval.registry import Record, ServedTask, Task
from kvturbo.eval.report import environment, write_json
from kvturbo.files import whole_file

Progress = Callable[[str], None]


class Spec(Protocol):
    """A cache that is measured."""

    @property
    def name(self) -> str:
        """Its row's name."""


class Subject(Protocol):
    """What is measured: a model in this process (`LoadedModel`) or behind servers (`ServedModel`)."""

    def settings(self, specs: Any) -> dict[str, Any]:
        """What all records of a journal share; "model" is among it."""

    def check(self, task: Any) -> None:
        """Raises ValueError or FileNotFoundError unless the task can be run."""

    def measure(self, task: Any, todo: Mapping[int, list[Any]]) -> Iterator[tuple[int, dict[str, Record]]]:
        """Runs prompts, each over the caches it lacks; yields records by cache name, a prompt's all at once or not."""


class Journal:
    """Records of single prompts. With a path they go to a file of JSON lines as they come, and are read back from it.

    Args:
        path: the file, or None to keep records in memory only.
        settings: what must be the same for records to be comparable; the file's first line.

    Raises:
        ValueError: the file was written with other settings, or is not a journal.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self._records: dict[tuple[str, int, str], Record] = {}
        if path is None:
            return
        if path.exists():
            self._read(path, settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def has(self, task: str, index: int, cache: str) -> bool:
        return (task, index, cache) in self._records

    def add(self, task: str, index: int, records: dict[str, Record]) -> None:
        """Keeps the records of one prompt; those that are there already stay."""
        new = {cache: record for cache, record in records.items() if not self.has(task, index, cache)}
        self._records |= {(task, index, cache): record for cache, record in new.items()}
        if self.path is not None and new:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": task, "index": index, "records": new}) + "\n")

    def caches(self, task: str) -> list[str]:
        """Caches with records of a task, in the order in which they came."""
        return list(dict.fromkeys(cache for name, _, cache in self._records if name == task))

    def pairs(self, task: str, reference: str, cache: str) -> list[tuple[Record, Record]]:
        """Records of two caches, of the prompts that both have, in their order."""
        both = sorted(
            i for name, i, found in self._records if (name, found) == (task, cache) and self.has(name, i, reference)
        )
        return [(self._records[task, i, reference], self._records[task, i, cache]) for i in both]

    def records(self, task: str, cache: str) -> list[Record]:
        """Records of a task and a cache in the order of the prompts."""
        found = [(key[1], record) for key, record in self._records.items() if (key[0], key[2]) == (task, cache)]
        return [record for _, record in sorted(found, key=lambda entry: entry[0])]

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        whole = path.read_bytes().rpartition(b"\n")[0]  # a line without an end was being written when the run was cut
        before, entries = _parsed(path, whole)
        if before != settings:
            raise ValueError(f"{path} was written with other settings: {_differences(before, settings)}")
        os.truncate(path, len(whole) + 1)
        for entry in entries:
            task, index = entry["task"], entry["index"]
            self._records |= {(task, index, cache): record for cache, record in entry["records"].items()}


class Evaluation:
    """Tasks to be run over caches.

    Args:
        loaded: the model.
        tasks: by name.
        specs: the caches, the 16-bit one among them if it is wanted in the results.
        path: the results file, rewritten after every prompt; its journal lies beside it. None: keep results in memory.
        earlier: whether results have rows of the journal's other caches too.

    Raises:
        ValueError, FileNotFoundError: a task can't be run with this model, or the journal was written with other settings.
        IsADirectoryError: the path is a folder.
    """

    def __init__(
        self,
        loaded: Subject,
        tasks: Mapping[str, Task],
        specs: Sequence[Spec],
        path: Path | None = None,
        *,
        earlier: bool = False,
    ) -> None:
        self.loaded, self.tasks, self.specs, self.path, self.earlier = loaded, tasks, specs, path, earlier
        if path is not None and path.is_dir():
            raise IsADirectoryError(f"results must go to a file, got the folder {path}")
        for task in tasks.values():
            loaded.check(task)
        self.journal = Journal(None if path is None else path.with_suffix(".records.jsonl"), self.settings())
        self._environment = environment()

    def settings(self) -> dict[str, Any]:
        """What all records of a journal share."""
        return self.loaded.settings(self.specs)

    def prompts(self) -> int:
        """Prompts of all tasks together."""
        return sum(task.count() for task in self.tasks.values())

    def run(self, progress: Progress = lambda _: None) -> dict[str, Any]:
        """Measures what the journal lacks and returns the results; `progress` gets the task's name after each prompt."""
        for name, task in self.tasks.items():
            todo = {index: self._missing(name, index) for index in range(task.count())}
            for _ in range(task.count() - sum(map(bool, todo.values()))):
                progress(name)
            for index, records in self.loaded.measure(task, {i: specs for i, specs in todo.items() if specs}):
                self.journal.add(self._key(name), index, records)
                self._write()
                if not self._missing(name, index):
                    progress(name)
        self._write()
        return self.results()

    def results(self) -> dict[str, Any]:
        """Figures of every task and cache from the records so far."""
        tasks = {
            name: {"options": options_of(task), "prompts": task.count(), "caches": self._caches(name, task)}
            for name, task in self.tasks.items()
        }
        return {"environment": self._environment, "settings": self.settings(), "tasks": tasks}

    def _caches(self, name: str, task: Task) -> dict[str, Any]:
        key, caches = self._key(name), {}
        for cache in dict.fromkeys(
            [spec.name for spec in self.specs] + (self.journal.caches(key) if self.earlier else [])
        ):
            if records := self.journal.records(key, cache):
                caches[cache] = task.summarise(records) | self._compared(key, task, cache) | _facts(records)
        return caches

    def _compared(self, key: str, task: Task, cache: str) -> dict[str, Any]:
        """Figures of a served task against the 16-bit cache, none without its records; other tasks have theirs in the records."""
        if not isinstance(task, ServedTask):
            return {}
        pairs = self.journal.pairs(key, REFERENCE, cache)
        return task.compare(pairs) if pairs else {}

    def _missing(self, name: str, index: int) -> list[Spec]:
        return [spec for spec in self.specs if not self.journal.has(self._key(name), index, spec.name)]

    def _key(self, name: str) -> str:
        return f"{name} {json.dumps(options_of(self.tasks[name]), sort_keys=True)}"

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.results())


def options_of(task: Task) -> dict[str, Any]:
    """A task's options by name."""
    return asdict(task)  # type: ignore[call-overload]


def _facts(records: list[Record]) -> dict[str, Any]:
    """What rows have whatever the task: prompts, bytes where they are known, packed tokens read, and servers if there are any."""
    facts: dict[str, Any] = {"prompts": len(records)}
    if all("cache_bytes" in record for record in records):
        tokens, nbytes = (sum(record[key] for record in records) for key in ("cache_tokens", "cache_bytes"))
        facts["bytes_per_token"] = nbytes / tokens
    for key in ("packed_tokens_read", "packed_tokens_read_per_layer"):
        if all(key in record for record in records):
            facts[key] = sum(record[key] for record in records)
    sources = [record["source"] for record in records if "source" in record]
    if sources:
        facts["sources"] = [source for i, source in enumerate(sources) if source not in sources[:i]]
    return facts


def _parsed(path: Path, lines: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A journal's settings and entries."""
    try:
        parsed = [json.loads(line) for line in lines.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is not a journal of kvturbo eval: {error}") from error
    if not parsed or not isinstance(parsed[0], dict) or "model" not in parsed[0]:
        raise ValueError(f"{path} is not a journal of kvturbo eval: its first line has no settings")
    for number, entry in enumerate(parsed[1:], 2):
        if not (isinstance(entry, dict) and {"task", "index"} <= set(entry) and isinstance(entry.get("records"), dict)):
            raise ValueError(f"{path} is not a journal of kvturbo eval: line {number} is {json.dumps(entry):.60}")
    return parsed[0], parsed[1:]


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [key for key in now if before.get(key) != now[key]]
    return "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
