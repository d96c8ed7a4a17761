"""A model behind vLLM servers: what `kvturbo eval --server` measures in the place of a `LoadedModel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from kvturbo.eval.caches import REFERENCE
from kvturbo.eval.model import EMBEDDED, PromptSource, load_tokenizer
from kvturbo.eval.registry import Record, ServedTask
from kvturbo.eval.server import CONCURRENCY, TOP_LOGPROBS, Server


@dataclass(frozen=True)
class ServerSpec:
    """A server's cache as one to measure: its row is called by the server's cache dtype, `16bit` if that is no narrower."""

    server: Server

    @property
    def name(self) -> str:
        return self.server.cache_dtype if self.server.packed else REFERENCE

    def packed_tokens(self, starts: Sequence[int]) -> int:
        """Packed tokens that chunks beginning at `starts` read in one layer: all tokens before them, none of a 16-bit cache."""
        return sum(starts) if self.server.packed else 0

    def record(self, starts: Sequence[int], figures: Record, assumes: str | None = None) -> Record:
        """A record with what every one has beside its figures; `assumes` is what the server can't be asked for."""
        source = self.server.facts() | ({} if assumes is None else {"assumes": assumes})
        return figures | {"packed_tokens_read_per_layer": self.packed_tokens(starts), "source": source}


@dataclass
class ServedModel(PromptSource):
    """The tokenizer of a served model, the servers, and how they are asked.

    Attributes:
        name, tokenizer, folder, text_path: as in `PromptSource`.
        servers: one, or one and another with a 16-bit cache.
        chunk: tokens of a prompt that servers read at once, as their user states; None: unknown.
        top: likeliest tokens whose log probabilities are asked for.
        concurrency: requests that a server has to answer at once, at most.

    Raises:
        ValueError: see `__post_init__`.
    """

    name: str
    tokenizer: Any
    folder: Path | None
    text_path: Path | None
    servers: list[Server]
    chunk: int | None = None
    top: int = TOP_LOGPROBS
    concurrency: int = CONCURRENCY

    def __post_init__(self) -> None:
        """Raises ValueError if a number is not positive, or if two servers don't make a comparison."""
        for name in ("chunk", "top", "concurrency"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        versions = {server.url: server.version for server in self.servers}
        if len(set(versions.values())) > 1:
            raise ValueError(f"servers must be of one vLLM version, got {versions}")
        names = [spec.name for spec in self.specs]
        if len(self.servers) > 1 and (names[1] != REFERENCE or names[0] == REFERENCE):
            dtypes = [server.cache_dtype for server in self.servers]
            raise ValueError(
                f"the server must have a packed cache and its reference one in 16 bits, got {' and '.join(dtypes)}"
            )

    @property
    def specs(self) -> list[ServerSpec]:
        """A cache per server."""
        return [ServerSpec(server) for server in self.servers]

    @property
    def context(self) -> int | None:
        lengths = [server.max_model_len for server in self.servers if server.max_model_len is not None]
        return min(lengths, default=None)

    def settings(self, specs: Sequence[ServerSpec]) -> dict[str, Any]:
        """The model, the text and vLLM's version: what records must share to be comparable."""
        text = None if self.text_path is None else str(self.text_path.resolve())
        return {"model": self.name, "text": text, "vllm": specs[0].server.version}

    def check(self, task: ServedTask) -> None:
        """Raises ValueError or FileNotFoundError unless the servers can be asked a task's questions."""
        task.check(self)
        task.check_served(self)

    def check_length(self, tokens: int, what: str) -> None:
        """Raises ValueError if a prompt and what is generated are more than the servers take."""
        if self.context is not None and tokens > self.context:
            raise ValueError(f"{what} takes {tokens} tokens, more than the server's max_model_len of {self.context}")

    def measure(
        self, task: ServedTask, todo: Mapping[int, list[ServerSpec]]
    ) -> Iterator[tuple[int, dict[str, Record]]]:
        """Asks servers, each up to `concurrency` prompts at once; yields a prompt's record of one server as it comes.

        Raises:
            ServerError: of the first prompt that failed, after the records of those that were under way.
        """
        width = 1 if task.alone else self.concurrency
        pools = {spec: ThreadPoolExecutor(width) for specs in todo.values() for spec in specs}
        stop = Event()

        def ask(index: int, spec: ServerSpec) -> Record | None:
            if stop.is_set():
                return None
            try:
                return task.ask(self, spec, index)
            except BaseException:
                stop.set()
                raise

        try:
            jobs = {
                pools[spec].submit(ask, index, spec): (index, spec) for index, specs in todo.items() for spec in specs
            }
            yield from _finished(jobs)
        finally:
            stop.set()
            for pool in pools.values():
                pool.shutdown(wait=False)


def _finished(jobs: dict[Future[Record | None], tuple[int, ServerSpec]]) -> Iterator[tuple[int, dict[str, Record]]]:
    """Records as they come; the first error after all of them."""
    failed: BaseException | None = None
    for job in as_completed(jobs):
        failed = failed or job.exception()
        record = None if job.exception() else job.result()
        if record is not None:
            index, spec = jobs[job]
            yield index, {spec.name: record}
    if failed is not None:
        raise failed


def load_served(
    name: str | None, servers: list[Server], *, text: Path | None = None, chunk: int | None, top: int, concurrency: int
) -> ServedModel:
    """A served model with the tokenizer of a folder or a hub id (None: the embedded model's).

    Raises:
        FileNotFoundError, ValueError: as `load_tokenizer` and `ServedModel`.
    """
    tokenizer, folder = load_tokenizer(name)
    label = EMBEDDED if name is None else name
    return ServedModel(label, tokenizer, folder, text, servers, chunk, top, concurrency)
