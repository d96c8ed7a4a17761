"""What must hold in vLLM on a GPU, on the embedded model: `python tests/vllm/checks.py [NAME ...]` prints a line per check.

vLLM runs in this process. Paths through the engine that compute the same batches with the same kernels must write the same text.
Other batches round otherwise, of which a packed cache makes other texts; so what is written is read by an engine with a 16-bit
cache, which must hardly prefer any other token to the ones written. How often texts part, and where, is held to what rounding does
to transformers over the same cache (`same_text_as_reference`). That the packed cache holds what it should is seen beside
transformers (`reference_path`) and in the loss. `test_gpu.py` runs this file and looks at its results.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ways to sum over GPUs that need multicast between them, which not every machine has; NCCL is there on all.
os.environ.setdefault("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import vllm_models as models  # noqa: E402 (tests/ is not on the path of a script)
from vllm_engines import (  # noqa: E402
    CHUNK,
    MEMORY_FLAGS,
    MODEL,
    NGRAM,
    NO_RINGS,
    PROMPT_TOKENS,
    Text,
    beside_sixteen_bit,
    capacity,
    close_losses,
    engine,
    fewer_regrets_with_rings,
    first_differences,
    generate,
    losses,
    model_folder,
    one_token,
    prompts,
    random_prompts,
    regrets,
    same_text,
    sensible,
    serving,
)
from vllm_pieces import small_pieces  # noqa: E402
from vllm_reference import reference_path, same_text_across_batch_sizes, same_text_as_reference  # noqa: E402
from vllm_runner import Result, plug_in, run_beside  # noqa: E402
from vllm_served import eval_of_servers  # noqa: E402

ALONE = ("speed", "tensor_parallel")
"""Checks that want the GPU for themselves."""
CHECKS: dict[str, Callable[[], str]] = {}


def check(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a check; its name is the function's, its result a line of figures."""
    CHECKS[function.__name__] = function
    return function


_REFERENCE: dict[str, Any] = {}


def reference(key: str, cache_dtype: str = "auto", **options: Any) -> Any:
    """What an eager engine that reads prompts whole gives, computed once: `text` (greedy tokens) or `losses`."""
    if f"{key} {cache_dtype} {options}" not in _REFERENCE:
        with engine(cache_dtype, max_num_batched_tokens=8192, **options) as llm:
            _REFERENCE[f"text {cache_dtype} {options}"] = generate(llm, prompts())
            _REFERENCE[f"losses {cache_dtype} {options}"] = losses(llm, prompts())
    return _REFERENCE[f"{key} {cache_dtype} {options}"]


def as_eager(got: list[Text], **options: Any) -> str:
    """Raises unless texts are what the packed cache gives in the plainest engine, which must have seen the same batches and run the
    same kernels: those that torch.compile makes round otherwise."""
    return f"beside eager: {same_text(got, reference('text', 'turboquant', **options))}"


@check
def eager() -> str:
    """Whole prompts, decode, no graphs; the loss of prompts that are read in one piece must be the 16-bit one."""
    got, found = reference("text", "turboquant"), reference("losses", "turboquant")
    return f"{close_losses(found, reference('losses'), 0.002)}; {sensible(got)}"


@check
def chunks() -> str:
    """Prompts in chunks of 512: later chunks read the packed prefix."""
    with engine(max_num_batched_tokens=CHUNK) as llm:
        found, got = losses(llm, prompts()), generate(llm, prompts())
    return f"{close_losses(found, reference('losses'))}; {sensible(got)}"


@check
def full_graphs() -> str:
    """Whole CUDA graphs of decode, no compilation."""
    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    with engine(enforce_eager=False, compilation_config=config, max_num_batched_tokens=8192) as llm:
        first, few = generate(llm, prompts()), generate(llm, prompts()[:3])  # three are padded to a graph of four
    return f"{as_eager(first)}; three, {sensible(few)}"


@check
def piecewise_graphs() -> str:
    """torch.compile with graphs between the attention layers only, which run outside of them."""
    config = {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    with engine(enforce_eager=False, compilation_config=config, max_num_batched_tokens=8192) as llm:
        return sensible(generate(llm, prompts()))


@check
def compiled() -> str:
    """The default: torch.compile, piecewise and full graphs."""
    config = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    with engine(enforce_eager=False, compilation_config=config, max_num_batched_tokens=8192) as llm:
        whole = generate(llm, prompts())
    with engine(enforce_eager=False, compilation_config=config, max_num_batched_tokens=CHUNK) as llm:
        cut = generate(llm, prompts())
    return sensible(whole, cut)


@check
def prefix_hit() -> str:
    """The second time a prompt's blocks are found, and only its end is computed."""
    with engine(enable_prefix_caching=True, max_num_batched_tokens=8192) as llm:
        first, hit = generate(llm, prompts()), generate(llm, prompts())
    return f"{as_eager(first)}; {sensible(hit)}"


@check
def ngram() -> str:
    """n-gram speculation with graphs: 1 + 3 tokens are verified at once. With rings, drafts say how many tokens are raw."""
    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8, 16, 32]}
    options = {"speculative_config": NGRAM, "compilation_config": config, "enforce_eager": False}
    with engine(max_num_batched_tokens=8192, **options) as llm:
        got = generate(llm, prompts())
    with engine(max_num_batched_tokens=8192, **options, **NO_RINGS) as llm:
        packed = generate(llm, prompts())
    return f"without rings, {sensible(packed)}; with rings, {sensible(got)}"


