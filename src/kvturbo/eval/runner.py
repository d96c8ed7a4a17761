"""Runs tasks over caches, prompt by prompt, and picks up where an interrupted run stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.registry import Record, Task
from kvturbo.eval.report import environment, write_json

Progress = Callable[[str], None]


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
            path.write_text(json.dumps(settings) + "\n")

    def has(self, task: str, index: int, cache: str) -> bool:
        return (task, index, cache) in self._records

    def add(self, task: str, index: int, records: dict[str, Record]) -> None:
        """Keeps the records of one prompt; those that are there already stay."""
        new = {cache: record for cache, record in records.items() if not self.has(task, index, cache)}
        self._records |= {(task, index, cache): record for cache, record in new.items()}
        if self.path is not None and new:
            with self.path.open("a") as file:
                file.write(json.dumps({"task": task, "index": index, "records": new}) + "\n")

    def records(self, task: str, cache: str) -> list[Record]:
        """Records of a task and a cache in the order of the prompts."""
        found = [(key[1], record) for key, record in self._records.items() if (key[0], key[2]) == (task, cache)]
        return [record for _, record in sorted(found, key=lambda entry: entry[0])]

    def _read(self, path: Path, settings: dict[str, Any]) -> None:
        whole = path.read_bytes().rpartition(b"\n")[0]  # a line without an end was being written when the run was cut
        lines = _parsed(path, whole)
        if not lines or lines[0] != settings:
            before = lines[0] if lines else None
            raise ValueError(f"{path} was written with other settings: {_differences(before, settings)}")
        os.truncate(path, len(whole) + 1)
        for line in lines[1:]:
            self._records |= {(line["task"], line["index"], cache): record for cache, record in line["records"].items()}


class Evaluation:
    """Tasks to be run over caches.

    Args:
        loaded: the model.
        tasks: by name.
        specs: the caches, the 16-bit one among them if it is wanted in the results.
        path: the results file, rewritten after every prompt; its journal lies beside it. None: keep results in memory.

    Raises:
        ValueError, FileNotFoundError: a task can't be run with this model, or the journal was written with other settings.
    """

    def __init__(
        self, loaded: LoadedModel, tasks: Mapping[str, Task], specs: list[CacheSpec], path: Path | None = None
    ) -> None:
        self.loaded, self.tasks, self.specs, self.path = loaded, tasks, specs, path
        for task in tasks.values():
            task.check(loaded)
        self.journal = Journal(None if path is None else path.with_suffix(".records.jsonl"), self.settings())
        self._environment = environment()

    def settings(self) -> dict[str, Any]:
        """The model and the windows: what all records of a journal share."""
        model = self.loaded.model
        windows = sorted({(str(spec.recent), str(spec.sink)) for spec in self.specs if spec.packed})
        text = None if self.loaded.text_path is None else str(self.loaded.text_path.resolve())
        return {
            "model": self.loaded.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "text": text,
            "windows": [{"recent": recent, "sink": sink} for recent, sink in windows],
        }

    def prompts(self) -> int:
        """Prompts of all tasks together."""
        return sum(task.count() for task in self.tasks.values())

    def run(self, progress: Progress = lambda _: None) -> dict[str, Any]:
        """Measures what the journal lacks and returns the results; `progress` gets the task's name after each prompt."""
        for name, task in self.tasks.items():
            for index in range(task.count()):
                missing = [spec for spec in self.specs if not self.journal.has(self._key(name), index, spec.name)]
                if missing:
                    self.journal.add(self._key(name), index, task.measure(self.loaded, index, missing))
                    self._write()
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
        caches = {}
        for spec in self.specs:
            records = self.journal.records(self._key(name), spec.name)
            if records:
                caches[spec.name] = task.summarise(records) | _sizes(records)
        return caches

    def _key(self, name: str) -> str:
        return f"{name} {json.dumps(options_of(self.tasks[name]), sort_keys=True)}"

    def _write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.results())


def options_of(task: Task) -> dict[str, Any]:
    """A task's options by name."""
    return asdict(task)  # type: ignore[call-overload]


def _sizes(records: list[Record]) -> dict[str, Any]:
    tokens, nbytes = (sum(record[key] for record in records) for key in ("cache_tokens", "cache_bytes"))
    read = sum(record["packed_tokens_read"] for record in records)
    return {"prompts": len(records), "bytes_per_token": nbytes / tokens, "packed_tokens_read": read}


def _parsed(path: Path, lines: bytes) -> list[Any]:
    try:
        return [json.loads(line) for line in lines.splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is not a journal of kvturbo eval: {error}") from error


def _differences(before: Any, now: dict[str, Any]) -> str:
    if not isinstance(before, dict) or "model" not in before:
        return "it is not a journal of kvturbo eval"
    changed = [key for key in now if before.get(key) != now[key]]
    return "; ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in changed)
