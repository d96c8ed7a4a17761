"""Find out whether a model's keys and values suit a format, layer by layer, and what its cache will take.

A few large key channels or a mean in the values make quantisation many times worse than a format's bits promise. The check
looks at the weights, or with --text at the keys, queries and values of a calibration text, and names for every layer the
cheapest format that is good enough. Exit code 1 if no layer can be packed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvturbo.cli import common
from kvturbo.cli.errors import CommandFailed, UsageError, bad_input
from kvturbo.cli.output import print_json
from kvturbo.eval.report import size, table
from kvturbo.guard.merit import LIMIT, candidates, key_excess, make_plan, value_excess
from kvturbo.guard.moments import LayerMoments, moments_of_folder
from kvturbo.guard.plan import SIXTEEN_BIT, Plan, plan_path, write_plan

if TYPE_CHECKING:
    from kvturbo.eval.model import LoadedModel

HELD_OUT = "held-out"
CONTEXT = 8192
LEAST_TOKENS = 32
"""Of a calibration text: with a few tokens every layer seems to have a mean in its values."""
HEADER = ("layer", "key excess", "value excess", "format", "bytes/token")
LEGEND = """\
key excess    variance of the scores' error over what keys of even channels would have; limit {limit:g}
value excess  energy of the values over what is left without their mean; limit {limit:g}"""


def configure(parser: argparse.ArgumentParser) -> None:
    common.add_model_options(parser, positional=True)
    parser.add_argument("--format", default="k4v4", help="what layers get that need no more (default: k4v4)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"excess that is put up with (default: {LIMIT:g})")
    add_calibration_options(parser)
    parser.add_argument(
        "--out", type=Path, metavar="PATH", help="write the plan there, for TurboCache(plan=PATH) and vLLM"
    )


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text",
        nargs="?",
        const=HELD_OUT,
        metavar="PATH",
        help="calibrate on a text file (without PATH: the model's held-out text) instead of looking at the weights",
    )
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="of the text (default: 2048)")
    parser.add_argument(
        "--context",
        type=int,
        default=CONTEXT,
        metavar="N",
        help=f"tokens that sizes are given for (default: {CONTEXT})",
    )


def run(arguments: argparse.Namespace) -> int:
    check_numbers(arguments)
    out = None if arguments.out is None else plan_path(arguments.out)
    if out is not None:
        common.check_writable(out, "--out")
    name, moments, source = _moments(arguments)
    with bad_input():
        plan = make_plan(moments, arguments.format, arguments.limit, source)
    result = _result(name, plan, moments, arguments) | {"plan": None if out is None else str(out)}
    if out is not None:
        with bad_input():
            write_plan(out, plan)
    if arguments.json:
        print_json(result)
    else:
        print(_text(result))
        if out is not None:
            print(f"\nplan in {out}")
    if result["refused"]:
        raise CommandFailed(result["refused"])
    return 0


def check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("tokens", "context"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}")


def text_moments(loaded: LoadedModel, tokens: int) -> dict[int, LayerMoments]:
    """Moments on the first tokens of the model's text.

    Raises:
        UsageError: they are too few to tell a channel that is always large from one that happens to be, or more than the
            model's context.
    """
    import torch

    from kvturbo.hf.calibration import moments_of_text

    if loaded.context is not None and tokens > loaded.context:
        raise UsageError(f"calibration takes at most {loaded.context} tokens, the model's context, got {tokens}")
    with bad_input():
        ids = torch.from_numpy(loaded.text[:tokens].copy())[None]
        if ids.shape[1] < LEAST_TOKENS:
            raise UsageError(f"calibration needs at least {LEAST_TOKENS} tokens of text, got {ids.shape[1]}")
        return moments_of_text(loaded.model, ids)


def calibration_text(arguments: argparse.Namespace) -> Path | None:
    """The file that --text names; None for the model's own text."""
    if arguments.text in (None, HELD_OUT):
        return None
    common.read_text(Path(arguments.text))
    return Path(arguments.text)


def _moments(arguments: argparse.Namespace) -> tuple[str, dict[int, LayerMoments], str]:
    """The model's name, moments by layer, and what they are from. A checkpoint folder's weights are read without loading it."""
    from kvturbo.eval.model import EMBEDDED, embedded_folder

    folder = embedded_folder() if arguments.model is None else Path(arguments.model)
    name = EMBEDDED if arguments.model is None else arguments.model
    if arguments.text is None and folder is not None and folder.is_dir():
        with bad_input():
            _check_architecture(folder)
            return name, moments_of_folder(folder), "weights"
    loaded = common.load(arguments, calibration_text(arguments))
    if arguments.text is None:
        from kvturbo.hf.calibration import moments_of_model

        with bad_input():
            return name, moments_of_model(loaded.model), "weights"
    moments = text_moments(loaded, arguments.tokens)
    return name, moments, f"{min(arguments.tokens, len(loaded.text))} tokens of {arguments.text} text"


