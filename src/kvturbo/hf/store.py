"""What the packed layers of a cache share: the padded batch's rows, the groups, and the step that is under way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvturbo.hf.group import Group
from kvturbo.hf.rows import NewColumns, Rows
from kvturbo.pool import OutOfPagesError


class PackedStore:
    """Rows and groups of a cache.

    Args:
        groups: every packed layer is in one of them.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = list(groups)
        self.rows = Rows()
        self.batch = 0
        self.packed_tokens_read = 0
        self.first = False
        """Whether the step under way is the first one."""
        self.pattern: Tensor | None = None
        """[batch, 1, count, count] bool mask of a first step that is not causal; None: causal."""

    def begin(self, batch: int, count: int, device: torch.device, mask: Tensor | None) -> None:
        """Starts a step in all groups: reserves slots for `count` new columns.

        Args:
            batch, count: rows, and new columns.
            device: where the pages are made in the first step.
            mask: [batch, columns] or [batch, 1, count, columns] bool over old and new columns; None: causal, no padding.

        Raises:
            OutOfPagesError: max_tokens is too small; nothing has changed.
            ValueError: another batch size than before, or a mask that can't be followed.
        """
        if self.batch and batch != self.batch:
            raise ValueError(f"the cache holds {self.batch} rows, got a batch of {batch}")
        padding, pattern = self._understand(mask, count)
        new = self.rows.plan(batch, count, padding)
        if not self.batch:
            self._start(batch, device)
        if any(new.drop):
            self.rows.drop(new)
            for group in self.groups:
                group.drop(new.drop)
        self._reserve(new)
        self.first, self.pattern = self.rows.columns == 0, pattern
        self.rows.commit(new)

    def crop(self, count: int) -> None:
        """Takes the last `count` columns away."""
        if self.batch and count:
            lost = self.rows.crop(count, self.batch)
            for group in self.groups:
                group.drop(lost)

    def select(self, index: list[int]) -> None:
        """Row i becomes what row index[i] was."""
        if not self.batch:
            return
        self.rows.select(index)
        for group in self.groups:
            group.select(index)
        self.batch = len(index)

    def reset(self) -> None:
        """Empties everything and gives the memory back."""
        self.rows.reset()
        for group in self.groups:
            group.reset()
        self.batch, self.first, self.pattern = 0, False, None

    def lengths(self) -> list[int]:
        """Stored tokens of every row."""
        if self.rows.stored is None:
            return [self.rows.columns] * self.batch
        return self.rows.stored.sum(1).tolist()

    def nbytes(self) -> int:
        """Bytes allocated by all groups, and by the masks that are kept."""
        masks = [mask for mask in (self.rows.stored, self.pattern) if mask is not None]
        return sum(group.nbytes() for group in self.groups) + sum(mask.untyped_storage().nbytes() for mask in masks)

    def _start(self, batch: int, device: torch.device) -> None:
        for group in self.groups:
            group.start(batch, device)
        self.batch = batch

    def _reserve(self, new: NewColumns) -> None:
        done: list[Group] = []
        try:
            for group in self.groups:
                group.reserve(new)
                done.append(group)
        except OutOfPagesError:
            for group in done:
                group.undo()
            if not self.rows.columns:
                self.reset()
            raise

    def _understand(self, mask: Tensor | None, count: int) -> tuple[Tensor | None, Tensor | None]:
        """A mask's padding [batch, columns], and its pattern if that is not causal."""
        if mask is None or mask.dim() == 2:
            return mask, None
        if mask.dim() != 4 or mask.dtype != torch.bool or mask.shape[1] != 1:
            raise ValueError(
                f"attention_mask must be [batch, columns] or bool [batch, 1, {count}, columns], "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        padding = mask.any(2)[:, 0]
        columns = mask.shape[3]
        causal = torch.ones(count, columns, dtype=torch.bool, device=mask.device).tril(columns - count)
        visible = padding[:, None, :, None][:, :, columns - count :]  # what a padding query sees is nobody's business
        if bool(((mask == (causal & padding[:, None, None, :])) | ~visible).all()):
            return padding, None
        if self.rows.columns:
            raise ValueError(
                "attention_mask is not causal, and tokens are stored already; "
                "only the first forward pass can follow another mask"
            )
        return padding, mask
