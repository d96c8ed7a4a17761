"""What benchmarks/vllm_serving.py measures: models, cache dtypes, engines, and rows from the values of several runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvturbo.bench import vllm_recent

_COMMON: dict[str, Any] = {
    "hidden_act": "silu", "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": _COMMON | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28,
    },
    "llama-3.1-8b": _COMMON | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
    },
}  # fmt: skip
"""Shapes of Qwen2.5-7B and Llama-3.1-8B, up to 131,072 tokens; weights are random."""
HEAD_DIM = 128
CACHE_DTYPES = ("auto", "fp8", "turboquant_4bit_nc", "turboquant", "kvturbo_k4v4-o16")
BASELINES = {"ratio_bf16": "auto", "ratio_fp8": "fp8"}


@dataclass(frozen=True)
class Load:
    """Requests for a throughput.

    Attributes:
        prompts: how many.
        prompt_tokens, new_tokens: of each.
        concurrent: sequences at once: where one ends, the next is asked for.
        quarter: whether only a quarter of the memory is there that the 16-bit cache of the concurrent sequences needs.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    concurrent: int
    quarter: bool = False

    @property
    def name(self) -> str:
        """For people."""
        text = f"{self.prompts} prompts, {self.prompt_tokens} in, {self.new_tokens} out, {self.concurrent} concurrent"
        return text + (", a quarter of the memory" if self.quarter else "")

    def quarter_bytes(self, model: str) -> int:
        """A quarter of the 16-bit cache that the concurrent sequences fill at their full lengths."""
        return self.concurrent * (self.prompt_tokens + self.new_tokens) * bf16_bytes_per_token(model) // 4


LOADS = {
    "throughput": Load(512, 3000, 500, 64),
    "quarter-long-prompts": Load(512, 3000, 500, 64, quarter=True),
    "quarter-long-answers": Load(512, 1000, 2000, 128, quarter=True),
}
BURST = Load(8, 128, 128, 8)
STEPS = ((8, 8192), (32, 16384), (8, 32768))
"""Sequences and tokens of each at which a decode step is timed, the longer ones going on where the shorter ones were."""
STEP_COUNT = 64
FRESH_TOKENS, CACHED_TOKENS, ADDED_TOKENS = 8192, 32768, 2048
CHATS, CHAT_TOKENS, CHAT_ADDED = 64, 2048, 32
"""Conversations that go on at the same moment: how many, their cached tokens and the new ones."""
LENGTHS = (16384, 131072)
"""Prompts whose memory is measured."""
TTFT_REPEATS = 5
MEASURES = (
    "start",
    "burst",
    "first-token",
    "chats",
    *(f"step-{batch}x{tokens}" for batch, tokens in STEPS),
    "memory",
    *LOADS,
)
"""What can be measured, in order; `start` is the cache's capacity and the graphs' memory."""
LONG = ("memory", *LOADS)
"""What takes minutes, or is the same every time."""


@dataclass(frozen=True)
class Job:
    """An engine: its model, its cache dtype, what is measured with it, how many prompts a throughput is measured with, and how many
    tokens its rings have, None for what they have untold.
    """

    model: str
    cache_dtype: str
    measures: tuple[str, ...] = MEASURES
    prompts: int = 512
    recent: int | None = None

    def facts(self) -> dict[str, Any]:
        """What its figures and its failure say of it."""
        recent = vllm_recent.measured(self.cache_dtype, self.recent)
        return {"model": self.model, "kv_cache_dtype": self.cache_dtype, "recent": recent}

    def options(self) -> dict[str, Any]:
        """Arguments of vllm.LLM beside the model; everything else is vLLM's default, the compilation level too."""
        return {
            "kv_cache_dtype": self.cache_dtype, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
            "gpu_memory_utilization": 0.9, "seed": 0, "max_model_len": max(LENGTHS),
        } | vllm_recent.options(self.recent)  # fmt: skip


