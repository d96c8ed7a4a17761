"""The measurements of benchmarks/vllm_serving.py in one engine; vLLM runs in this process."""

from __future__ import annotations

import gc
import json
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvturbo.bench.vllm_rows import (
    ADDED_TOKENS,
    BURST,
    CACHED_TOKENS,
    ENGINES,
    FRESH_TOKENS,
    LONGEST,
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


class _GraphSize(logging.Handler):
    """Reads the size of the CUDA graphs from vLLM's log, where alone it says it."""

    gib: float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("Graph capturing finished") and isinstance(record.args, tuple):
            self.gib = float(str(record.args[1]))


class Engine:
    """A vllm.LLM for a job, with random weights and random prompts."""

    def __init__(self, job: Job) -> None:
        from vllm import LLM

        self.job, self._rng, self._requests = job, random.Random(0), 0
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(MODELS[job.model]))
        graphs = _GraphSize()
        logging.getLogger("vllm").addHandler(graphs)
        self.llm = LLM(model=str(folder), **job.options())
        self.graph_gib = graphs.gib
        self.core = self.llm.llm_engine

    def prompt(self, tokens: int) -> list[int]:
        """Token ids that no other prompt begins with."""
        return self._rng.choices(range(10, MODELS[self.job.model]["vocab_size"]), k=tokens)

    def seconds(self, prompts: list[list[int]], new_tokens: int) -> float:
        """From handing the prompts over to the last token."""
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        torch.cuda.synchronize()
        start = time.perf_counter()
        outputs = self.llm.generate(inputs, parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        counts = {len(output.outputs[0].token_ids) for output in outputs}
        if counts != {new_tokens} or len(outputs) != len(prompts):
            raise RuntimeError(f"{len(prompts)} prompts of {new_tokens} new tokens gave {len(outputs)} of {counts}")
        return seconds

    def throughput(self, load: Load) -> float:
        """New tokens per second, prompts included in the time."""
        prompts = [self.prompt(load.prompt_tokens) for _ in range(load.prompts)]
        return load.prompts * load.new_tokens / self.seconds(prompts, load.new_tokens)

    def step(self, batch: int, tokens: int) -> float:
        """Milliseconds of a steady decode step."""
        from vllm import SamplingParams

        new_tokens = _SETTLE_STEPS + 2 * STEP_COUNT + batch  # nobody may end while the last prompt is read
        parameters = SamplingParams(temperature=0, max_tokens=4 * new_tokens, ignore_eos=True, detokenize=False)
        length = tokens - new_tokens
        names = []
        for _ in range(batch):
            self._requests += 1
            names.append(f"step-{self._requests}")
            self.core.add_request(names[-1], {"prompt_token_ids": self.prompt(length)}, parameters)
        counts = dict.fromkeys(names, 0)
        while min(counts.values()) < _SETTLE_STEPS:
            self._one_step(counts)
        measured = [self._one_step(counts) for _ in range(STEP_COUNT)]
        self.core.abort_request(names)
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

    def first_token(self, cached: int, added: int) -> float:
        """Milliseconds to the first token of a prompt whose first tokens are cached."""
        times = []
        prefix = self.prompt(cached)
        if cached:
            self.seconds([prefix], 1)
        for _ in range(TTFT_REPEATS + 1):
            times.append(self.seconds([prefix + self.prompt(added)], 1))
        return statistics.median(times[1:]) * 1e3

    def capacity(self) -> int:
        """Tokens that fit in the cache."""
        cache = self.core.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def longest_prompt(self) -> float:
        """GiB of the GPU that the longest prompt needs: the peak while it is read, with the cache counted as what it fills."""
        pool = self.llm.collective_rpc(_cache_bytes)[0]
        prompt = self.prompt(LONGEST - 64)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        self.seconds([prompt], 1)
        used = pool * len(prompt) / self.capacity()
        return (torch.cuda.max_memory_allocated() - pool + used) / _GIB


def _cache_bytes(worker: Any) -> int:
    """Bytes of the cache: its tensors share one allocation."""
    sizes = {tensor.size for tensor in worker.model_runner.kv_cache_config.kv_cache_tensors}
    if len(sizes) != 1:
        raise RuntimeError(f"the cache's tensors should share one allocation, got sizes {sizes}")
    return int(sizes.pop())


def measure(job: Job) -> Iterator[Value]:
    """Every figure of a job's engine: `what`, `value`, `unit`, as they come.

    Raises:
        RuntimeError: the engine did not do what a figure stands for.
    """
    engine = Engine(job)
    load, quarter = ENGINES[job.engine]
    if load is not None:
        engine.seconds([engine.prompt(load.prompt_tokens) for _ in range(4)], 16)
        name = f"throughput {load.prompt_tokens} in, {load.new_tokens} out, {load.concurrent} concurrent"
        yield _value(name + (", a quarter of the memory" if quarter else ""), engine.throughput(load), "tokens/s")
        return
    yield _value("capacity", engine.capacity(), "tokens")
    if engine.graph_gib is None:
        raise RuntimeError(
            "vLLM's log has no line 'Graph capturing finished': no graphs, or the log's level is above INFO"
        )
    yield _value("graph pool", engine.graph_gib, "GiB")
    engine.throughput(BURST)
    yield _value(f"{BURST.prompts} sequences x {BURST.new_tokens} new tokens", engine.throughput(BURST), "tokens/s")
    yield _value(f"first token, {FRESH_TOKENS} new", engine.first_token(0, FRESH_TOKENS), "ms")
    yield _value(
        f"first token, {ADDED_TOKENS} new after {CACHED_TOKENS} cached",
        engine.first_token(CACHED_TOKENS, ADDED_TOKENS),
        "ms",
    )
    for batch, tokens in STEPS:
        yield _value(f"decode step {batch} x {tokens}", engine.step(batch, tokens), "ms")
    yield _value(f"peak memory of a prompt of {LONGEST}", engine.longest_prompt(), "GiB")


def _value(what: str, value: float, unit: str) -> Value:
    return {"what": what, "value": value, "unit": unit}
