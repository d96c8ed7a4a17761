"""PagedKVCache: pages, block tables and sequences; the packed pages are the only copy of the keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvturbo import ops
from kvturbo.config import PAGE_SIZE, KVFormat, check_format
from kvturbo.layout import PageLayout
from kvturbo.ops import backends
from kvturbo.ops.sharing import SharedSchedules
from kvturbo.pool import PagePool
from kvturbo.quantizer import check_channels
from kvturbo.storage import read_file, write_file

MOST_BATCHES = 64
"""Batches of a step whose tables are kept for the next layer."""
Batch = tuple[Tensor, Tensor, Tensor | None]
"""Block table, lengths and q_lens of sequences that are decoded together."""


class PagedKVCache:
    """A packed KV cache for several layers that share their block tables.

    Sequences go by integer ids. A step is: `append` reserves slots for the new tokens (in all layers), then `store` writes
    each layer's keys and values into them, then `decode` or `prefix_attention` reads.

    Args:
        fmt: the format of every layer.
        num_layers: layers in this cache.
        num_kv_heads: KV heads per layer.
        num_pages: pages per layer, each for `page_size` tokens of all KV heads.
        page_size: 16, 32 or 64.
        device: where the pages live.
        outlier_channels: [num_layers, num_kv_heads, fmt.channel_count] int64; needed by the `-o` formats and fixed from here on.
        backend: of the operations, "auto" or one of `kvturbo.ops.backends.BACKENDS`.

    Raises:
        ValueError: fmt is no format, a size is not positive, the page size is not supported, outlier channels are missing or
            wrong, or the backend does not exist or can't run the format on the device.
    """

    def __init__(
        self,
        fmt: KVFormat,
        *,
        num_layers: int,
        num_kv_heads: int,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        device: torch.device | str = "cpu",
        outlier_channels: Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        check_format(fmt)
        for name, value in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.fmt, self.layout, self.backend = fmt, PageLayout.of(fmt, page_size), backend
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads
        self.device = torch.device(device)
        for operation in backends.OPERATIONS:
            backends.load(operation, backends.choose(backend, operation, self.device, fmt))
        self.outlier_channels = self._checked_channels(outlier_channels)
        self.pool = PagePool(num_pages, page_size)
        self.pages = [self._new_pages(num_pages) for _ in range(num_layers)]
        self._schedules = SharedSchedules()
        self._batches: dict[tuple[int, tuple[int, ...], tuple[int, ...] | None], Batch] = {}

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.layout.page_size

    @property
    def num_pages(self) -> int:
        """Pages per layer."""
        return self.pool.num_pages

    @property
    def num_free_pages(self) -> int:
        """Pages per layer that no sequence uses."""
        return self.pool.num_free

    @property
    def sequences(self) -> list[int]:
        """Ids of the live sequences."""
        return list(self.pool.tables)

    def nbytes(self) -> int:
        """Bytes of all pages and outlier channels: what the allocator gave, before its rounding."""
        tensors = [*self.pages, *([] if self.outlier_channels is None else [self.outlier_channels])]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self.pool.length(sequence)

    def new_sequence(self) -> int:
        """Starts an empty sequence and returns its id."""
        return self.pool.new_sequence()

    def append(self, sequences: Sequence[int], counts: Sequence[int]) -> Tensor:
        """Reserves slots for new tokens at the end of sequences (a ragged batch), in all layers.

        A partly filled page that is shared with a fork is copied first.

        Args:
            sequences: ids, no id twice.
            counts: new tokens of each.

        Returns:
            [sum(counts)] int64 slot mapping on the cache's device, in the order of the sequences.

        Raises:
            OutOfPagesError: there are not enough free pages; nothing has changed.
            ValueError: an id is unknown or twice there, or a count is negative.
        """
        slots, copies = self.pool.append(sequences, counts)
        if copies:
            old, new = (torch.tensor(ids, device=self.device) for ids in zip(*copies, strict=True))
            for pages in self.pages:
                pages[new] = pages[old]
        return torch.tensor(slots, dtype=torch.int64, device=self.device)

    def crop(self, sequence: int, length: int) -> None:
        """Drops a sequence's tokens from `length` on and frees the pages that are then unused.

        Raises:
            ValueError: the id is unknown, or length is negative or above the sequence's.
        """
        self.pool.crop(sequence, length)

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens, sharing the pages; returns its id."""
        return self.pool.fork(sequence)

    def free(self, sequence: int) -> None:
        """Forgets a sequence and frees the pages that no other one uses."""
        self.pool.free(sequence)

    def grow(self, num_pages: int) -> None:
        """Enlarges the pool to num_pages per layer, one layer at a time. Pages keep their ids and bytes.

        Raises:
            ValueError: num_pages is below the present number.
        """
        self.pool.check_growth(num_pages)
        for layer, old in enumerate(self.pages):
            new = self._new_pages(num_pages)
            new[: old.shape[0]] = old
            self.pages[layer] = new
        self.pool.grow(num_pages)  # last: if memory runs out, no sequence gets a page that a layer lacks

    def block_table(self, sequences: Sequence[int]) -> Tensor:
        """Page ids of sequences in order: [len(sequences), most pages] int32, padded with 0."""
        tables = [self.pool.table(sequence) for sequence in sequences]
        width = max((len(table) for table in tables), default=0)
        rows = [table + [0] * (width - len(table)) for table in tables]
        return torch.tensor(rows, dtype=torch.int32, device=self.device).view(len(tables), width)

    def seq_lens(self, sequences: Sequence[int]) -> Tensor:
        """Lengths of sequences: [len(sequences)] int32."""
        lengths = [self.pool.length(sequence) for sequence in sequences]
        return torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def store(self, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Quantises and writes one layer's keys and values: k, v [T, num_kv_heads, d]; see `kvturbo.ops.store`."""
        ops.store(k, v, self._pages_of(layer), slot_mapping, **self._options(layer))

    def decode(
        self,
        layer: int,
        q: Tensor,
        sequences: Sequence[int],
        *,
        scale: float,
        q_lens: Sequence[int] | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention of the last stored tokens over a layer's pages: out and lse; see `kvturbo.ops.decode` for the options.

        The layers of a step share block table, lengths and schedule.
        """
        table, lens, counts = self._batch(sequences, q_lens)
        options = {"schedule": self._schedules} | options
        return ops.decode(
            q, self._pages_of(layer), table, lens, scale=scale, q_lens=counts, **options, **self._options(layer)
        )

    def prefix_attention(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Sequence[int],
        *,
        scale: float,
        q_lens: Sequence[int],
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attention of new chunks over what came before them, in pages, and over themselves, raw.

        The chunks' slots must have been reserved (`append`); whether they are stored already makes no difference. See
        `kvturbo.ops.prefix_attention` for the options.
        """
        counts = torch.tensor(q_lens, dtype=torch.int32, device=self.device)
        prefix_lens = self.seq_lens(sequences) - counts
        return ops.prefix_attention(
            q, k, v, self._pages_of(layer), self.block_table(sequences), prefix_lens,
            scale=scale, q_lens=counts, **options, **self._options(layer),
        )  # fmt: skip

    def gather(self, layer: int, sequence: int, start: int, stop: int, **options: Any) -> tuple[Tensor, Tensor]:
        """Dequantised keys and values at positions start..stop-1 of a sequence: two [stop - start, num_kv_heads, d].

        Raises:
            ValueError: the range is not inside the sequence.
        """
        if not 0 <= start <= stop <= self.length(sequence):
            raise ValueError(
                f"range must satisfy 0 <= start <= stop <= {self.length(sequence)}, got start {start}, stop {stop}"
            )
        table = self.block_table([sequence])
        k, v = ops.gather(self._pages_of(layer), table, start, stop, **options, **self._options(layer))
        return k[0], v[0]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The live sequences and the pages they use: host tensors by name, and a header that JSON can hold."""
        used = sorted({page for table in self.pool.tables.values() for page in table})
        number = {page: i for i, page in enumerate(used)}
        index = torch.tensor(used, dtype=torch.int64, device=self.device)
        tensors = {f"pages.{layer}": pages[index].cpu() for layer, pages in enumerate(self.pages)}
        if self.outlier_channels is not None:
            tensors["outlier_channels"] = self.outlier_channels.cpu()
        sequences = [
            {"length": self.length(sequence), "pages": [number[page] for page in table]}
            for sequence, table in self.pool.tables.items()
        ]
        header = {"format": self.fmt.name, "head_dim": self.fmt.head_dim, "seed": self.fmt.seed}
        header |= {"page_size": self.page_size, "num_layers": self.num_layers, "num_kv_heads": self.num_kv_heads}
        return tensors, header | {"sequences": sequences}

    @classmethod
    def from_state(
        cls,
        tensors: dict[str, Tensor],
        header: dict[str, Any],
        *,
        num_pages: int | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> PagedKVCache:
        """A cache with what `state` returned. Sequences get the ids 0, 1, ... in the order in which they were there.

        Args:
            tensors, header: from `state`.
            num_pages: pages per layer of the new cache (default: as many as there are, at least 1).
            device, backend: as for the constructor.

        Raises:
            ValueError: num_pages is too small.
        """
        stored = tensors["pages.0"].shape[0]
        num_pages = max(stored, 1) if num_pages is None else num_pages
        if num_pages < stored:
            raise ValueError(f"num_pages must be at least the {stored} pages that are stored, got {num_pages}")
        cache = cls(
            KVFormat.from_name(header["format"], header["head_dim"], seed=header["seed"]),
            num_layers=header["num_layers"],
            num_kv_heads=header["num_kv_heads"],
            num_pages=num_pages,
            page_size=header["page_size"],
            device=device,
            outlier_channels=tensors.get("outlier_channels"),
            backend=backend,
        )
        for layer, pages in enumerate(cache.pages):
            pages[:stored] = tensors[f"pages.{layer}"].to(pages.device)
        cache.pool.adopt([(sequence["pages"], sequence["length"]) for sequence in header["sequences"]])
        return cache

    def save(self, path: str | Path) -> None:
        """Writes the live sequences and the pages they use to a safetensors file, whole or not at all.

        Args:
            path: the file, replaced if it exists.
        """
        write_file(Path(path), "PagedKVCache", *self.state())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        num_pages: int | None = None,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> PagedKVCache:
        """Reads a file that `save` wrote. Arguments and sequence ids as for `from_state`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, altered, not a saved cache or of another version, or num_pages is too small.
        """
        return cls.from_state(
            *read_file(Path(path), "PagedKVCache"), num_pages=num_pages, device=device, backend=backend
        )

    def _batch(self, sequences: Sequence[int], q_lens: Sequence[int] | None) -> Batch:
        """The tensors of a decode, the same ones until a table or a length changes."""
        key = self.pool.changes, tuple(sequences), None if q_lens is None else tuple(q_lens)
        if not self._recording() and key in self._batches:
            return self._batches[key]
        counts = None if q_lens is None else torch.tensor(q_lens, dtype=torch.int32, device=self.device)
        batch = self.block_table(sequences), self.seq_lens(sequences), counts
        if not self._recording():
            stale = next(iter(self._batches), key)[0] != key[0]
            if stale or len(self._batches) >= MOST_BATCHES:
                self._batches.clear()
            self._batches[key] = batch
        return batch

    def _recording(self) -> bool:
        """Whether what is done now will be done again later, with tensors that must not be the present step's."""
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        return capturing or torch.compiler.is_compiling()

    def _pages_of(self, layer: int) -> Tensor:
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be from 0 to {self.num_layers - 1}, got {layer}")
        return self.pages[layer]

    def _options(self, layer: int) -> dict[str, Any]:
        channels = None if self.outlier_channels is None else self.outlier_channels[layer]
        return {"fmt": self.fmt, "outlier_channels": channels, "backend": self.backend}

    def _new_pages(self, num_pages: int) -> Tensor:
        shape = (num_pages, self.num_kv_heads, self.layout.page_bytes)
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def _checked_channels(self, channels: Tensor | None) -> Tensor | None:
        if channels is None:
            if self.fmt.outliers:
                raise ValueError(
                    f"format {self.fmt.name!r} needs outlier_channels "
                    f"[{self.num_layers}, {self.num_kv_heads}, {self.fmt.outliers}], got None"
                )
            return None
        wanted = (self.num_layers, self.num_kv_heads, self.fmt.channel_count)
        if tuple(channels.shape) != wanted:
            raise ValueError(f"outlier_channels must be int64 {list(wanted)}, got {list(channels.shape)}")
        check_channels(channels, self.fmt)
        return channels.to(self.device, copy=True, memory_format=torch.contiguous_format)
