"""Writes the golden files next to this script: `python tests/golden/make.py`. Nothing of the package is used.

pages.json has the SHA-256 of the golden page of every format and head_dim, and some pages in full.
codec.json has codes and scales of fixed vectors.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from golden import codec_spec, page_fields, page_spec

FULL = [(name, d, 16) for name in ("k4v4", "k3v3", "k2v2", "k4v4-o16") for d in (64, 128)]
HEX_LINE = 64


def cases() -> list[tuple[str, int, int]]:
    """Every format with pages of 16 slots, `k4v4` with all page sizes."""
    every = [(name, d, 16) for d in page_spec.HEAD_DIMS for name in page_spec.formats(d)]
    return every + [("k4v4", d, page_size) for d in page_spec.HEAD_DIMS for page_size in (32, 64)]


def key(case: tuple[str, int, int]) -> str:
    return "{} head_dim {} page_size {}".format(*case)


def pages() -> dict[str, dict[str, object]]:
    data = {case: page_fields.page(*case) for case in cases()}
    hashes = {key(case): hashlib.sha256(page).hexdigest() for case, page in data.items()}
    lines = {}
    for case in FULL:
        text = data[case].hex()
        lines[key(case)] = [text[i : i + HEX_LINE] for i in range(0, len(text), HEX_LINE)]
    return {"sha256": hashes, "hex": lines}


def main() -> None:
    folder = Path(__file__).parent
    for name, content in (("pages.json", pages()), ("codec.json", codec_spec.golden())):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
