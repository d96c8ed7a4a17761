"""Evaluates the embedded model with a 16-bit cache: retrieval by setting, and loss on the held-out text.

The context is prefilled into a transformers cache, the questions follow as one chunk. The seed and the settings are
fixed in ``kvturbo.eval.retrieval``; the rule for the hard setting is ``choose_hard``. Writes ``eval.json``.

    PYTHONPATH=src python models/evaluate.py --model models/kvturbo-12m
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvturbo.eval.retrieval import (
    HARD_LEVELS,
    SETTINGS,
    RetrievalVocab,
    Sample,
    get_setting,
    samples,
    score,
    wilson_interval,
)

SEED = 2026
WINDOW = 4096
HARD_TARGET = 0.92
TOKENS_PER_BATCH = 65_536


def haystack_tokens(folder: Path) -> np.ndarray:
    """Token ids of the held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return np.array(tokenizer((folder / "heldout.txt").read_text(), verbose=False).input_ids, dtype=np.int64)


def _batches(items: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _stack(arrays: list[np.ndarray], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


@torch.inference_mode()
def answers(model: torch.nn.Module, batch: list[Sample]) -> list[bool]:
    """Exact-match results of all questions of a batch of samples of equal lengths."""
    cache = DynamicCache()
    device = next(model.parameters()).device
    model(_stack([s.context for s in batch], device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits = model(_stack([s.questions for s in batch], device), past_key_values=cache, use_cache=True).logits
    return [right for row, sample in zip(logits, batch, strict=True) for right in score(row, sample)]


def retrieval(
    model: torch.nn.Module, name: str, questions: int, text: np.ndarray, vocab: RetrievalVocab
) -> dict[str, object]:
    """Accuracy of a named setting over at least ``questions`` questions, with its 95 % Wilson interval."""
    setting = get_setting(name)
    count = -(-questions // setting.questions)
    right: list[bool] = []
    on_gpu = next(model.parameters()).device.type == "cuda"
    size = max(1, TOKENS_PER_BATCH // setting.length) if on_gpu else 1
    for batch in _batches(samples(name, count, text, vocab, SEED), size):
        right += answers(model, batch)
    low, high = wilson_interval(sum(right), len(right))
    rate = sum(right) / len(right)
    return {"accuracy": round(rate, 4), "low": round(low, 4), "high": round(high, 4), "questions": len(right)}


@torch.inference_mode()
def heldout_loss(model: torch.nn.Module, text: np.ndarray, size: int) -> dict[str, object]:
    """Mean loss over consecutive windows of the held-out text; ``size`` is its length in bytes."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(text) - 1, WINDOW):
        ids = torch.from_numpy(text[start : start + WINDOW + 1]).to(device)[None]
        logits = model(ids[:, :-1], use_cache=False).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    bits = total / np.log(2) / size
    return {"nats_per_token": round(total / count, 4), "bits_per_byte": round(float(bits), 4), "tokens": count}


def choose_hard(results: dict[str, dict[str, object]], size: str) -> str:
    """The level of the hard ladder whose accuracy is nearest to ``HARD_TARGET``; the easier one on a tie."""
    names = [name for level in HARD_LEVELS if (name := f"hard-{size}-{level}") in results]
    return min(names, key=lambda name: abs(float(str(results[name]["accuracy"])) - HARD_TARGET))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/kvturbo-12m"))
    parser.add_argument("--out", type=Path, help="where to write the results (default: eval.json in --model)")
    parser.add_argument("--questions", type=int, default=2048, help="per setting, rounded up to whole samples")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    return parser.parse_args()


def main() -> None:
    """Runs all settings, prints a line for each, writes the results."""
    arguments = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, dtype)).to(device).eval()
    text, vocab = haystack_tokens(arguments.model), RetrievalVocab.load(arguments.model)
    start = time.time()
    loss = heldout_loss(model, text, (arguments.model / "heldout.txt").stat().st_size)
    print(f"held-out {loss}", flush=True)
    results = {}
    for name in arguments.settings:
        results[name] = retrieval(model, name, arguments.questions, text, vocab)
        print(f"{time.time() - start:5.0f}s {name:12s} {results[name]}", flush=True)
    hard = {size: choose_hard(results, size) for size in ("4k", "8k") if f"hard-{size}-1" in results}
    report = {
        "seed": SEED,
        "dtype": dtype,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "heldout": loss,
        "hard": hard,
        "retrieval": results,
    }
    out = arguments.out or arguments.model / "eval.json"
    out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
