"""Engines on the embedded model, what they write and how surely, and what two of them must agree on; for `vllm/checks.py`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[1] / "models" / "kvturbo-12m"
GAP = 0.1
"""A token may differ where the 16-bit model's two best logits are closer than this."""
PROMPT_TOKENS, NEW_TOKENS = 1500, 48
CACHE_BYTES = 2 << 30
"""Fixed, because vLLM can't measure how much is free while other engines start and end on the same GPU."""


def prompts(count: int = 4, tokens: int = PROMPT_TOKENS) -> list[dict[str, list[int]]]:
    """Texts that the model has not seen, as token ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode((MODEL / "heldout.txt").read_text()[: 40 * count * tokens]).ids
    return [{"prompt_token_ids": ids[i * tokens : (i + 1) * tokens]} for i in range(count)]


@contextmanager
def engine(cache_dtype: str = "turboquant", **options: Any) -> Iterator[Any]:
    """An LLM on the embedded model, taken down afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "model": str(MODEL), "dtype": "bfloat16", "skip_tokenizer_init": True, "max_model_len": 4096, "max_num_seqs": 16,
        "gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": CACHE_BYTES, "enable_prefix_caching": False, "seed": 0,
        "enforce_eager": True,
    }  # fmt: skip
    llm = LLM(**(defaults | {"kv_cache_dtype": cache_dtype} | options))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, texts: list[Any], new_tokens: int = NEW_TOKENS) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens of every prompt, and the gap between the two best logits at each."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, logprobs=2)
    results = []
    for output in llm.generate(texts, parameters, use_tqdm=False):
        completion = output.outputs[0]
        gaps = []
        for entry in completion.logprobs:
            best = sorted((value.logprob for value in entry.values()), reverse=True)
            gaps.append(best[0] - best[1])
        results.append((list(completion.token_ids), gaps))
    return results


def losses(llm: Any, texts: list[Any]) -> list[float]:
    """Negative log-probability of every prompt token but the first, as the engine computes it chunk by chunk."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    values = []
    for output in llm.generate(texts, parameters, use_tqdm=False):
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            values.append(-entry[token].logprob)
    return values


def same_text(got: list[tuple[list[int], list[float]]], wanted: list[tuple[list[int], list[float]]]) -> str:
    """Raises unless every first difference lies where the 16-bit model's gap is below `GAP`; says where they lie."""
    differences = []
    for (tokens, _), (expected, gaps) in zip(got, wanted, strict=True):
        for i, (a, b) in enumerate(zip(tokens, expected, strict=True)):
            if a != b:
                differences.append((i, round(gaps[i], 3)))
                break
    assert all(gap < GAP for _, gap in differences), f"first differences (token, 16-bit gap): {differences}"
    return f"{len(differences)} of {len(got)} texts differ, at (token, 16-bit gap) {differences}"


def close_losses(got: list[float], wanted: list[float], bound: float = 0.02) -> str:
    """Raises unless the mean loss is within a bound of the 16-bit one."""
    mean, expected = sum(got) / len(got), sum(wanted) / len(wanted)
    worst = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    assert abs(mean - expected) < bound, f"loss {mean:.4f}, 16 bits {expected:.4f}"
    return f"loss {mean:.4f}, 16 bits {expected:.4f}, largest difference of a token {worst:.3f}"


def capacity(llm: Any) -> int:
    """Tokens that fit in the cache."""
    return int(
        llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * llm.llm_engine.vllm_config.cache_config.block_size
    )