def _check_architecture(folder: Path) -> None:
    """Raises ValueError with the reason if the cache can't hold the model's layers."""
    from transformers import AutoConfig

    from kvturbo.config import check_head_dim
    from kvturbo.hf.geometry import full_attention_shapes, stock_layers

    config = AutoConfig.from_pretrained(folder)
    for shape in full_attention_shapes(config, stock_layers(config)).values():
        check_head_dim(shape.head_dim)


def _result(name: str, plan: Plan, moments: dict[int, LayerMoments], arguments: argparse.Namespace) -> dict[str, Any]:
    from kvturbo.hf import sizes

    tokens = arguments.context
    layers = [
        {"layer": i, "format": layer.format, "key_excess": layer.key_excess, "value_excess": layer.value_excess}
        | {"bytes_per_token": sizes.layer_bytes(layer, tokens) / tokens}
        for i, layer in plan.layers.items()
    ]
    packed = [entry for entry in layers if entry["format"] != SIXTEEN_BIT]
    reason = f"no layer can be packed as {arguments.format}: {_advice(layers, arguments.limit)}"
    return {
        "model": name,
        "source": plan.source,
        "limit": arguments.limit,
        "layers": layers,
        "context": tokens,
        "cache_bytes": sizes.cache_bytes(plan, tokens),
        "sixteen_bit_bytes": sizes.sixteen_bit_bytes(plan, tokens),
        "bits_per_element": sizes.bits_per_element(plan, tokens),
        "one_format": _one_format(moments, arguments.format, arguments.limit),
        "advice": _advice(layers, arguments.limit),
        "refused": None if packed else reason,
    }


def _one_format(moments: dict[int, LayerMoments], base: str, limit: float) -> dict[str, Any]:
    """The format for an engine with one format for all layers, and the layers that have to be left in 16 bits."""
    from kvturbo.config import KVFormat

    choices = []
    for name in candidates(base, min(own.head_dim for own in moments.values())):
        skipped = [
            i
            for i, own in moments.items()
            if bool((key_excess(own, name, base) > limit).any()) or bool((value_excess(own) > limit).any())
        ]
        kept = (own for i, own in moments.items() if i not in skipped and name != SIXTEEN_BIT)
        saved = sum(
            own.num_kv_heads * (4 * own.head_dim - KVFormat.from_name(name, own.head_dim).bytes_per_token)
            for own in kept
        )
        choices.append((saved, name, skipped))
    saved, name, skipped = max(choices, key=lambda choice: choice[0])
    return {"format": name if saved else SIXTEEN_BIT, "sixteen_bit_layers": skipped if saved else list(moments)}


def _advice(layers: list[dict[str, Any]], limit: float) -> str:
    """What to do about excesses, empty if there is nothing to do."""
    keys = [entry["layer"] for entry in layers if entry["key_excess"] > limit]
    values = [entry["layer"] for entry in layers if entry["value_excess"] > limit]
    parts = [f"keys of layers {keys} have a few channels far above the others"] if keys else []
    parts += [f"values of layers {values} have a mean, which no format holds well"] if values else []
    if not parts:
        return ""
    return "; ".join(parts) + "; kvturbo.hf.fold takes uneven key scales and value means out of the weights"


def _text(result: dict[str, Any]) -> str:
    rows = [
        (
            str(x["layer"]),
            f"{x['key_excess']:.2f}",
            f"{x['value_excess']:.2f}",
            x["format"],
            f"{x['bytes_per_token']:.1f}",
        )
        for x in result["layers"]
    ]
    ratio = result["sixteen_bit_bytes"] / result["cache_bytes"]
    one = result["one_format"]
    skipped = one["sixteen_bit_layers"] if one["format"] != SIXTEEN_BIT else []
    rest = f", layers {skipped} in 16 bits" if skipped else ""
    blocks = [
        f"{result['model']}, from {result['source']}",
        table(HEADER, rows),
        LEGEND.format(limit=result["limit"]),
        f"A cache of {result['context']:,} tokens takes {size(result['cache_bytes'])}, {result['bits_per_element']:.2f} bits per "
        f"element; 16 bits take {size(result['sixteen_bit_bytes'])} ({ratio:.2f}x)\n"
        f"One format for all layers, as in vLLM: {one['format']}{rest}",
    ]
    advice = result["advice"]
    return "\n\n".join([*blocks, advice[0].upper() + advice[1:] + "."] if advice else blocks)
