"""Pages and who uses them: a free list, block tables, reference counts. No tensors."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfPagesError(RuntimeError):
    """There are not enough free pages. `missing` says how many more are needed."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        self.missing = needed - free
        super().__init__(f"out of pages: {needed} needed, {free} of {total} free, {self.missing} missing")


class PagePool:
    """Hands pages out to sequences and takes them back when no sequence uses them.

    Args:
        num_pages: pages in the pool.
        page_size: tokens per page.

    Raises:
        ValueError: num_pages is below 1.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages, self.page_size = num_pages, page_size
        self.tables: dict[int, list[int]] = {}
        self.changes = 0
        """Grows whenever a table or a length that was there changes."""
        self._lengths: dict[int, int] = {}
        self._users = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._next_id = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def table(self, sequence: int) -> list[int]:
        """Page ids of a sequence in order."""
        if sequence not in self.tables:
            live = ", ".join(map(str, self.tables)) or "none"
            raise ValueError(f"no sequence {sequence}; live sequences: {live}")
        return self.tables[sequence]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        self.table(sequence)
        return self._lengths[sequence]

    def new_sequence(self) -> int:
        """Starts an empty sequence."""
        sequence = self._next_id
        self._next_id += 1
        self.tables[sequence], self._lengths[sequence] = [], 0
        return sequence

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Reserves slots at the end of sequences.

        Returns:
            The slots, and (old page, new page) pairs whose bytes must be copied because the old page is shared.

        Raises:
            OutOfPagesError: before anything has changed.
            ValueError: an id is unknown or twice there, a count is negative or no whole number, or their numbers differ.
        """
        counts = _whole("counts", counts)
        if len(sequences) != len(counts) or len(set(sequences)) != len(sequences):
            raise ValueError(
                f"need one count per sequence and no sequence twice, got {list(sequences)} and {list(counts)}"
            )
        if min(counts, default=0) < 0:
            raise ValueError(f"counts must not be negative, got {list(counts)}")
        for sequence in sequences:
            self.table(sequence)
        needed = self._pages_needed([pair for pair in zip(sequences, counts, strict=True) if pair[1]])
        if needed > self.num_free:
            raise OutOfPagesError(needed, self.num_free, self.num_pages)
        slots: list[int] = []
        copies: list[tuple[int, int]] = []
        self.changes += 1
        for sequence, count in zip(sequences, counts, strict=True):
            slots += self._extend(sequence, count, copies)
        return slots, copies

    def crop(self, sequence: int, length: int) -> None:
        """Drops the tokens from `length` on.

        Raises:
            ValueError: the id is unknown, or length is no whole number, negative or above the sequence's.
        """
        (length,) = _whole("length", [length])
        if not 0 <= length <= self.length(sequence):
            raise ValueError(f"length must be from 0 to {self.length(sequence)}, got {length}")
        self.changes += 1
        table = self.tables[sequence]
        keep = -(-length // self.page_size)
        self._release(table[keep:])
        del table[keep:]
        self._lengths[sequence] = length

    def fork(self, sequence: int) -> int:
        """A new sequence that shares the pages of another."""
        table = self.table(sequence)
        new = self.new_sequence()
        self.tables[new], self._lengths[new] = list(table), self._lengths[sequence]
        for page in table:
            self._users[page] += 1
        return new

    def free(self, sequence: int) -> None:
        """Forgets a sequence."""
        self.changes += 1
        self._release(self.table(sequence))
        del self.tables[sequence], self._lengths[sequence]

    def grow(self, num_pages: int) -> None:
        """Adds free pages up to num_pages."""
        self.check_growth(num_pages)
        self._free[:0] = range(num_pages - 1, self.num_pages - 1, -1)
        self._users += [0] * (num_pages - self.num_pages)
        self.num_pages = num_pages

    def check_growth(self, num_pages: int) -> None:
        """Raises ValueError if num_pages is below the present number."""
        if num_pages < self.num_pages:
            raise ValueError(f"num_pages must be at least the present {self.num_pages}, got {num_pages}")

    def adopt(self, sequences: Sequence[tuple[Sequence[int], int]]) -> list[int]:
        """New sequences over given pages (of a loaded file), shared where a page is given twice.

        Args:
            sequences: a table and a length each.

        Returns:
            Their ids.

        Raises:
            ValueError: a page id is out of range, or the pages don't fit the length; nothing has changed.
        """
        for table, length in sequences:
            if len(table) != -(-length // self.page_size) or not all(0 <= page < self.num_pages for page in table):
                raise ValueError(
                    f"{len(table)} pages {list(table)[:8]} of {self.num_pages} do not hold {length} tokens"
                )
        ids = []
        for table, length in sequences:
            ids.append(self.new_sequence())
            self.tables[ids[-1]], self._lengths[ids[-1]] = list(table), length
            for page in table:
                self._users[page] += 1
        self._free = [page for page in self._free if not self._users[page]]
        return ids

    def _shares_last_page(self, sequence: int) -> bool:
        """Whether the next token would land in a page that another sequence uses too."""
        partly = self._lengths[sequence] % self.page_size != 0
        return partly and self._users[self.tables[sequence][-1]] > 1

    def _pages_needed(self, appends: Sequence[tuple[int, int]]) -> int:
        """Pages that an append of (sequence, positive count) pairs takes. The last user of a shared page needs no copy."""
        grown = sum(-(-(self.length(s) + count) // self.page_size) - len(self.table(s)) for s, count in appends)
        shared = Counter(self.tables[s][-1] for s, _ in appends if self._shares_last_page(s))
        return grown + sum(min(writers, self._users[page] - 1) for page, writers in shared.items())

    def _extend(self, sequence: int, count: int, copies: list[tuple[int, int]]) -> list[int]:
        table, length = self.tables[sequence], self._lengths[sequence]
        if count and self._shares_last_page(sequence):
            shared = table[-1]
            table[-1] = self._take()
            self._users[shared] -= 1
            copies.append((shared, table[-1]))
        while len(table) * self.page_size < length + count:
            table.append(self._take())
        self._lengths[sequence] = length + count
        size = self.page_size
        return [table[position // size] * size + position % size for position in range(length, length + count)]

    def _take(self) -> int:
        page = self._free.pop()
        self._users[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)


def _whole(name: str, numbers: Iterable[int]) -> list[int]:
    """The numbers as Python integers; a fraction would end up in a length before anything fails."""
    given = list(numbers)
    try:
        return [operator.index(number) for number in given]
    except TypeError:
        raise ValueError(f"{name} must be whole, got {given}") from None
