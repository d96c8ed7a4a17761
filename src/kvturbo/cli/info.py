"""Formats: bits, bytes, compression and distortion.

Without FORMAT a table of all of them; with FORMAT its details and where its planes lie in a page. Distortion is measured
on the spot, on seeded standard normal vectors.
"""

from __future__ import annotations

import argparse
from typing import Any

from kvturbo.cli.errors import bad_input
from kvturbo.cli.output import print_json, progress
from kvturbo.config import (
    ALIASES,
    PAGE_SIZE,
    SIDES,
    KVFormat,
    SideFormat,
    check_head_dim,
    check_page_size,
    format_names,
)
from kvturbo.eval import distortion
from kvturbo.eval.report import table
from kvturbo.layout import PageLayout

HEADER = ("format", "bits/element", "bytes/token/head", "compression", "D key", "D value", "key slope")
LEGEND = """\
bits/element      everything stored, scales and outliers counted, per key or value element
bytes/token/head  of one token's key and value in one KV head
compression       size of a 16-bit cache over this format's
D                 sum |x - x^|^2 / sum |x|^2 on {vectors:,} standard normal vectors
key slope         mean of <k, k^> / |k|^2; 1 keeps the logit of a query that points along its key"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", nargs="?", metavar="FORMAT", help="a format's name, such as k4v4 or k3v2-o16")
    parser.add_argument("--head-dim", type=int, default=128, help="channels of a key or value vector (default: 128)")
    parser.add_argument(
        "--page-size", type=int, default=PAGE_SIZE, help=f"tokens per page, for FORMAT's planes (default: {PAGE_SIZE})"
    )


def run(arguments: argparse.Namespace) -> int:
    with bad_input():
        check_head_dim(arguments.head_dim)
        check_page_size(arguments.page_size)
        if arguments.format is None:
            result: dict[str, Any] = {"head_dim": arguments.head_dim, "vectors": distortion.VECTORS}
            result["formats"] = _all_formats(arguments.head_dim)
        else:
            fmt = KVFormat.from_name(arguments.format, arguments.head_dim)
            layout = PageLayout.of(fmt, arguments.page_size)
            result = _facts(fmt) | _details(fmt, layout)
    if arguments.json:
        print_json(result)
    elif arguments.format is None:
        print(_table_text(result))
    else:
        print(_details_text(result))
    return 0


def _all_formats(head_dim: int) -> list[dict[str, Any]]:
    names = [name for name in format_names(head_dim) if name not in ALIASES]
    facts = []
    with progress(len(names), "measuring", "format") as bar:
        for name in names:
            facts.append(_facts(KVFormat.from_name(name, head_dim)))
            bar.update()
    return facts


def _facts(fmt: KVFormat) -> dict[str, Any]:
    measured = distortion.measure(fmt)
    return {
        "name": fmt.name,
        "aliases": [alias for alias, name in ALIASES.items() if name == fmt.name],
        "bits_per_element": fmt.bits_per_element,
        "bytes_per_token": fmt.bytes_per_token,
        "compression": fmt.compression,
        "key_distortion": measured.key,
        "value_distortion": measured.value,
        "key_slope": measured.key_slope,
    }


def _details(fmt: KVFormat, layout: PageLayout) -> dict[str, Any]:
    planes = sorted(layout.planes.values(), key=lambda plane: plane.offset)
    return {
        "head_dim": fmt.head_dim,
        "vectors": distortion.VECTORS,
        "sides": {side: _side(fmt.side(side)) for side in SIDES},
        "page": {
            "page_size": layout.page_size,
            "bytes": layout.page_bytes,
            "planes": [{"name": plane.name, "offset": plane.offset, "bytes": plane.nbytes} for plane in planes],
        },
    }


def _side(form: SideFormat) -> dict[str, Any]:
    parts = [
        {"channels": part.channels, "bits": part.bits, "scale": part.rule, "search": part.search} for part in form.parts
    ]
    return {
        "bytes_per_vector": form.nbytes,
        "rotated": form.rotate,
        "parts": parts,
        "outliers": form.outliers,
        "qjl": form.qjl,
    }


def cells(facts: dict[str, Any]) -> tuple[str, ...]:
    """A format as text, for `HEADER`."""
    return (
        facts["name"],
        f"{facts['bits_per_element']:.3f}",
        str(facts["bytes_per_token"]),
        f"{facts['compression']:.2f}x",
        f"{facts['key_distortion']:#.3g}",
        f"{facts['value_distortion']:#.3g}",
        f"{facts['key_slope']:.4f}",
    )


def _table_text(result: dict[str, Any]) -> str:
    aliases = ", ".join(f"{alias} is {name}" for alias, name in ALIASES.items())
    heading = f"Formats for head_dim {result['head_dim']} ({aliases})"
    rows = [cells(facts) for facts in result["formats"]]
    return "\n\n".join([heading, table(HEADER, rows), LEGEND.format(vectors=result["vectors"])])


def _details_text(result: dict[str, Any]) -> str:
    names = " = ".join([result["name"], *result["aliases"]])
    blocks = [f"{names}, head_dim {result['head_dim']}", table(HEADER, [cells(result)])]
    blocks += [f"{'key' if side == 'k' else 'value'}: {_side_text(form)}" for side, form in result["sides"].items()]
    page = result["page"]
    planes = [(plane["name"], str(plane["offset"]), str(plane["bytes"])) for plane in page["planes"]]
    blocks.append(
        f"A page of {page['page_size']} tokens of one KV head: {page['bytes']} bytes\n"
        + table(("plane", "offset", "bytes"), planes)
    )
    return "\n\n".join([*blocks, LEGEND.format(vectors=result["vectors"])])


def _side_text(form: dict[str, Any]) -> str:
    parts = " + ".join(
        f"{part['channels']} channels of {part['bits']} bits ({part['scale'].replace('_', ' ')} scale"
        + (", searched)" if part["search"] else ")")
        for part in form["parts"]
    )
    extras = [f"{form['outliers']} outlier channels in int8 as well"] if form["outliers"] else []
    extras += ["one sign bit per channel and the residual's norm (QJL)"] if form["qjl"] else []
    rotation = "rotated" if form["rotated"] else "not rotated"
    return f"{form['bytes_per_vector']} bytes per vector, {rotation}: " + ", ".join([parts, *extras])
