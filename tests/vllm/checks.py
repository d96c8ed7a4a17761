"""What must hold in vLLM on a GPU, on the embedded model: `python tests/vllm/checks.py [NAME ...]` prints a line per check.

vLLM runs in this process. Text is compared with vLLM's own 16-bit cache: a packed cache may change a token only where the 16-bit
model hardly prefers one to the other. `test_gpu.py` runs this file and looks at its results.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import vllm_models as models  # noqa: E402 (tests/ is not on the path of a script)
from vllm_engines import (  # noqa: E402
    MODEL,
    PROMPT_TOKENS,
    capacity,
    close_losses,
    engine,
    generate,
    losses,
    prompts,
    same_text,
)

CHUNK = 512
ALONE = ("speed", "tensor_parallel")
"""Checks that want the GPU for themselves."""
CHECKS: dict[str, Callable[[], str]] = {}


@dataclass
class Result:
    name: str
    ok: bool
    seconds: float
    text: str


def check(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a check; its name is the function's, its result a line of figures."""
    CHECKS[function.__name__] = function
    return function


def plug_in() -> None:
    """Makes kvturbo's entry point visible to this process and its children where the package is not installed."""
    from importlib.metadata import entry_points

    os.environ["VLLM_PLUGINS"] = "kvturbo"
    if any(point.name == "kvturbo" for point in entry_points(group="vllm.general_plugins")):
        return
    folder = Path(tempfile.mkdtemp())
    info = folder / "kvturbo_entry_point-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvturbo-entry-point\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nkvturbo = kvturbo.vllm.plugin:register\n")
    paths = [str(folder), str(ROOT / "src")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])


_REFERENCE: dict[str, Any] = {}


def reference(key: str = "text", **options: Any) -> Any:
    """What the 16-bit cache gives, computed once: `text` (greedy tokens) and `losses`."""
    name = key + json.dumps(options, sort_keys=True)
    if name not in _REFERENCE:
        with engine("auto", **options) as llm:
            _REFERENCE["text" + name.removeprefix(key)] = generate(llm, prompts())
            _REFERENCE["losses" + name.removeprefix(key)] = losses(llm, prompts())
    return _REFERENCE[name]


@check
def eager() -> str:
    """Whole prompts, decode, no graphs; loss of prompts that are read in one piece must be the 16-bit one."""
    with engine(max_num_batched_tokens=8192) as llm:
        return same_text(generate(llm, prompts()), reference()) + f"; {capacity(llm)} tokens fit"


@check
def chunks() -> str:
    """Prompts in chunks of 512: later chunks read the packed prefix."""
    with engine(max_num_batched_tokens=CHUNK) as llm:
        loss = close_losses(losses(llm, prompts()), reference("losses"))
        return f"{loss}; {same_text(generate(llm, prompts()), reference())}"


@check
def full_graphs() -> str:
    """Whole CUDA graphs of decode, no compilation."""
    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    with engine(enforce_eager=False, compilation_config=config) as llm:
        first = same_text(generate(llm, prompts()), reference())
        few = generate(llm, prompts()[:3])  # padded to a graph of 4
        return f"{first}; three of them: {same_text(few, reference()[:3])}"


@check
def prefix_hit() -> str:
    """The second time a prompt's blocks are found, and only its end is computed."""
    with engine(enable_prefix_caching=True, max_num_batched_tokens=8192) as llm:
        first = generate(llm, prompts())
        return f"first {same_text(first, reference())}; hit {same_text(generate(llm, prompts()), reference())}"


@check
def compiled() -> str:
    """The default: torch.compile, piecewise and full graphs."""
    config = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
    with engine(enforce_eager=False, compilation_config=config, max_num_batched_tokens=CHUNK) as llm:
        return same_text(generate(llm, prompts()), reference())


@check
def ngram() -> str:
    """n-gram speculation with graphs: 1 + 3 tokens are verified at once."""
    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8, 16, 32]}
    draft = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(enforce_eager=False, compilation_config=config, speculative_config=draft) as llm:
        return same_text(generate(llm, prompts()), reference())


@check
def preemption() -> str:
    """More sequences than fit: some are thrown out and computed again."""
    texts = prompts(8, 700)
    blocks = 8 * 704 // 32 + 8  # all prompts, and hardly a token more
    with engine("auto") as llm:
        wanted = generate(llm, texts, 96)
    with engine(num_gpu_blocks_override=blocks, max_model_len=1024, max_num_batched_tokens=CHUNK) as llm:
        return same_text(generate(llm, texts, 96), wanted)


@check
def skip_layers() -> str:
    """Layers 0 and 5 in 16 bits."""
    with engine(kv_cache_dtype_skip_layers=["0", "5"]) as llm:
        return same_text(generate(llm, prompts()), reference())


@check
def half_precision() -> str:
    """fp16 queries, keys and values."""
    with engine(dtype="float16", max_num_batched_tokens=CHUNK) as llm:
        return close_losses(losses(llm, prompts()), reference("losses"))


@check
def outliers() -> str:
    """`-o16`: channels from the checkpoint."""
    with engine("kvturbo_k4v4-o16", max_num_batched_tokens=CHUNK) as llm:
        loss = close_losses(losses(llm, prompts()), reference("losses"))
        return f"{loss}; {same_text(generate(llm, prompts()), reference())}"


@check
def two_bits() -> str:
    """`k2v2`: its loss is worse, and by no more than 0.5."""
    with engine("kvturbo_k2v2", max_num_batched_tokens=CHUNK) as llm:
        return close_losses(losses(llm, prompts()), reference("losses"), 0.5)


def _folder(config: dict[str, Any]) -> str:
    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(config))
    return folder