@check
def draft_model() -> str:
    """The model drafts for itself, so nearly all drafts should be taken where neither has rings; graphs on."""
    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8, 16, 32]}
    draft = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 3}
    options = {"speculative_config": draft, "compilation_config": config, "enforce_eager": False}
    with engine(max_num_batched_tokens=8192, disable_log_stats=False, **options, **NO_RINGS) as llm:
        got, counts = generate(llm, prompts()), {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    drafted, taken = (counts[f"vllm:spec_decode_num_{what}_tokens"] for what in ("draft", "accepted"))
    assert taken > 0.9 * drafted, f"{taken} of {drafted} drafts were taken"
    with engine(max_num_batched_tokens=8192, **options) as llm:
        beside_rings = generate(llm, prompts())
    return f"{taken} of {drafted} drafts taken; {sensible(got)}; with rings, {sensible(beside_rings)}"


@check
def preemption() -> str:
    """More sequences than fit: some are thrown out and computed again."""
    texts = prompts(8, 700)
    blocks = 8 * 704 // 32 + 8  # all prompts, and hardly a token more
    options = {"num_gpu_blocks_override": blocks, "max_model_len": 1024, "disable_log_stats": False}
    with engine(max_num_batched_tokens=CHUNK, **options) as llm:
        got, counts = generate(llm, texts, 96), {m.name: getattr(m, "value", None) for m in llm.get_metrics()}
    assert counts["vllm:num_preemptions"] > 0, "nothing was preempted"
    return f"{counts['vllm:num_preemptions']} preemptions; {sensible(got, texts=texts)}"


@check
def skip_layers() -> str:
    """Layers 0 and 5 in 16 bits."""
    with engine(kv_cache_dtype_skip_layers=["0", "5"], max_num_batched_tokens=8192) as llm:
        got, fit = generate(llm, prompts()), capacity(llm)
    return f"{sensible(got)}; {fit} tokens fit"


@check
def half_precision() -> str:
    """fp16 queries, keys and values."""
    with engine(dtype="float16", max_num_batched_tokens=CHUNK) as llm:
        found, got = losses(llm, prompts()), generate(llm, prompts())
    return f"{close_losses(found, reference('losses'))}; {sensible(got)}"


@check
def outliers() -> str:
    """`-o16`: channels from the checkpoint."""
    with engine("kvturbo_k4v4-o16", max_num_batched_tokens=CHUNK) as llm:
        found, got = losses(llm, prompts()), generate(llm, prompts())
    return f"{close_losses(found, reference('losses'))}; {sensible(got)}"


@check
def many_texts() -> str:
    """How often 64 texts differ from the 16-bit engine's: its own in smaller batches, fp8's and the packed cache's."""
    texts, lines = prompts(64, 512), []
    with engine("auto", max_num_seqs=64) as llm:
        wanted = generate(llm, texts)
        same = regrets(llm, texts, wanted)
    for name, options in {
        "16 bits by 8": {"cache_dtype": "auto", "max_num_seqs": 8},
        "fp8": {"cache_dtype": "fp8", "max_num_seqs": 64},
        "turboquant": {"cache_dtype": "turboquant", "max_num_seqs": 64},
    }.items():
        with engine(**options) as llm:
            got = generate(llm, texts)
        gaps = sorted(gap for _, gap in first_differences(got, wanted))
        lines.append(
            f"{name} {len(gaps)} (gaps {gaps[len(gaps) // 2 :][:1]} {gaps[-1:]}), {sensible(got, texts=texts)}"
        )
    return f"of 64 differ: {'; '.join(lines)}; 16 bits reading its own: {sum(value > 0 for value in same)} otherwise"


@check
def two_bits() -> str:
    """`k2v2`: its loss is worse, and by no more than 0.5."""
    with engine("kvturbo_k2v2", max_num_batched_tokens=CHUNK) as llm:
        found = losses(llm, prompts())
    return close_losses(found, reference("losses"), 0.1)


for name, model in {
    "sliding": models.SLIDING,  # the full layers alone are packed
    "soft_caps": models.SOFT_CAP,
    "sinks": models.SINKS,
    "local_chunks": models.LOCAL_CHUNKS,
    "mamba": models.MAMBA,
    "gated_delta": models.GATED_DELTA,
}.items():
    CHECKS[name] = partial(beside_sixteen_bit, model)


CHECKS["rings"] = fewer_regrets_with_rings
CHECKS["reference_path"] = reference_path
CHECKS["same_text_as_reference"] = same_text_as_reference
CHECKS["same_text_across_batch_sizes"] = partial(same_text_across_batch_sizes, "bfloat16")
CHECKS["same_text_across_batch_sizes_fp16"] = partial(same_text_across_batch_sizes, "float16")
CHECKS["small_pieces"] = small_pieces
CHECKS["eval_of_servers"] = eval_of_servers


@check
def head_dims() -> str:
    """head_dim 64 and 256."""
    return "; ".join(
        f"{model['head_dim']}: {beside_sixteen_bit(model)}" for model in (models.HEAD_DIM_64, models.HEAD_DIM_256)
    )


@check
def cpu_offload() -> str:
    """Blocks go to the host's memory and come back: the second time the prompts are found there."""
    few = {"num_gpu_blocks_override": 4 * PROMPT_TOKENS // 32 + 32, "max_model_len": 2048}
    with engine(enable_prefix_caching=True, kv_offloading_size=1.0, max_num_batched_tokens=8192, **few) as llm:
        first = generate(llm, prompts())
        generate(llm, prompts(8)[4:])  # pushes the first ones out
        outputs = llm.generate(prompts(), one_token(), use_tqdm=False)
        again = generate(llm, prompts())
    found = [output.num_cached_tokens for output in outputs]
    assert min(found) > PROMPT_TOKENS // 2, f"cached tokens of each prompt: {found}"
    return f"{as_eager(first, **NO_RINGS)}; {found} tokens of each prompt came back; {sensible(again)}"


@check
def processes() -> str:
    """The engine and its worker in processes of their own, as a server has them: the plugin is found there. Prompts come one after
    another, so batches may be others than in one process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    try:
        with engine(distributed_executor_backend="mp", max_num_batched_tokens=8192) as llm:
            got = generate(llm, prompts())
    finally:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return sensible(got)


@check
def server() -> str:
    """`vllm serve MODEL --kv-cache-dtype turboquant`, asked for the same texts at once."""
    with serving("--kv-cache-dtype", "turboquant", *MEMORY_FLAGS, "--max-model-len", "4096") as ask:
        got = ask(prompts())
    return sensible([(tokens, []) for tokens in got])


@check
def tensor_parallel() -> str:
    """Two GPUs, one process each: every rank has half of the heads."""
    import torch

    assert torch.cuda.device_count() > 1, "needs two GPUs"
    with engine("kvturbo_k4v4-o16", tensor_parallel_size=2, max_num_batched_tokens=CHUNK) as llm:
        got = generate(llm, prompts())
    return sensible(got)


@check
def speed() -> str:
    """Random weights of Qwen2.5-7B's shape, 8 sequences at 8k: seconds per decode step and for the prompts, against 16 bits."""
    from vllm import SamplingParams

    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [8]}
    options = {
        "model": model_folder(models.QWEN_7B), "load_format": "dummy", "max_model_len": 8704, "max_num_seqs": 8,
        "enforce_eager": False,
        "gpu_memory_utilization": 0.6, "kv_cache_memory_bytes": None, "compilation_config": config,
    }  # fmt: skip
    texts, lines = random_prompts(8, 8192, 150000), []
    for cache_dtype in ("auto", "turboquant"):
        with engine(cache_dtype, **options) as llm:
            seconds = {}
            for new_tokens in (1, 1, 65):
                parameters = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
                start = time.perf_counter()
                llm.generate(texts, parameters, use_tqdm=False)
                seconds[new_tokens] = time.perf_counter() - start
            step = (seconds[65] - seconds[1]) / 64 * 1e3
            lines.append(f"{cache_dtype}: step {step:.2f} ms, prompts {seconds[1]:.2f} s, {capacity(llm)} tokens fit")
    return "; ".join(lines)


def run(name: str) -> Result:
    """One check, whatever happens in it."""
    start = time.perf_counter()
    try:
        text, ok = CHECKS[name](), True
    except Exception as error:
        traceback.print_exc()
        text, ok = f"{type(error).__name__}: {str(error)[:600]}", False
    result = Result(name, ok, round(time.perf_counter() - start, 1), text)
    print(f"CHECK {name}: {'ok' if ok else 'FAILED'} in {result.seconds} s: {text}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"any of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no further check is begun")
    parser.add_argument("--json", type=Path, help="a file to write the results to")
    parser.add_argument("--jobs", type=int, default=1, help="checks at once, each in a process of its own (default: 1)")
    parser.add_argument("--log", type=Path, help="a folder for what those processes print")
    options = parser.parse_args()
    plug_in()
    names = options.names or list(CHECKS)
    start, results = time.perf_counter(), []
    if options.jobs > 1:
        results = run_beside(__file__, names, ALONE, options.jobs, options.budget, options.log)
        names = []
    for name in names:
        if time.perf_counter() - start > options.budget:
            results.append(Result(name, False, 0.0, "not run: out of time"))
            continue
        results.append(run(name))
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(f"\n{'check':<16}{'':<8}{'s':>6}  result")
    for result in results:
        print(f"{result.name:<16}{'ok' if result.ok else 'FAILED':<8}{result.seconds:>6}  {result.text[:300]}")
    sys.exit(not all(result.ok for result in results))


if __name__ == "__main__":
    main()
