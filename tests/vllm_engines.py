"""Engines on the embedded model, what they write and how surely, and what two of them must agree on; for `vllm/checks.py`."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

MODEL = Path(__file__).parents[1] / "models" / "kvturbo-12m"
MEAN_REGRET, WORST_REGRET = 0.02, 1.5
PROMPT_TOKENS, NEW_TOKENS = 1500, 48
CHUNK = 512
MOVED = 0.15
"""How far a packed cache may move log probabilities, of what they move by without the layers that are packed. In transformers 4
bits move them by 1 to 3 %, in dense models, in ones with sliding windows and in ones with sinks; the sinks themselves by 40 %."""
SINK = 6.0
CACHE_BYTES = 2 << 30
"""Fixed, because vLLM can't measure how much is free while other engines start and end on the same GPU."""

MEMORY_FLAGS = ("--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", str(CACHE_BYTES))
"""The same of a server."""
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
"""Drafts from the text itself."""

Text = tuple[list[int], list[float]]
"""Greedy tokens, and the gap between the two best logits at each."""
Differences = list[tuple[int, float]]
"""Where texts part, and the gap there, of those that do."""


def prompts(count: int = 4, tokens: int = PROMPT_TOKENS) -> list[dict[str, list[int]]]:
    """Texts that the model has not seen, as token ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tokenizer.encode((MODEL / "heldout.txt").read_text()[: 40 * count * tokens]).ids
    return [{"prompt_token_ids": ids[i * tokens : (i + 1) * tokens]} for i in range(count)]


NO_RINGS = {"additional_config": {"kvturbo": {"recent": 0}}}
"""Options of an engine that reads the newest tokens from pages too."""


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


@contextmanager
def serving(*flags: str, port: int = 8731, seconds: float = 180) -> Iterator[Callable[[list[Any]], list[list[int]]]]:
    """A server on the embedded model with some flags; gives a function from prompts to greedy tokens, all asked for at once."""
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(MODEL), "--port", str(port), *flags]
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"

    def ask(prompt: Any) -> list[int]:
        body = {
            "model": str(MODEL), "prompt": prompt["prompt_token_ids"], "temperature": 0, "max_tokens": NEW_TOKENS,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        request = Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            tokens: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return tokens

    try:
        _wait_for(f"{url}/health", process, seconds)
        with ThreadPoolExecutor(16) as pool:
            yield lambda texts: list(pool.map(ask, texts))
    finally:
        process.terminate()
        process.wait(60)


def _wait_for(url: str, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        try:
            urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(f"no answer from {url} within {seconds} s")


def generate(llm: Any, texts: list[Any], new_tokens: int = NEW_TOKENS) -> list[Text]:
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


def one_token() -> Any:
    """Parameters for one greedy token."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=1, detokenize=False)


def losses(llm: Any, texts: list[Any]) -> list[float]:
    """Negative log-probability of every prompt token but the first, as the engine computes it chunk by chunk."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    values = []
    for output in llm.generate(texts, parameters, use_tqdm=False):
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            values.append(-entry[token].logprob)
    return values


def same_text(got: list[Text], wanted: list[Text]) -> str:
    """Raises unless all tokens are the same, as they are where the same kernels compute the same batches; a packed cache makes
    different texts of differences in the last bit.
    """
    differences = first_differences(got, wanted)
    assert not differences, f"{len(differences)} of {len(got)} texts differ, at (token, gap) {differences}"
    return f"{len(got)} texts the same"


def first_differences(got: list[Text], wanted: list[Text]) -> Differences:
    """Where texts part, and how far the two best logits of `wanted` lie apart there; of the texts that do part."""
    differences = []
    for (tokens, _), (expected, gaps) in zip(got, wanted, strict=True):
        place = next((i for i, (a, b) in enumerate(zip(tokens, expected, strict=True)) if a != b), None)
        if place is not None:
            differences.append((place, round(gaps[place], 3)))
    return differences


def regrets(llm: Any, texts: list[Any], got: list[Text]) -> list[float]:
    """How much more likely than the token that was written another one is to an engine that reads the same text: the difference
    of their log-probabilities for every written token, 0 where it would have written the same.
    """
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    whole = [
        {"prompt_token_ids": text["prompt_token_ids"] + tokens} for text, (tokens, _) in zip(texts, got, strict=True)
    ]
    values = []
    for output, (tokens, _) in zip(llm.generate(whole, parameters, use_tqdm=False), got, strict=True):
        for token, entry in zip(tokens, output.prompt_logprobs[-len(tokens) :], strict=True):
            values.append(max(x.logprob for x in entry.values()) - entry[token].logprob)
    return values


def fewer_regrets_with_rings() -> str:
    """2 bits, sequences that wait for others, graphs: the 16-bit cache likes the text better with rings than without."""
    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
    options = {"compilation_config": config, "enforce_eager": False, "max_num_batched_tokens": 8192, "max_num_seqs": 8}
    texts, got = prompts(24, 512), {}
    for size in (0, 32):
        with engine("kvturbo_k2v2", additional_config={"kvturbo": {"recent": size}}, **options) as llm:
            got[size] = generate(llm, texts)
    with engine("auto", max_num_batched_tokens=8192) as llm:
        found = {size: regrets(llm, texts, text) for size, text in got.items()}
    means = {size: sum(values) / len(values) for size, values in found.items()}
    assert means[32] < means[0], f"mean regret by tokens of a ring: {means}"
    return f"mean regret {means[0]:.4f} without rings, {means[32]:.4f} with 32 tokens"


def sensible(*runs: list[Text], texts: list[Any] | None = None) -> str:
    """Raises unless the 16-bit cache, reading the same texts, would hardly have written anything else."""
    texts = texts or prompts()
    with engine("auto", max_num_batched_tokens=8192) as llm:
        found = [value for got in runs for value in regrets(llm, texts[: len(got)], got)]
    mean, worst, others = sum(found) / len(found), max(found), sum(value > 0 for value in found)
    text = f"16 bits would write {others} of {len(found)} tokens otherwise, regret {mean:.4f}, largest {worst:.2f}"
    assert mean < MEAN_REGRET and worst < WORST_REGRET, text
    return text


def close_losses(got: list[float], wanted: list[float], bound: float = 0.02, name: str = "16 bits") -> str:
    """Raises unless the mean loss is within a bound of another engine's."""
    mean, expected = sum(got) / len(got), sum(wanted) / len(wanted)
    worst = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    assert abs(mean - expected) < bound, f"loss {mean:.4f}, {name} {expected:.4f}"
    return f"loss {mean:.4f}, {name} {expected:.4f}, largest difference of a token {worst:.3f}"