def bf16_bytes_per_token(model: str) -> int:
    """Bytes of a token's keys and values in 16 bits, all layers."""
    config = MODELS[model]
    return int(2 * 2 * config["num_key_value_heads"] * HEAD_DIM * config["num_hidden_layers"])


def jobs(
    models: Sequence[str],
    cache_dtypes: Sequence[str],
    measures: Sequence[str] = MEASURES,
    without: Mapping[str, Sequence[str]] = {},
    rounds: int = 1,
    prompts: int = 512,
    recent: int | None = None,
    long_rounds: int | None = None,
    backwards: bool = True,
) -> list[list[Job]]:
    """The engines of every process, one process per model and round.

    Args:
        models, cache_dtypes, measures: names.
        without: measures that are left out, by model or cache dtype.
        rounds: how often.
        prompts: of every throughput.
        recent: tokens of a ring in packed caches; None for what the engine has untold.
        long_rounds: in how many of the rounds, the first ones, LONG is measured too; None for all.
        backwards: whether every other round runs backwards, so that drift hits all cache dtypes alike.

    Raises:
        ValueError: a name is unknown, rounds is below 1, or nothing is left to measure.
    """
    _check_names("model", models, MODELS)
    _check_names("cache dtype", cache_dtypes, CACHE_DTYPES)
    _check_names("what something is left out of", without, (*MODELS, *CACHE_DTYPES))
    _check_names("measure", (*measures, *(name for names in without.values() for name in names)), MEASURES)
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")

    def job(model: str, cache_dtype: str, number: int) -> Job:
        short = LONG if long_rounds is not None and number >= long_rounds else ()
        out = {*without.get(model, ()), *without.get(cache_dtype, ()), *short}
        kept = (name for name in MEASURES if name in measures and name not in out)
        [size] = vllm_recent.asked(cache_dtype, [recent])
        return Job(model, cache_dtype, tuple(kept), prompts, size)

    orders = [cache_dtypes, tuple(reversed(cache_dtypes)) if backwards else cache_dtypes]
    every = [
        [engine for name in orders[number % 2] if (engine := job(model, name, number)).measures]
        for number in range(rounds)
        for model in models
    ]
    if not any(every):
        raise ValueError(f"nothing to measure: models {models}, cache dtypes {cache_dtypes}, measures {measures}")
    return every


def _check_names(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{what} must be among {', '.join(known)}, got {', '.join(unknown)}")


def rows_of(values: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per figure, model, cache dtype and size of rings: the median of its runs, and it over the baselines' (None where
    these are missing, or of another commit and so of another run).

    Args:
        values: of every run: `model`, `kv_cache_dtype`, `recent`, `what`, `value`, `unit`, `commit` (one for all runs of a row).
    """
    runs: dict[tuple[str, str, str, int | None], list[Mapping[str, Any]]] = {}
    for value in values:
        key = value["what"], value["model"], value["kv_cache_dtype"], value["recent"]
        runs.setdefault(key, []).append(value)
    rows = {
        key: {name: found[-1][name] for name in ("what", "model", "kv_cache_dtype", "recent", "commit")}
        | {"value": statistics.median(float(run["value"]) for run in found), "unit": found[-1]["unit"]}
        for key, found in runs.items()
    }
    for (what, model, _, _), row in rows.items():
        for name, baseline in BASELINES.items():
            base = rows.get((what, model, baseline, None))
            if base and base["commit"] != row["commit"]:
                base = None
            row[name] = row["value"] / base["value"] if base and base["value"] else None
    return list(rows.values())


def step_milliseconds(times: Sequence[float], tokens: Sequence[int], batch: int) -> float:
    """The median decode step in ms.

    Args:
        times: seconds of every call of the engine's step.
        tokens: that it gave.
        batch: sequences.

    Raises:
        RuntimeError: some step did not give one token of every sequence: it was not steady decoding.
    """
    if any(count != batch for count in tokens) or not times:
        raise RuntimeError(
            f"steps of {batch} sequences gave {sorted(set(tokens))} tokens: sequences wait or are preempted"
        )
    return statistics.median(times) * 1e3
