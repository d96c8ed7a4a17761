"""How packed prefixes are cut into pieces that are attended at once: short ones of several sequences, or a part of a long one.

What a piece costs the host does not depend on its length, so many chats that go on at once must not take a piece each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from kvturbo.config import PAGE_SIZES
from kvturbo.ops.prefix import PIECE_TOKENS

ROWS_AT_ONCE = 2048
"""Queries that attend to a piece at once."""
COPY_BYTES = 64 << 20
"""16-bit copies of a piece's keys and values, if that is `PIECE_TOKENS` or more."""


def tokens_at_once(num_kv_heads: int, head_dim: int) -> int:
    """Keys of a piece at most, a multiple of every page size."""
    most = COPY_BYTES // (4 * num_kv_heads * head_dim)
    return max(PIECE_TOKENS, most // max(PAGE_SIZES) * max(PAGE_SIZES))


@dataclass(frozen=True)
class PrefixPiece:
    """Packed keys and values of one sequence, or the whole prefixes of several, and the rows that see all of their sequence's.

    Attributes:
        first, last: rows of the prompt part of the batch.
        table: [1, any] int32, pages whose tokens are the keys, one sequence's after another's.
        start, stop: positions in the table.
        bounds: [sequences + 1] int32 each on the device: where the sequences' rows, counted from `first`, and their keys, counted
            from `start`, begin and end.
        longest: the most rows and the most keys of a sequence.
        ends: whether it is the last piece for these rows.
    """

    first: int
    last: int
    table: Tensor
    start: int
    stop: int
    bounds: tuple[Tensor, Tensor]
    longest: tuple[int, int]
    ends: bool


@dataclass(frozen=True)
class _Part:
    """Rows of a sequence and how many keys they see; `sequence` is a row of the block table."""

    sequence: int
    rows: int
    keys: int


@dataclass(frozen=True)
class _Span:
    """A piece before it has tensors: the parts' rows follow one another from `first` on; keys of a single one begin at `start`."""

    first: int
    parts: tuple[_Part, ...]
    start: int = 0
    ends: bool = True


def pieces_of(
    starts: Sequence[int], prefixes: Sequence[int], block_table: Tensor, page_size: int, most: int
) -> list[PrefixPiece]:
    """The pieces of a step, in the order in which they are attended. Nothing waits for the device.

    Args:
        starts: where the sequences' rows begin, and where the last one's end; from 0.
        prefixes: tokens of each sequence that are packed.
        block_table: [sequences, any] int32, the pages of each in order.
        page_size: tokens of a page.
        most: keys of a piece, as `tokens_at_once` says.
    """
    spans = list(_spans(starts, prefixes, page_size, most))
    bounds, tables = _bounds(spans, block_table.device), _tables(spans, block_table, page_size)
    return [
        PrefixPiece(
            span.first, span.first + sum(part.rows for part in span.parts), table, span.start,
            span.start + sum(part.keys for part in span.parts), both,
            (max(part.rows for part in span.parts), max(part.keys for part in span.parts)), span.ends,
        )
        for span, both, table in zip(spans, bounds, tables, strict=True)
    ]  # fmt: skip


def _spans(starts: Sequence[int], prefixes: Sequence[int], page_size: int, most: int) -> Iterator[_Span]:
    """Neighbours are joined while they fit. Their keys must follow one another without a gap, so only the last one's may end
    within a page; prefixes that were found cached are whole pages. Longer ones than `PIECE_TOKENS` stay alone: they are worth a
    launch, and only keys of a single sequence are split among multiprocessors.
    """
    joined, first, rows, keys = list[_Part](), 0, 0, 0
    for sequence, prefix in enumerate(prefixes):
        row, count = starts[sequence], starts[sequence + 1] - starts[sequence]
        short = 0 < count <= ROWS_AT_ONCE and 0 < prefix <= PIECE_TOKENS
        if joined and not (short and rows + count <= ROWS_AT_ONCE and keys + prefix <= most):
            yield _Span(first, tuple(joined))
            joined = []
        if not short:
            yield from _cut(_Part(sequence, count, prefix), row, most)
            continue
        if not joined:
            first, rows, keys = row, 0, 0
        joined.append(_Part(sequence, count, prefix))
        rows, keys = rows + count, keys + prefix
        if prefix % page_size:
            yield _Span(first, tuple(joined))
            joined = []
    if joined:
        yield _Span(first, tuple(joined))


def _cut(whole: _Part, row: int, most: int) -> Iterator[_Span]:
    for a in range(0, whole.rows, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, whole.rows - a)
        for start in range(0, whole.keys, most):
            keys = min(most, whole.keys - start)
            yield _Span(row + a, (_Part(whole.sequence, rows, keys),), start, start + keys == whole.keys)


def _bounds(spans: Sequence[_Span], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Of all pieces in one copy."""
    lists = [
        [0, *accumulate(counts)]
        for span in spans
        for counts in ([part.rows for part in span.parts], [part.keys for part in span.parts])
    ]
    flat = _to(torch.tensor([bound for bounds in lists for bound in bounds], dtype=torch.int32), device)
    split = flat.split([len(bounds) for bounds in lists])
    return list(zip(split[::2], split[1::2], strict=True))


def _tables(spans: Sequence[_Span], block_table: Tensor, page_size: int) -> list[Tensor]:
    """Rows of the block table, and the pages of joined prefixes one after another."""
    several = [span for span in spans if len(span.parts) > 1]
    if not several:
        return [block_table[span.parts[0].sequence, None] for span in spans]
    parts = [part for span in several for part in span.parts]
    pages = torch.tensor([-(-part.keys // page_size) for part in parts])
    if pages.max() > block_table.shape[1]:  # on a GPU an index out of range would end the process
        raise ValueError(
            f"prefixes must fit in the block table's {block_table.shape[1]} pages, got {pages.tolist()} pages"
        )
    sequences = torch.tensor([part.sequence for part in parts]).repeat_interleave(pages)
    columns = torch.arange(len(sequences)) - (pages.cumsum(0) - pages).repeat_interleave(pages)
    index = _to(torch.stack((sequences, columns)), block_table.device)
    lengths = [sum(-(-part.keys // page_size) for part in span.parts) for span in several]
    joined = iter(block_table[index[0], index[1]].split(lengths))
    return [next(joined)[None] if len(span.parts) > 1 else block_table[span.parts[0].sequence, None] for span in spans]


def _to(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that nobody waits for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and x.numel() else x.to(device)