def _random_prompts(count: int, tokens: int, vocabulary: int) -> list[dict[str, list[int]]]:
    rng = random.Random(0)
    return [{"prompt_token_ids": [rng.randrange(10, vocabulary) for _ in range(tokens)]} for _ in range(count)]


def _beside_sixteen_bit(config: dict[str, Any]) -> str:
    """Random weights of a model in the packed cache and in 16 bits: how many first tokens agree, and how many tokens fit."""
    options = {"model": _folder(config), "load_format": "dummy", "max_num_batched_tokens": CHUNK}
    texts = _random_prompts(4, PROMPT_TOKENS, 1000)
    with engine("auto", **options) as llm:
        wanted, before = generate(llm, texts, 8), capacity(llm)
    with engine(**options) as llm:
        got, after = generate(llm, texts, 8), capacity(llm)
    first = sum(a[0][0] == b[0][0] for a, b in zip(got, wanted, strict=True))
    return f"{first} of {len(texts)} first tokens as in 16 bits; {before} -> {after} tokens fit"


@check
def sliding() -> str:
    """Sliding-window and full layers, random weights: the model runs, and the full layers alone are packed."""
    return _beside_sixteen_bit(models.SLIDING)


@check
def mamba() -> str:
    """Mamba and attention layers in one pool, random weights."""
    return _beside_sixteen_bit(models.MAMBA)


@check
def cpu_offload() -> str:
    """Blocks go to the host's memory and come back: the second time the prompts are found there."""
    few = {"num_gpu_blocks_override": 4 * PROMPT_TOKENS // 32 + 32, "max_model_len": 2048}
    with engine(enable_prefix_caching=True, kv_offloading_size=1.0, max_num_batched_tokens=8192, **few) as llm:
        first = generate(llm, prompts())
        generate(llm, prompts(8)[4:])  # pushes the first ones out
        return f"first {same_text(first, reference())}; again {same_text(generate(llm, prompts()), reference())}"


@check
def draft_model() -> str:
    """The model drafts for itself, so all drafts should be taken; graphs on."""
    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [4, 8, 16, 32]}
    draft = {"method": "draft_model", "model": str(MODEL), "num_speculative_tokens": 3}
    with engine(enforce_eager=False, compilation_config=config, speculative_config=draft) as llm:
        return same_text(generate(llm, prompts()), reference())


@check
def tensor_parallel() -> str:
    """Two GPUs, one process each: every rank has half of the heads."""
    import torch

    assert torch.cuda.device_count() > 1, "needs two GPUs"
    with engine("kvturbo_k4v4-o16", tensor_parallel_size=2, max_num_batched_tokens=CHUNK) as llm:
        return same_text(generate(llm, prompts()), reference())


@check
def reference_path() -> str:
    """Teacher-forced, in the same chunks: the distribution of every token, against transformers over the same packed cache."""
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    from kvturbo.hf import TurboCache

    prompt = prompts(1)
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    with engine(max_num_batched_tokens=CHUNK, max_num_seqs=1, max_logprobs=-1) as llm:
        output = llm.generate(prompt, parameters, use_tqdm=False)[0]
    rows = [[entry[token].logprob for token in range(1024)] for entry in output.prompt_logprobs[1:]]
    got = torch.tensor(rows, dtype=torch.float64)

    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="kvturbo", dtype=torch.bfloat16).cuda()
    past = TurboCache(model.config, "k4v4")
    ids = torch.tensor([prompt[0]["prompt_token_ids"]], device="cuda")
    with torch.no_grad():
        logits = [model(chunk, past_key_values=past).logits[0] for chunk in ids.split(CHUNK, 1)]
    wanted = torch.cat(logits)[:-1].double().log_softmax(-1).cpu()
    divergence = (wanted.exp() * (wanted - got)).sum(-1)
    assert divergence.mean() < 1e-3, f"KL {divergence.mean():.2e}"
    return f"KL {divergence.mean():.2e}, of the worst token {divergence.max():.2e}"


@check
def speed() -> str:
    """Random weights of Qwen2.5-7B's shape, 8 sequences at 8k: seconds per decode step and for the prompts, against 16 bits."""
    from vllm import SamplingParams

    config = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [8]}
    options = {
        "model": _folder(models.QWEN_7B), "load_format": "dummy", "max_model_len": 8704, "max_num_seqs": 8, "enforce_eager": False,
        "gpu_memory_utilization": 0.6, "kv_cache_memory_bytes": None, "compilation_config": config,
    }  # fmt: skip
    texts, lines = _random_prompts(8, 8192, 150000), []
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


def run_beside(names: list[str], jobs: int, budget: float, log: Path | None) -> list[Result]:
    """Checks in processes of their own, several at once on the same GPU; those of `ALONE` afterwards, by themselves."""
    deadline = time.monotonic() + budget
    folder = log or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    together, alone = [n for n in names if n not in ALONE], [n for n in names if n in ALONE]

    def one(name: str) -> Result:
        left = deadline - time.monotonic()
        if left <= 0:
            return Result(name, False, 0.0, "not run: out of time")
        file, start = folder / f"{name}.json", time.monotonic()
        with (folder / f"{name}.log").open("w") as output:
            command = [sys.executable, __file__, name, "--json", str(file)]
            try:
                subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False, timeout=left)
            except subprocess.TimeoutExpired:
                return Result(name, False, round(time.monotonic() - start, 1), "stopped: out of time")
        if not file.exists():
            return Result(name, False, round(time.monotonic() - start, 1), f"the process died: see {output.name}")
        result = Result(**json.loads(file.read_text())[0])
        print(f"CHECK {name}: {'ok' if result.ok else 'FAILED'}", flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(one, together))
    return results + [one(name) for name in alone]


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
        results = run_beside(names, options.jobs, options.budget, options.log)
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
