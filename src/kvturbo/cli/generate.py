"""Generate text with a packed KV cache, then say what the cache took.

The prompt comes from --prompt, --file, or standard input. Text is streamed to stdout, figures go to stderr after it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvturbo.cli import common
from kvturbo.cli.errors import UsageError, bad_input
from kvturbo.cli.output import print_json
from kvturbo.eval.report import size

if TYPE_CHECKING:
    from kvturbo.eval.caches import CacheSpec
    from kvturbo.eval.model import LoadedModel

LEAST_TEMPERATURE = 1e-5
"""Logits over anything smaller overflow; 0 takes the likeliest token."""


def configure(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser)
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--format", default="k4v4", help="a format's name, or 16bit for the stock cache (default: k4v4)")
    kept.add_argument("--plan", type=Path, metavar="PATH", help="a plan of kvturbo check or plan, instead of --format")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--file", type=Path, metavar="PATH", help="a text file with the prompt")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="tokens to generate (default: 128)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    common.add_window_options(parser)


def run(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)
    _check_numbers(arguments)
    from kvturbo.eval.caches import check_name
    from kvturbo.eval.generation import generate

    with bad_input():
        spec = _spec(arguments, check_name(arguments.format))
    loaded = common.load(arguments)
    ids = _prompt_ids(loaded, prompt, arguments.max_new_tokens)
    with bad_input():
        cache = spec.new(loaded)
    done = generate(
        loaded,
        cache,
        ids,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
        write=None if arguments.json else _write,
    )
    result = {"model": loaded.name, "format": spec.name, "prompt": prompt, **done.facts()}
    if arguments.json:
        print_json(result)
    else:
        print()
        print(_summary(result), file=sys.stderr)
    return 0


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        text = arguments.prompt
    elif arguments.file is not None:
        text = common.read_text(arguments.file)
    elif sys.stdin is not None and not sys.stdin.isatty():
        text = sys.stdin.read()
    else:
        raise UsageError("no prompt: give --prompt TEXT, --file PATH, or text on standard input")
    if not text:
        raise UsageError("the prompt is empty")
    return text


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")
    if not 0 <= arguments.temperature < float("inf"):
        raise UsageError(f"--temperature must be a number from 0 on, got {arguments.temperature}")
    if 0 < arguments.temperature < LEAST_TEMPERATURE:
        raise UsageError(f"--temperature must be 0 or at least {LEAST_TEMPERATURE}, got {arguments.temperature}")
    if not -(2**63) <= arguments.seed < 2**64:
        raise UsageError(f"--seed must be from -2**63 to 2**64 - 1, got {arguments.seed}")


def _prompt_ids(loaded: LoadedModel, prompt: str, new_tokens: int) -> Any:
    ids = loaded.tokenizer(prompt, return_tensors="pt", verbose=False).input_ids
    length, context = ids.shape[1], loaded.context
    if length == 0:
        raise UsageError("the prompt has no tokens")
    if context is not None and length + new_tokens > context:
        raise UsageError(
            f"prompt of {length} tokens and --max-new-tokens {new_tokens} make {length + new_tokens}, "
            f"more than the model's context of {context}"
        )
    return ids


def _spec(arguments: argparse.Namespace, name: str) -> CacheSpec:
    from kvturbo.eval.caches import CacheSpec
    from kvturbo.eval.planning import PlanSpec

    if arguments.plan is not None:
        return PlanSpec.read(arguments.plan, arguments.recent, arguments.sink)
    return CacheSpec(name, arguments.recent, arguments.sink)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _summary(result: dict[str, Any]) -> str:
    ratio = result["sixteen_bit_bytes"] / result["cache_bytes"]
    tokens, speed = result["new_tokens"], result["tokens_per_second"]
    rate = "" if speed is None else f", {speed:.1f} tokens/s"
    return (
        f"\n{tokens} tokens after a prompt of {result['prompt_tokens']}{rate}"
        f" (prompt: {result['prompt_seconds']:.2f} s)\n"
        f"cache {result['format']}: {size(result['cache_bytes'])} measured for {result['cache_tokens']} tokens; "
        f"16 bits take {size(result['sixteen_bit_bytes'])} ({ratio:.2f}x)"
    )
