"""Compare packed caches with the 16-bit one on real input: text, a table, a plot.

Generates from a held-out text with both, then measures bytes, KL divergence and retrieval at 4k tokens. Writes demo.json
and demo.png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvturbo.cli import common
from kvturbo.cli.errors import UsageError, bad_input
from kvturbo.cli.output import print_json, progress
from kvturbo.eval.report import environment, size, table, write_json

if TYPE_CHECKING:
    from kvturbo.eval.model import LoadedModel

FORMATS = ("16bit", "k4v4", "k4v2", "k2v2")
PROMPT_TOKENS, NEW_TOKENS = 512, 96
TEXT_OPTIONS = {"prefix": 3072, "scored": 1024, "chunk": 64}
HARD_SETTING = "hard-4k-8"
"""Where the embedded model with its 16-bit cache is right in about 95 of 100 cases, so that a worse cache shows."""
SETTINGS = ("multikey-4k", HARD_SETTING)
HEADER = ("cache", "bytes/token", "smaller", "KL mean", "KL p99", "same top-1", "perplexity", *SETTINGS)


def configure(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    parser.add_argument(
        "--prompts",
        type=int,
        default=13,
        metavar="N",
        help="prompts per retrieval setting, 16 questions each (default: 13)",
    )
    parser.add_argument(
        "--texts", type=int, default=4, metavar="N", help="texts of 1,024 scored tokens each (default: 4)"
    )


def run(arguments: argparse.Namespace) -> int:
    began = time.perf_counter()
    from kvturbo.eval.caches import CacheSpec
    from kvturbo.eval.plot import tradeoff
    from kvturbo.eval.registry import Task
    from kvturbo.eval.runner import Evaluation
    from kvturbo.eval.tasks.retrieval import RetrievalTask
    from kvturbo.eval.tasks.text import TextTask

    say = _silent if arguments.json else print
    with bad_input():
        tasks: dict[str, Task] = {
            "text": TextTask(texts=arguments.texts, **TEXT_OPTIONS),
            **{setting: RetrievalTask(setting, arguments.prompts) for setting in SETTINGS},
        }
    out = _folder(arguments.out)
    loaded = common.load(arguments)
    with bad_input():
        evaluation = Evaluation(loaded, tasks, [CacheSpec(name) for name in FORMATS])
    generation = _generations(loaded)
    say(_generation_text(generation))
    results = common.run_evaluation(evaluation)
    report = {
        "environment": environment(),
        "model": describe(loaded),
        "rows": rows_of(results),
        "generation": generation,
        "tasks": results["tasks"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(out / "demo.json", report)
    tradeoff(report["rows"], out / "demo.png", f"{loaded.name}: packed caches against 16 bits")
    say(report_text(report))
    say(f"\n{out / 'demo.json'} and {out / 'demo.png'} written; {report['seconds']:.0f} s in all")
    if arguments.json:
        print_json(report)
    return 0


def describe(loaded: LoadedModel) -> dict[str, Any]:
    """The model's name and sizes."""
    config = loaded.model.config.get_text_config()
    return {
        "name": loaded.name,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "layers": config.num_hidden_layers,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def rows_of(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per cache: sizes at the first retrieval setting's prompts, divergence, retrieval by setting."""
    caches = {name: task["caches"] for name, task in results["tasks"].items()}
    sizes = {name: caches[SETTINGS[0]][name]["bytes_per_token"] for name in FORMATS}
    rows = []
    for name in FORMATS:
        row = {"format": name, "bytes_per_token": sizes[name], "compression": sizes["16bit"] / sizes[name]}
        figures = caches["text"][name]
        row |= {key: figures[key] for key in ("kl_mean", "kl_p99", "same_top1", "perplexity", "scored_tokens")}
        row["retrieval"] = {
            setting: {key: caches[setting][name][key] for key in ("accuracy", "low", "high", "questions")}
            for setting in SETTINGS
        }
        rows.append(row)
    return rows


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text, for `HEADER`."""
    reference = row["format"] == "16bit"
    return (
        row["format"],
        f"{row['bytes_per_token']:,.0f}",
        f"{row['compression']:.2f}x",
        "0" if reference else f"{row['kl_mean']:.5f}",
        "0" if reference else f"{row['kl_p99']:.4f}",
        f"{100 * row['same_top1']:.2f} %",
        f"{row['perplexity']:.3f}",
        *(
            f"{100 * found['accuracy']:.1f} % ({100 * found['low']:.1f}-{100 * found['high']:.1f})"
            for found in row["retrieval"].values()
        ),
    )


def notes(report: dict[str, Any]) -> str:
    """What the table's figures mean, for text and Markdown alike."""
    model, options, row = report["model"], report["tasks"]["text"]["options"], report["rows"][0]
    questions = " and ".join(f"n = {found['questions']} ({name})" for name, found in row["retrieval"].items())
    return (
        f"Model {model['name']}: {model['parameters'] / 1e6:.1f} M parameters, {model['layers']} layers, {model['kv_heads']} "
        f"KV heads, head_dim {model['head_dim']}, run in {model['dtype']}. Bytes are those of the live cache, all layers, over "
        f"its tokens, right after packing the context of a {SETTINGS[0]} prompt. Every format has its default windows of tokens "
        f"that stay in 16 bits (none at 4-bit keys; the first 4 and the newest 128 below), counted; "
        f"16bit is the stock cache held in 16 bits. KL divergence "
        f"is to the 16-bit cache, in nats per token, over {row['scored_tokens']:,} tokens of held-out text: "
        f"{options['texts']} x {options['scored']:,}, each after {options['prefix']:,} packed tokens, in chunks of "
        f"{options['chunk']}. Retrieval is exact match with a 95 % Wilson interval, {questions}; {HARD_SETTING} is a setting "
        f"that is hard for the model itself."
    )


def report_text(report: dict[str, Any]) -> str:
    """Table and notes."""
    return "\n" + table(HEADER, [cells(row) for row in report["rows"]]) + "\n\n" + _wrapped(notes(report))


def _generations(loaded: LoadedModel) -> dict[str, Any]:
    import torch

    from kvturbo.eval.caches import CacheSpec
    from kvturbo.eval.generation import generate

    middle = len(loaded.text) // 2
    ids = torch.from_numpy(loaded.text[middle : middle + PROMPT_TOKENS].copy())[None]
    done = {}
    with progress(2 * NEW_TOKENS, "generating", "token") as bar:
        for name in ("16bit", "k4v4"):
            cache = CacheSpec(name).new(loaded)
            done[name] = generate(loaded, cache, ids, max_new_tokens=NEW_TOKENS, write=lambda _: bar.update())
    stock, packed = (done[name].new_ids for name in ("16bit", "k4v4"))
    same = next(
        (i for i, (a, b) in enumerate(zip(stock, packed, strict=False)) if a != b), min(len(stock), len(packed))
    )
    return {
        "prompt": loaded.tokenizer.decode(ids[0].tolist(), skip_special_tokens=True),
        "same_leading_tokens": same,
        **{name: generated.facts() for name, generated in done.items()},
    }


def _generation_text(generation: dict[str, Any]) -> str:
    blocks = [
        f"Prompt, {generation['16bit']['prompt_tokens']} tokens of held-out text, ending in:\n"
        + _tail(generation["prompt"])
    ]
    for name in ("16bit", "k4v4"):
        made = generation[name]
        blocks.append(f"{name}, cache of {size(made['cache_bytes'])}:\n{_indented(made['text'])}")
    new = generation["k4v4"]["new_tokens"]
    blocks.append(f"The first {generation['same_leading_tokens']} of {new} tokens are the same.")
    return "\n\n".join(blocks)


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: can't create the folder {path}: {error.strerror}") from error
    return path


def _tail(text: str, lines: int = 6) -> str:
    return _indented("\n".join(text.splitlines()[-lines:]))


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def _wrapped(text: str, width: int = 110) -> str:
    import textwrap

    return textwrap.fill(text, width)


def _silent(_: str) -> None:
    """Nothing: the JSON object is all there is on stdout."""
