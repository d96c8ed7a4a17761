"""How packed prefixes are cut into pieces that are attended at once: short ones of several sequences, or a part of a long one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvturbo.ops.prefix import PIECE_TOKENS

ROWS_AT_ONCE = 2048
"""Queries that attend to a piece at once."""


@dataclass(frozen=True)
class Part:
    """Positions of a sequence's prefix; `sequence` is a row of the block table."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True)
class PrefixPiece:
    """Parts of packed prefixes, of one sequence each, and the rows that see all of their sequence's part.

    Attributes:
        first, last: rows of the prompt part of the batch.
        parts: whose keys lie one after another.
        bounds: [parts + 1] int32 each on the device: where the sequences' rows, counted from `first`, and their keys begin and end.
        longest: the most rows and keys of a sequence.
        ends: whether it is the last piece for these rows.
    """

    first: int
    last: int
    parts: tuple[Part, ...]
    bounds: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    ends: bool


@dataclass(frozen=True)
class _Span:
    first: int
    counts: tuple[int, ...]
    parts: tuple[Part, ...]
    ends: bool = True

    def keys(self) -> list[int]:
        return [part.stop - part.start for part in self.parts]


def pieces_of(starts: Sequence[int], prefixes: Sequence[int], device: torch.device) -> list[PrefixPiece]:
    """The pieces of a step, in the order in which they are attended.

    Args:
        starts: where the sequences' rows begin, and where the last one's end; from 0.
        prefixes: tokens of each sequence that are packed.
        device: of the bounds, which are copied there at once and without a synchronisation.
    """
    spans = list(_spans(starts, prefixes))
    if not spans:
        return []
    rows = [[0, *accumulate(span.counts)] for span in spans]
    keys = [[0, *accumulate(span.keys())] for span in spans]
    flat = torch.tensor(
        [x for pair in zip(rows, keys, strict=True) for bounds in pair for x in bounds], dtype=torch.int32
    )
    if device.type == "cuda":
        flat = flat.pin_memory().to(device, non_blocking=True)
    both = flat.split([len(bounds) for pair in zip(rows, keys, strict=True) for bounds in pair])
    return [
        PrefixPiece(
            span.first, span.first + sum(span.counts), span.parts, (both[2 * i], both[2 * i + 1]),
            (max(span.counts), max(span.keys())), span.ends,
        )
        for i, span in enumerate(spans)
    ]  # fmt: skip


def _spans(starts: Sequence[int], prefixes: Sequence[int]) -> Iterator[_Span]:
    together: list[tuple[int, int, int, int]] = []  # sequence, first row, rows, prefix: rows follow one another
    for sequence, prefix in enumerate(prefixes):
        row, count = starts[sequence], starts[sequence + 1] - starts[sequence]
        short = 0 < count <= ROWS_AT_ONCE and 0 < prefix <= PIECE_TOKENS
        rows, keys = sum(x[2] for x in together), sum(x[3] for x in together)
        if together and not (short and rows + count <= ROWS_AT_ONCE and keys + prefix <= PIECE_TOKENS):
            yield _joined(together)
            together = []
        if short:
            together.append((sequence, row, count, prefix))
        else:
            yield from _cut(sequence, row, count, prefix)
    if together:
        yield _joined(together)


def _joined(sequences: Sequence[tuple[int, int, int, int]]) -> _Span:
    parts = tuple(Part(sequence, 0, prefix) for sequence, _, _, prefix in sequences)
    return _Span(sequences[0][1], tuple(count for _, _, count, _ in sequences), parts)


def _cut(sequence: int, row: int, count: int, prefix: int) -> Iterator[_Span]:
    for first in range(row, row + count, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, row + count - first)
        for start in range(0, prefix, PIECE_TOKENS):
            stop = min(start + PIECE_TOKENS, prefix)
            yield _Span(first, (rows,), (Part(sequence, start, stop),), stop == prefix)
