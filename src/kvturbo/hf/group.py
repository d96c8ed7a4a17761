"""Layers with the same format, KV heads and windows: one paged cache, one block table and one plan per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvturbo.cache import PagedKVCache
from kvturbo.hf.geometry import PackedSpec
from kvturbo.hf.rows import NewColumns
from kvturbo.hf.windows import Fill, WindowPlan, WindowTensors, plan_moves
from kvturbo.ops.sharing import SharedSchedules
from kvturbo.pool import OutOfPagesError

GROWTH = 1.125
"""A pool that must grow grows at least by this factor, so that copying stays a small part of the work."""


@dataclass
class Step:
    """What one forward pass adds to a group, the same for all its layers.

    Attributes:
        new: the new columns.
        flat: [sum(new.lengths)] int64, the tokens among the flattened [batch * count] columns; None: all of them.
        slots: [batch * count] int64, where the columns go in the pages, -1: nowhere.
        recent_slots: [batch * recent] int64, the same for the recent window; None without windows.
        windows: how the windows change; None without.
        sink, recent: tokens in the windows before, per row.
        before: packed tokens before, per row.
        table: [batch, pages] int32, block table with the new pages.
        lens_before, lens: [batch] int32, packed tokens before and after.
        q_lens: [batch] int32, tokens among the new columns.
        near: see `Group.near_mask`; None until asked for.
        each: see `by_token`; None until asked for.
    """

    new: NewColumns
    flat: Tensor | None
    slots: Tensor
    recent_slots: Tensor | None
    windows: WindowPlan | None
    sink: list[int]
    recent: list[int]
    before: list[int]
    table: Tensor
    lens_before: Tensor
    lens: Tensor
    q_lens: Tensor
    near: Tensor | None = None
    each: tuple[Tensor, Tensor] | None = None

    def by_token(self) -> tuple[Tensor, Tensor]:
        """Block table and packed tokens before, with a row for every new token: each is a sequence of its own there."""
        if self.each is None:
            rows = torch.repeat_interleave(self.q_lens, output_size=sum(self.new.lengths))
            self.each = self.table[rows], self.lens_before[rows]
        return self.each

    @property
    def tensors(self) -> list[Tensor]:
        """Everything it holds on the device."""
        windows = [] if self.windows is None else [x for x in vars(self.windows).values() if x is not None]
        own = [self.slots, self.table, self.lens_before, self.lens, self.q_lens, *(self.each or ())]
        return own + [x for x in (self.flat, self.recent_slots, self.near) if x is not None] + windows


class Group:
    """Packed layers that share bookkeeping.

    Args:
        spec: their format, KV heads and windows.
        layers: their indices in the model, in order.
        page_size: tokens per page.
        max_tokens: tokens per row that the pages are made for, or None to grow on demand.
        outlier_channels: [len(layers), num_kv_heads, channel_count] int64, or None.
        backend: of the operations.
    """

    def __init__(
        self,
        spec: PackedSpec,
        layers: Sequence[int],
        *,
        page_size: int,
        max_tokens: int | None,
        outlier_channels: Tensor | None,
        backend: str,
    ) -> None:
        self.spec, self.layers = spec, list(layers)
        self.page_size, self.max_tokens, self.backend = page_size, max_tokens, backend
        self.outlier_channels = outlier_channels
        self.paged: PagedKVCache | None = None
        self.sequences: list[int] = []
        self.fill = Fill.empty(0)
        self.windows: list[WindowTensors | None] = [None] * len(self.layers)
        self.step: Step | None = None
        self.schedules = SharedSchedules()
        self._table: tuple[list[tuple[int, int]], Tensor] | None = None

    @property
    def pages(self) -> PagedKVCache:
        """The paged cache, once there is one."""
        if self.paged is None:
            raise RuntimeError("the cache is empty: nothing has been stored yet")
        return self.paged

    @property
    def windowed(self) -> bool:
        return self.spec.sink + self.spec.recent > 0

    def start(self, batch: int, device: torch.device) -> None:
        """Makes the pages and one empty sequence per row."""
        self.paged = PagedKVCache(
            self.spec.fmt,
            num_layers=len(self.layers),
            num_kv_heads=self.spec.num_kv_heads,
            num_pages=self.pages_for(batch),
            page_size=self.page_size,
            device=device,
            outlier_channels=self.outlier_channels,
            backend=self.backend,
        )
        self.sequences = [self.paged.new_sequence() for _ in range(batch)]
        self.fill = Fill.empty(batch)

    def pages_for(self, batch: int) -> int:
        """Pages that are made at the start."""
        return 1 if self.max_tokens is None else batch * -(-self.max_tokens // self.page_size)

    def lengths(self) -> list[int]:
        """Packed tokens of every row."""
        return [] if self.paged is None else [self.paged.length(sequence) for sequence in self.sequences]

    def reserve(self, new: NewColumns) -> None:
        """Plans a step and reserves its slots.

        Raises:
            OutOfPagesError: max_tokens is fixed and too small; nothing has changed.
        """
        places = [new.places(row) for row in range(new.batch)]
        moves = plan_moves(self.fill, self.spec.sink, self.spec.recent, places)
        before = self.lengths()
        slots = self._append([len(sources) for sources in moves.packed])
        chunk, recent = self._scatter(slots, moves.packed, new)
        self.step = Step(
            new=new,
            flat=self._flat(new),
            slots=chunk,
            recent_slots=recent,
            windows=WindowPlan(moves, self.spec.recent, slots.device) if self.windowed else None,
            sink=list(self.fill.sink),
            recent=list(self.fill.recent),
            before=before,
            table=self._block_table(),
            lens_before=torch.tensor(before, dtype=torch.int32, device=slots.device),
            lens=self.pages.seq_lens(self.sequences),
            q_lens=torch.tensor(new.lengths, dtype=torch.int32, device=slots.device),
        )
        for row, _, _ in moves.sink:
            self.fill.sink[row] += 1
        self.fill.recent = [len(sources) for sources in moves.recent]

    def undo(self) -> None:
        """Takes back what `reserve` did."""
        assert self.step is not None
        for sequence, length in zip(self.sequences, self.step.before, strict=True):
            self.pages.crop(sequence, length)
        self.fill = Fill(self.step.sink, self.step.recent)
        self.step = self._table = None

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Packs a layer's part of the step and updates its windows.

        Args:
            layer: position among the group's layers.
            k, v: [batch, heads, count, d], the new columns.
        """
        step = self.step
        assert step is not None
        windows = self.window(layer, k)
        if windows is not None and step.recent_slots is not None:
            old_k, old_v = windows.recent.flatten(1, 2)
            self.pages.store(layer, old_k, old_v, step.recent_slots)
        rows_k, rows_v = k.transpose(1, 2), v.transpose(1, 2)  # [batch, count, heads, d]
        self.pages.store(layer, rows_k.flatten(0, 1), rows_v.flatten(0, 1), step.slots)
        if windows is not None and step.windows is not None:
            windows.insert(rows_k, rows_v, step.windows)

    def window(self, layer: int, like: Tensor) -> WindowTensors | None:
        """A layer's windows, made on first use."""
        if not self.windowed:
            return None
        windows = self.windows[layer]
        if windows is None:
            windows = WindowTensors(like.shape[0], self.spec.sink, self.spec.recent, like)
            self.windows[layer] = windows
        return windows

    def near_mask(self) -> Tensor:
        """What the step's tokens see of all rows' sinks, recent windows (as before the step) and new columns.

        [sum(lengths), batch * (sink + recent + count)] bool, made once per step.
        """
        step = self.step
        assert step is not None
        if step.near is None:
            step.near = self._near_mask(step).to(step.slots.device)
        return step.near

    def drop(self, counts: Sequence[int]) -> None:
        """Removes the last counts[i] tokens of row i: from the recent window, then the pages, then the sink."""
        self.step = self._table = None
        for row, (sequence, count) in enumerate(zip(self.sequences, counts, strict=True)):
            from_recent = min(count, self.fill.recent[row])
            self.fill.recent[row] -= from_recent
            packed = self.pages.length(sequence)
            from_pages = min(count - from_recent, packed)
            self.pages.crop(sequence, packed - from_pages)
            self.fill.sink[row] -= count - from_recent - from_pages

    def select(self, index: list[int]) -> None:
        """Row i becomes what row index[i] was. Pages are shared until one of the rows writes to them."""
        self.step = self._table = None
        if self.paged is None:
            return
        chosen = [self.paged.fork(self.sequences[i]) for i in index]
        for sequence in self.sequences:
            self.paged.free(sequence)
        self.sequences = chosen
        self.fill.select(index)
        for windows in self.windows:
            if windows is not None:
                windows.select(torch.tensor(index))

    def reset(self) -> None:
        """Gives everything back."""
        self.paged, self.step, self._table = None, None, None
        self.schedules = SharedSchedules()
        self.sequences, self.fill = [], Fill.empty(0)
        self.windows = [None] * len(self.layers)

    def nbytes(self) -> int:
        """Bytes allocated: pages, windows, outlier channels, the step's index tensors and schedules."""
        if self.paged is None:
            return 0
        tensors = [] if self.step is None else self.step.tensors
        tensors += self.schedules.tensors
        tensors += [x for windows in self.windows if windows is not None for x in windows.tensors]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return self.paged.nbytes() + sum(storages.values())

    def bytes_used(self) -> int:
        """Bytes of the pages in use and of the tokens in the windows."""
        if self.paged is None:
            return 0
        pages = self.paged.num_pages - self.paged.num_free_pages
        used = len(self.layers) * pages * self.spec.num_kv_heads * self.paged.layout.page_bytes
        tokens = sum(self.fill.sink) + sum(self.fill.recent)
        for windows in self.windows:
            if windows is not None:
                used += tokens * 2 * windows.sink.shape[-2] * windows.sink.shape[-1] * windows.sink.element_size()
        return used

    def _append(self, counts: list[int]) -> Tensor:
        try:
            return self.pages.append(self.sequences, counts)
        except OutOfPagesError as error:
            if self.max_tokens is not None:
                raise
            pages = self.pages.num_pages
            self.pages.grow(max(pages + error.missing, int(pages * GROWTH)))
        return self.pages.append(self.sequences, counts)

    def _block_table(self) -> Tensor:
        """The block table, made anew when a page has come or been replaced, which happens at a row's end only."""
        tables = [self.pages.pool.table(sequence) for sequence in self.sequences]
        ends = [(len(table), table[-1] if table else -1) for table in tables]
        if self._table is None or self._table[0] != ends:
            self._table = ends, self.pages.block_table(self.sequences)
        return self._table[1]

    def _scatter(self, slots: Tensor, packed: list[list[int]], new: NewColumns) -> tuple[Tensor, Tensor | None]:
        """Slots of the new columns and of the recent window, flattened over rows."""
        recent, width = self.spec.recent, self.spec.recent + new.count
        if not recent and len(slots) == new.batch * new.count:
            return slots, None
        sources = [row * width + source for row, chosen in enumerate(packed) for source in chosen]
        every = torch.full((new.batch * width,), -1, dtype=torch.int64, device=slots.device)
        every[torch.tensor(sources, dtype=torch.int64, device=slots.device)] = slots
        every = every.view(new.batch, width)
        moved = any(chosen and chosen[0] < recent for chosen in packed)
        new_slots, old_slots = every[:, recent:].contiguous(), every[:, :recent].contiguous()
        return new_slots.flatten(), old_slots.flatten() if moved else None

    def _near_mask(self, step: Step) -> Tensor:
        sink, recent, count, batch = self.spec.sink, self.spec.recent, step.new.count, step.new.batch
        mask = torch.zeros(batch, count, batch, sink + recent + count, dtype=torch.bool)
        tokens = torch.ones(batch, count, dtype=torch.bool) if step.new.tokens is None else step.new.tokens
        for row in range(batch):
            mask[row, :, row, : step.sink[row]] = True
            mask[row, :, row, sink : sink + step.recent[row]] = True
            mask[row, :, row, sink + recent :] = tokens[row].expand(count, count).tril()
        return mask.flatten(2).flatten(0, 1)[tokens.flatten()]

    def _flat(self, new: NewColumns) -> Tensor | None:
        return None if new.tokens is None else new.tokens.flatten().nonzero().flatten().to(self.pages.device)
