"""Choose a format and 16-bit windows for every layer within a budget of bits, by measuring how much each layer suffers.

Each layer is packed alone with each choice and compared with the 16-bit cache on the model's text and, if it has
retrieval.json, on retrieval prompts. The best plan within the budget goes to kvturbo.json, which TurboCache(plan=PATH) takes.
Bits count everything: scales, windows, outlier channels, layers that stay in 16 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvturbo.cli import check, common
from kvturbo.cli.errors import UsageError, bad_input
from kvturbo.cli.output import print_json, progress
from kvturbo.eval.report import size, table
from kvturbo.guard.merit import make_plan
from kvturbo.guard.plan import PLAN_FILE, Plan, plan_path, write_plan

if TYPE_CHECKING:
    from kvturbo.eval.model import LoadedModel
    from kvturbo.eval.planning import Passage

HARD_LEVEL = 8
"""Of the retrieval prompts: where the embedded model with its 16-bit cache is right in about 95 of 100 cases."""
CHUNK = 64


def configure(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser, positional=True)
    parser.add_argument("--bits", type=float, required=True, help="most bits per key or value element, windows counted")
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens at which bits count (default: the model's context, at most 8192)",
    )
    parser.add_argument("--text", metavar="PATH", help="a text to measure on (default: the model's held-out text)")
    parser.add_argument("--prompts", type=int, default=2, metavar="N", help="texts, and retrieval prompts (default: 2)")
    parser.add_argument("--prefix", type=int, default=2048, metavar="N", help="packed tokens of a text (default: 2048)")
    parser.add_argument("--scored", type=int, default=256, metavar="N", help="scored tokens of a text (default: 256)")
    parser.add_argument(
        "--retrieval", type=int, default=4096, metavar="N", help="tokens of a retrieval prompt (default: 4096)"
    )
    parser.add_argument("--out", type=Path, metavar="PATH", help=f"default: {PLAN_FILE} in the current folder")


def run(arguments: argparse.Namespace) -> int:
    _check_numbers(arguments)
    out = plan_path(arguments.out or PLAN_FILE)
    common.check_writable(out, "--out")
    if arguments.text is not None:
        common.read_text(Path(arguments.text))
    loaded = common.load(arguments, None if arguments.text is None else Path(arguments.text))
    tokens = arguments.context or min(check.CONTEXT, loaded.context or check.CONTEXT)
    moments = check.text_moments(loaded, arguments.prefix)
    base = make_plan(moments, source=f"{loaded.name}, {arguments.bits:g} bits at {tokens} tokens, measured")
    budget = _budget(base, arguments.bits, tokens)
    with bad_input():
        passages = _passages(loaded, arguments)
    plan, result = _search(passages, base, budget, tokens)
    result |= {"model": loaded.name, "context": tokens, "budget_bits": arguments.bits}
    with bad_input():
        write_plan(out, plan)
    result["plan"] = str(out)
    if arguments.json:
        print_json(result)
    else:
        print(_text(result))
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.bits <= 16:
        raise UsageError(f"--bits must be above 0 and at most 16, got {arguments.bits}")
    for name in ("context", "prompts", "prefix", "scored", "retrieval"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")


def _budget(base: Plan, bits: float, tokens: int) -> int:
    """Bytes that a cache of `tokens` tokens may take."""
    from kvturbo.eval.planning import CHOICES
    from kvturbo.hf import sizes

    whole = sizes.sixteen_bit_bytes(base, tokens)
    least = sum(
        min(sizes.layer_bytes(choice.of(layer), tokens) for choice in CHOICES) for layer in base.layers.values()
    )
    if least > bits / 16 * whole:
        raise UsageError(f"--bits must be at least {16 * least / whole:.2f} for {tokens} tokens, got {bits:g}")
    return int(bits / 16 * whole)


def _passages(loaded: LoadedModel, arguments: argparse.Namespace) -> list[Passage]:
    """Texts, and as many retrieval prompts if the model knows their format."""
    from kvturbo.eval.planning import retrieval_passages, text_passages
    from kvturbo.eval.retrieval import hard_setting

    found = list(text_passages(loaded, arguments.prompts, arguments.prefix, arguments.scored, CHUNK))
    if loaded.folder is not None and (loaded.folder / "retrieval.json").is_file():
        if loaded.context is not None and arguments.retrieval > loaded.context:
            raise ValueError(
                f"--retrieval must be at most {loaded.context}, the model's context, got {arguments.retrieval}"
            )
        setting = hard_setting(arguments.retrieval, HARD_LEVEL)
        found += retrieval_passages(loaded, setting, arguments.prompts, CHUNK)
    return found


def _search(passages: list[Passage], base: Plan, budget: int, tokens: int) -> tuple[Plan, dict[str, Any]]:
    from kvturbo.eval import planning
    from kvturbo.guard.plan import SIXTEEN_BIT
    from kvturbo.hf import sizes

    choices = {i: planning.choices_of(layer) for i, layer in base.layers.items()}
    count = sum(choice.format != SIXTEEN_BIT for own in choices.values() for choice in own)
    with progress(count, "measuring", "choice") as bar:
        losses = planning.measure_losses(passages, base, choices, lambda: bar.update())
    found = planning.plans_within(base, losses, budget, tokens)
    compared: list[dict[str, Any]] = []
    with progress(len(found), "comparing", "plan") as bar:
        for name, plan in found.items():
            loss = planning.mean_loss(passages, plan)
            compared.append({"name": name, "kl_mean": loss, "bits": sizes.bits_per_element(plan, tokens)})
            bar.update()
    best = min(compared, key=lambda entry: entry["kl_mean"])
    plan = found[best["name"]]
    return plan, {
        "chosen": best["name"],
        "compared": sorted(compared, key=lambda entry: entry["kl_mean"]),
        "losses": {i: {str(choice): loss for choice, loss in own.items()} for i, own in losses.items()},
        "layers": [_layer(i, plan, losses[i], tokens) for i in plan.layers],
        "cache_bytes": sizes.cache_bytes(plan, tokens),
        "sixteen_bit_bytes": sizes.sixteen_bit_bytes(plan, tokens),
        "bits_per_element": sizes.bits_per_element(plan, tokens),
    }


def _layer(i: int, plan: Plan, losses: Any, tokens: int) -> dict[str, Any]:
    from kvturbo.hf import sizes

    layer = plan.layers[i]
    loss = next(x for choice, x in losses.items() if choice.of(layer) == layer)
    sink, recent = sizes.windows_of_layer(layer)
    return {
        "layer": i, "format": layer.format, "sink": sink, "recent": recent, "kl_alone": loss,
        "bytes_per_token": sizes.layer_bytes(layer, tokens) / tokens,
    }  # fmt: skip


def _text(result: dict[str, Any]) -> str:
    rows = [
        (
            str(x["layer"]),
            x["format"],
            f"{x['sink']} + {x['recent']}",
            f"{x['kl_alone']:.5f}",
            f"{x['bytes_per_token']:.1f}",
        )
        for x in result["layers"]
    ]
    others = [(x["name"], f"{x['bits']:.2f}", f"{x['kl_mean']:.5f}") for x in result["compared"]]
    ratio = result["sixteen_bit_bytes"] / result["cache_bytes"]
    return "\n\n".join([
        f"{result['model']}, at most {result['budget_bits']:g} bits per element at {result['context']:,} tokens",
        table(("layer", "format", "windows", "KL alone", "bytes/token"), rows),
        table(("within the budget", "bits/element", "KL"), others),
        f"A cache of {result['context']:,} tokens takes {size(result['cache_bytes'])}, {result['bits_per_element']:.2f} bits per "
        f"element; 16 bits take {size(result['sixteen_bit_bytes'])} ({ratio:.2f}x). KL: mean divergence to the 16-bit cache in "
        f"nats per token.",
        f"plan in {result['plan']}",
    ])  # fmt: skip
