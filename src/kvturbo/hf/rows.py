"""The padded batch: which columns of each row are tokens. Padding is never stored, so rows have lengths of their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NewColumns:
    """The columns that a forward pass adds.

    Attributes:
        batch, count: rows and new columns.
        tokens: [batch, count] bool on the host, True where a column is a token; None: everywhere.
        lengths: tokens of each row among them.
        drop: tokens at each row's end, stored earlier, that the mask now hides.
    """

    batch: int
    count: int
    tokens: Tensor | None
    lengths: list[int]
    drop: list[int]

    def places(self, row: int) -> list[int]:
        """The new columns of a row that are tokens."""
        if self.tokens is None:
            return list(range(self.count))
        return self.tokens[row].nonzero().flatten().tolist()


class Rows:
    """Counts the columns of a padded batch and remembers which of them hold stored tokens."""

    def __init__(self) -> None:
        self.columns = 0
        self.stored: Tensor | None = None
        """[batch, columns] bool on the host, True where a token is stored; None: everywhere."""

    def plan(self, batch: int, count: int, mask: Tensor | None) -> NewColumns:
        """What a mask says about `count` new columns. Nothing changes yet.

        Args:
            batch, count: rows, and new columns.
            mask: [batch, columns + count] bool, False where a column is padding; None: no padding among the new ones.

        Raises:
            ValueError: the mask has another shape, shows padding that was never stored, or hides stored tokens other than
                at a row's end.
        """
        everything = [count] * batch
        if mask is None or (self.stored is None and bool(mask.all())):
            return NewColumns(batch, count, None, everything, [0] * batch)
        if mask.shape != (batch, self.columns + count):
            raise ValueError(
                f"attention_mask must be [{batch}, {self.columns + count}] ({self.columns} columns in the cache, "
                f"{count} new), got {list(mask.shape)}"
            )
        host = mask.cpu()
        drop = self._hidden(host[:, : self.columns])
        new = host[:, self.columns :]
        return NewColumns(batch, count, None if bool(new.all()) else new, new.sum(1).tolist(), drop)

    def commit(self, new: NewColumns) -> None:
        """Takes the planned columns in; `drop` comes before."""
        if new.tokens is not None or self.stored is not None:
            old = self._mask(new.batch)
            added = torch.ones(new.batch, new.count, dtype=torch.bool) if new.tokens is None else new.tokens
            self.stored = torch.cat((old, added), 1)
        self.columns += new.count

    def drop(self, new: NewColumns) -> None:
        """Forgets the stored tokens that the mask hides; their columns stay, as padding."""
        stored = self._mask(new.batch).clone()
        for row, count in enumerate(new.drop):
            places = stored[row].nonzero().flatten()
            stored[row, places[len(places) - count :]] = False
        self.stored = stored

    def crop(self, count: int, batch: int) -> list[int]:
        """Takes the last `count` columns away; returns how many stored tokens of each row were among them."""
        count = min(count, self.columns)
        self.columns -= count
        if self.stored is None:
            return [count] * batch
        lost = self.stored[:, self.columns :].sum(1).tolist()
        self.stored = self.stored[:, : self.columns]
        return lost

    def select(self, index: list[int]) -> None:
        """Row i becomes what row index[i] was."""
        if self.stored is not None:
            self.stored = self.stored[index]

    def reset(self) -> None:
        """Forgets everything."""
        self.columns, self.stored = 0, None

    def stored_columns(self, row: int, columns: int) -> Tensor | None:
        """Those of the first `columns` columns of a row that are stored: int64 on the host; None: all of them."""
        return None if self.stored is None else self.stored[row, :columns].nonzero().flatten()

    def _mask(self, batch: int) -> Tensor:
        return torch.ones(batch, self.columns, dtype=torch.bool) if self.stored is None else self.stored

    def _hidden(self, shown: Tensor) -> list[int]:
        """How many tokens at each row's end a mask [batch, columns] hides."""
        stored = self._mask(shown.shape[0])
        if (shown & ~stored).any():
            raise ValueError(
                "attention_mask shows columns that were padding when they were passed, so they are not stored"
            )
        drop = []
        for row in range(shown.shape[0]):
            seen = shown[row][stored[row]]
            kept = int(seen.sum())
            if not bool(seen[:kept].all()):
                raise ValueError(
                    f"attention_mask hides stored tokens of row {row} that have visible ones after them; padding must be hidden "
                    "from the first forward pass on, with the attention implementation 'kvturbo'"
                )
            drop.append(len(seen) - kept)
        return drop