def capacity(llm: Any) -> int:
    """Tokens that fit in the cache."""
    return int(
        llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * llm.llm_engine.vllm_config.cache_config.block_size
    )


def model_folder(config: dict[str, Any]) -> str:
    """A folder with a config.json, which is enough for random weights."""
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return folder


def random_prompts(count: int, tokens: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Prompts of random tokens."""
    rng = random.Random(0)
    return [{"prompt_token_ids": [rng.randrange(10, vocabulary) for _ in range(tokens)]} for _ in range(count)]


def beside_sixteen_bit(config: dict[str, Any]) -> str:
    """Random weights of a model in the packed cache and in 16 bits: raises unless the packed cache moves the next tokens' log
    probabilities by little beside what they move by without the layers that are packed; says by how much, and how many tokens fit.
    """
    options = {
        "model": model_folder(config), "load_format": "dummy", "max_num_batched_tokens": CHUNK, "max_logprobs": -1,
    }  # fmt: skip
    texts = random_prompts(4, PROMPT_TOKENS, 1000)
    with engine(**options) as llm:
        [layers] = llm.collective_rpc(_packed_layers)
        llm.collective_rpc(_loud)
        got, after = _next_tokens(llm, texts), capacity(llm)
    with engine("auto", **options) as llm:
        llm.collective_rpc(_loud)
        wanted, before = _next_tokens(llm, texts), capacity(llm)
        llm.collective_rpc(_silence, args=(layers,))
        without = _next_tokens(llm, texts)
    moved, at_most = ((x - wanted).abs().mean().item() for x in (got, without))
    assert moved < MOVED * at_most, f"log probabilities move by {moved:.2e}, without the packed layers by {at_most:.2e}"
    return f"log probabilities move by {moved / at_most:.1%} of what {len(layers)} layers do; {before} -> {after} tokens fit"


def _next_tokens(llm: Any, texts: list[Any]) -> Any:
    """Log probabilities [texts, 4, vocabulary] after each text: first from reading it, then from decoding a token."""
    import torch
    from vllm import SamplingParams

    parameters = SamplingParams(
        temperature=0, max_tokens=4, ignore_eos=True, logprobs=-1, allowed_token_ids=[7], detokenize=False
    )
    outputs = llm.generate(texts, parameters, use_tqdm=False)
    rows = [[[entry[i].logprob for i in sorted(entry)] for entry in output.outputs[0].logprobs] for output in outputs]
    return torch.tensor(rows, dtype=torch.float64)


def _packed_layers(worker: Any) -> list[str]:
    layers = worker.model_runner.vllm_config.compilation_config.static_forward_context
    return [name for name, layer in layers.items() if getattr(getattr(layer, "impl", None), "fmt", None)]


def _loud(worker: Any) -> None:
    louder(worker.model_runner.get_model(), worker.model_runner.vllm_config)


def _silence(worker: Any, layers: list[str]) -> None:
    for weight in outputs_of(worker.model_runner.get_model(), layers):
        weight.data.zero_()


def louder(model: Any, vllm_config: Any) -> None:
    """Makes of vLLM's random weights, which are all within a thousandth, those of a model whose tokens depend on its attention:
    norms that do nothing, projections that keep a vector's size, sinks that take a good share.
    """
    for module in model.modules():
        kind, weight = type(module).__name__, getattr(module, "weight", None)
        if "Norm" in kind and weight is not None:
            weight.data.fill_(0.0 if kind.startswith("Gemma") else 1.0)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.data.fill_(SINK)
        elif name.endswith(("qkv_proj.weight", "o_proj.weight")) or "embed" in name:
            weight.data.mul_(300 if "o_proj" in name else 30)
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if getattr(layer, "has_sink", False):
            layer.process_weights_after_loading(vllm_config.model_config.dtype)


def outputs_of(model: Any, layers: list[str]) -> list[Any]:
    """The weights by which attention layers speak to the rest of a model: without them the layers are silent."""
    names = {f"{layer.rpartition('.')[0]}.o_proj.weight" for layer in layers}
    found = [weight for name, weight in model.named_parameters() if name in names]
    assert len(found) == len(layers), f"no o_proj beside some of {layers}"
    return found
