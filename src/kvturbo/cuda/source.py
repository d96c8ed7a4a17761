"""What goes before a kernel's text: macros of the page, tables of the codebooks and the rotation, and common.cuh."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kvturbo.codebook import CODEBOOKS
from kvturbo.config import KVFormat
from kvturbo.layout import PageLayout
from kvturbo.quantizer import SEARCH_STEPS
from kvturbo.rotation import factor, paley, splitmix64

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Element types as the kernels number them."""
_COMMON = Path(__file__).parent / "common.cuh"


def page_macros(fmt: KVFormat, page_size: int) -> dict[str, int | str]:
    """The macros common.cuh and the kernels need of a format's pages; offsets come from `PageLayout`."""
    planes = PageLayout.of(fmt, page_size).planes
    k_bits, v_bits = fmt.k.parts[0].bits, fmt.v.parts[0].bits

    def offset(name: str) -> int:
        return planes[name].offset if name in planes else 0

    return {
        "D": fmt.head_dim,
        "PAGE": page_size,
        "PAGE_BYTES": fmt.page_bytes(page_size),
        "K_BITS": k_bits,
        "V_BITS": v_bits,
        "ROTATE": int(fmt.k.rotate),
        "OUTLIERS": fmt.outliers,
        "K_CODES": offset(f"k.codes0.{2 if k_bits == 3 else k_bits}"),
        "V_CODES": offset(f"v.codes0.{2 if v_bits == 3 else v_bits}"),
        "K_SIGNS": offset("k.codes0.1"),
        "V_SIGNS": offset("v.codes0.1"),
        "K_SCALE": offset("k.scale0"),
        "V_SCALE": offset("v.scale0"),
        "K_OUTLIERS": offset("k.outliers"),
        "K_OUTLIER_SCALE": offset("k.outlier_scale"),
        "PALEY_S": factor(fmt.head_dim)[1],
    }


def source(head_dim: int, *paths: Path) -> str:
    """A kernel's text, from one file or more, behind the tables and common.cuh."""
    return "".join([_paley_tables(head_dim), _codebooks(), *(path.read_text() for path in (_COMMON, *paths))])


def _paley_tables(head_dim: int) -> str:
    """The Paley matrix's signs, a bit set where an entry is -1."""
    order = factor(head_dim)[0]
    matrix = paley(order) if order > 1 else [[1]]
    rows = [sum(1 << j for j, x in enumerate(row) if x < 0) for row in matrix]
    columns = [sum(1 << i for i, x in enumerate(column) if x < 0) for column in zip(*matrix, strict=True)]
    return "".join(
        f"__constant__ unsigned PALEY_{name}[] = {{{', '.join(map(str, words))}}};\n"
        for name, words in (("ROWS", rows), ("COLUMNS", columns))
    )


def _codebooks() -> str:
    """`MAGNITUDES[bits][i]` in units of 1 / `CODEBOOK_T[bits]`, and the search's `STEPS`."""
    books = [CODEBOOKS.get(bits) for bits in range(5)]
    rows = ", ".join("{" + ", ".join(f"{m}f" for m in (book.magnitudes if book else ())) + "}" for book in books)
    units = ", ".join(str(book.T if book else 1.0) for book in books)
    return (
        f"__device__ constexpr float MAGNITUDES[5][8] = {{{rows}}};\n"
        f"__device__ constexpr double CODEBOOK_T[5] = {{{units}}};\n"
        f"__device__ constexpr float STEPS[5] = {{{', '.join(f'(float){step!r}' for step in SEARCH_STEPS)}}};\n"
    )


@lru_cache(maxsize=64)
def sign_words(head_dim: int, seed: int) -> ctypes.Array[ctypes.c_uint32]:
    """The rotation's signs: bit c % 32 of word c // 32 is set where channel c changes its sign."""
    words = (ctypes.c_uint32 * 8)()
    for channel, word in enumerate(splitmix64(seed, head_dim).tolist()):
        words[channel // 32] |= (word >> 63) << (channel % 32)
    return words


def pointer(x: Tensor | None) -> int:
    """The address of a tensor's first element, or 0."""
    return 0 if x is None else x.data_ptr()
