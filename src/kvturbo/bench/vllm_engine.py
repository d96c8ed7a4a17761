"""The measurements of benchmarks/vllm_serving.py in one engine; vLLM runs in this process."""

from __future__ import annotations

import gc
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvturbo.bench.vllm_rows import (
    ADDED_TOKENS,
    BURST,
    CACHED_TOKENS,
    CHAT_ADDED,
    CHAT_TOKENS,
    CHATS,
    FRESH_TOKENS,
    LENGTHS,
    LOADS,
    MODELS,
    STEP_COUNT,
    STEPS,
    TTFT_REPEATS,
    Job,
    Load,
    step_milliseconds,
)

Value = dict[str, Any]
_GIB = 1 << 30
_SETTLE_STEPS = 8


@contextmanager
def _graph_sizes() -> Iterator[list[float]]:
    """GiB of CUDA graphs from vLLM's log, where alone it says it; the last is that of the engine, others are estimates.

    Records are caught where they are made, since vLLM sets all handlers of its loggers when an engine starts.
    """
    make, sizes = logging.getLogRecordFactory(), list[float]()

    def catch(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = make(*arguments, **options)
        if str(record.msg).startswith("Graph capturing finished") and isinstance(record.args, tuple):
            sizes.append(float(str(record.args[1])))
        return record

    logging.setLogRecordFactory(catch)
    try:
        yield sizes
    finally:
        logging.setLogRecordFactory(make)


class Engine:
    """A vllm.LLM for a job, with random weights and random prompts."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        self.job, self._rng, self._requests = job, random.Random(0), 0
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(MODELS[job.model]))
        with _graph_sizes() as sizes:
            self.llm = LLM(model=str(folder), **job.options())
        self.graph_gib = sizes[-1] if sizes else None
        self.core = self.llm.llm_engine
        self._texts: list[list[int]] = []

    def close(self) -> None:
        """Ends the engine, so that another can have the GPU's memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.collective_rpc(_drop_weights)
        self.core.engine_core.shutdown()
        del self.llm, self.core
        gc.collect()
        cleanup_dist_env_and_memory()

    def prompt(self, tokens: int) -> list[int]:
        """Token ids that no other prompt begins with."""
        return self._rng.choices(range(10, MODELS[self.job.model]["vocab_size"]), k=tokens)

    def add(self, prompt: list[int], new_tokens: int, *, stream: bool = False) -> str:
        """Asks for greedy tokens, all at the end or as they come; returns the request's name."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
        parameters = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=kind
        )
        self._requests += 1
        name = f"request-{self._requests}"
        self.core.add_request(name, {"prompt_token_ids": prompt}, parameters)
        return name

    def seconds(self, prompts: list[list[int]], new_tokens: int, concurrent: int) -> float:
        """From the first request to the last token, with so many requests at once."""
        todo, running, done = iter(prompts), set[str](), 0
        torch.cuda.synchronize()
        start = time.perf_counter()
        while done < len(prompts):
            while len(running) < concurrent and (prompt := next(todo, None)) is not None:
                running.add(self.add(prompt, new_tokens))
            for output in self.core.step():
                if output.finished:
                    running.remove(output.request_id)
                    done += 1
                    if len(output.outputs[0].token_ids) != new_tokens:
                        raise RuntimeError(f"{len(output.outputs[0].token_ids)} tokens instead of {new_tokens}")
        return time.perf_counter() - start

    def throughput(self, load: Load) -> float:
        """New tokens per second, prompts included in the time."""
        prompts = [self.prompt(load.prompt_tokens) for _ in range(load.prompts)]
        with self._part_of_the_cache(load.quarter_bytes(self.job.model)) if load.quarter else nullcontext():
            return load.prompts * load.new_tokens / self.seconds(prompts, load.new_tokens, load.concurrent)

    @contextmanager
    def _part_of_the_cache(self, size: int) -> Iterator[None]:
        """Takes blocks out of the pool, so that those that are left have so many bytes."""
        pool = self.core.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        pool.reset_prefix_cache()
        kept = size * pool.num_gpu_blocks // self._pool_bytes()
        taken = pool.get_new_blocks(pool.get_num_free_blocks() - kept)
        try:
            yield
        finally:
            pool.free_blocks(taken)

    def step(self, batch: int, tokens: int) -> float:
        """Milliseconds of a steady decode step. Sequences go on where those of earlier steps were, as far as these are cached."""
        while len(self._texts) < batch:
            self._texts.append(self.prompt(max(length for _, length in STEPS)))
        new_tokens = _SETTLE_STEPS + 2 * STEP_COUNT + batch  # nobody may end while the last prompt is read
        texts = [text[: tokens - new_tokens] for text in self._texts[:batch]]
        counts = dict.fromkeys((self.add(text, 4 * new_tokens, stream=True) for text in texts), 0)
        while min(counts.values()) < _SETTLE_STEPS:
            self._one_step(counts)
        measured = [self._one_step(counts) for _ in range(STEP_COUNT)]
        self.core.abort_request(list(counts))
        while self.core.has_unfinished_requests():
            self.core.step()
        return step_milliseconds([seconds for seconds, _ in measured], [count for _, count in measured], batch)

    def _one_step(self, counts: dict[str, int]) -> tuple[float, int]:
        """Seconds and tokens of the engine's calls until one gives tokens: with asynchronous scheduling some give none."""
        start, before = time.perf_counter(), sum(counts.values())
        while sum(counts.values()) == before:
            for output in self.core.step():
                if output.finished or output.request_id not in counts:
                    raise RuntimeError(
                        f"{output.request_id} ended, or was not asked for, before the steps were timed: {counts}"
                    )
                counts[output.request_id] = len(output.outputs[0].token_ids)
        return time.perf_counter() - start, sum(counts.values()) - before

    def first_tokens(self, count: int, cached: int, added: int) -> float:
        """Milliseconds until prompts that are asked for at once, and begin with cached tokens, all have their first new one."""
        times = []
        prefixes = [self.prompt(cached) for _ in range(count)]
        if cached:
            self.seconds(prefixes, 1, count)
        for _ in range(TTFT_REPEATS + 1):
            times.append(self.seconds([prefix + self.prompt(added) for prefix in prefixes], 1, count))
        return statistics.median(times[1:]) * 1e3

    def capacity(self) -> int:
        """Tokens that fit in the cache."""
        cache = self.core.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def memory_of_a_prompt(self, tokens: int) -> tuple[float, float]:
        """GiB that reading a prompt takes at its peak beyond what the idle engine has, and the part of the cache that it fills."""
        prompt = self.prompt(tokens - 64)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.seconds([prompt], 1, 1)
        peak = torch.cuda.max_memory_allocated() - before
        return peak / _GIB, self._pool_bytes() * len(prompt) / self.capacity() / _GIB

    def _pool_bytes(self) -> int:
        return int(self.llm.collective_rpc(_cache_bytes)[0])


def _drop_weights(worker: Any) -> None:
    """Frees the weights' memory: compiled code refers to them for as long as the process lives."""
    for weight in worker.model_runner.get_model().parameters():
        weight.untyped_storage().resize_(0)


def _cache_bytes(worker: Any) -> int:
    """Bytes of the cache: its tensors share one allocation."""
    sizes = {tensor.size for tensor in worker.model_runner.kv_cache_config.kv_cache_tensors}
    if len(sizes) != 1:
        raise RuntimeError(f"the cache's tensors should share one allocation, got sizes {sizes}")
    return int(sizes.pop())


def measure(job: Job) -> Iterator[Value]:
    """Every figure of a job's engine: `what`, `value`, `unit`, as they come; before those of a measure, its name: `measure`.

    Raises:
        RuntimeError: the engine did not do what a figure stands for.
    """
    engine = Engine(job)
    try:
        engine.seconds([engine.prompt(2048) for _ in range(4)], 16, 4)
        for name in job.measures:
            yield {"measure": name}
            yield from _MEASURES[name](engine)
    finally:
        engine.close()


def _start(engine: Engine) -> Iterator[Value]:
    yield _value("capacity", engine.capacity(), "tokens")
    if engine.graph_gib is None:
        raise RuntimeError(
            "vLLM's log has no line 'Graph capturing finished': no graphs, or the log's level is above INFO"
        )
    yield _value("graph pool", engine.graph_gib, "GiB")


def _burst(engine: Engine) -> Iterator[Value]:
    speeds = [engine.throughput(BURST) for _ in range(4)][1:]
    yield _value(f"{BURST.prompts} sequences x {BURST.new_tokens} new tokens", statistics.median(speeds), "tokens/s")


def _first_token(engine: Engine) -> Iterator[Value]:
    yield _value(f"first token, {FRESH_TOKENS} new", engine.first_tokens(1, 0, FRESH_TOKENS), "ms")
    what = f"first token, {ADDED_TOKENS} new after {CACHED_TOKENS} cached"
    yield _value(what, engine.first_tokens(1, CACHED_TOKENS, ADDED_TOKENS), "ms")


def _chats(engine: Engine) -> Iterator[Value]:
    what = f"first tokens of {CHATS} chats, {CHAT_ADDED} new after {CHAT_TOKENS} cached"
    yield _value(what, engine.first_tokens(CHATS, CHAT_TOKENS, CHAT_ADDED), "ms")


def _memory(engine: Engine) -> Iterator[Value]:
    for tokens in LENGTHS:
        peak, filled = engine.memory_of_a_prompt(tokens)
        yield _value(f"memory of a prompt of {tokens}, cache included", peak + filled, "GiB")
        yield _value(f"memory of a prompt of {tokens} beside the cache", peak, "GiB")


def _step(batch: int, tokens: int) -> Callable[[Engine], Iterator[Value]]:
    def measured(engine: Engine) -> Iterator[Value]:
        yield _value(f"decode step {batch} x {tokens}", engine.step(batch, tokens), "ms")

    return measured


def _throughput(load: Load) -> Callable[[Engine], Iterator[Value]]:
    def measured(engine: Engine) -> Iterator[Value]:
        load_now = replace(load, prompts=engine.job.prompts)
        yield _value(load_now.name, engine.throughput(load_now), "tokens/s")

    return measured


def _value(what: str, value: float, unit: str) -> Value:
    return {"what": what, "value": value, "unit": unit}


_MEASURES: dict[str, Callable[[Engine], Iterator[Value]]] = {
    "start": _start,
    "burst": _burst,
    "first-token": _first_token,
    "chats": _chats,
    **{f"step-{batch}x{tokens}": _step(batch, tokens) for batch, tokens in STEPS},
    "memory": _memory,
    **{name: _throughput(load) for name, load in LOADS.items()},
}
