"""A packed layer: what transformers sees of it, and how raw keys and values find their way to the attention function."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvturbo.hf.geometry import LayerShape
from kvturbo.hf.group import Group, Step
from kvturbo.hf.store import PackedStore

ATTENTION = "kvturbo"
"""Name of the attention implementation."""

_log = logging.getLogger(__name__)


@dataclass
class Staged:
    """Raw keys and values [batch, heads, count, d] of a layer between `update` and its attention."""

    layer: PackedLayer
    k: Tensor
    v: Tensor


_staged: ContextVar[Staged | None] = ContextVar("kvturbo_staged", default=None)


def take_staged(layer_idx: int | None) -> Staged | None:
    """What the layer with this index has staged, once; None if nothing is."""
    staged = _staged.get()
    if staged is None or staged.layer.layer_idx != layer_idx:
        return None
    _staged.set(None)
    return staged


@lru_cache(maxsize=8)
def tell_once(implementation: str) -> None:
    """Says in the log, once per process, what another attention implementation costs."""
    _log.warning(
        "attention implementation %r: TurboCache dequantises every token, one layer at a time, for it; "
        "model.set_attn_implementation(%r) attends to the packed pages themselves",
        implementation,
        ATTENTION,
    )


class PackedLayer(CacheLayerMixin):
    """A full-attention layer whose keys and values are in packed pages.

    Args:
        store, group: what it shares with other layers.
        position: its place in the group.
        layer_idx: its index in the model.
        shape: its KV heads and head_dim.
        config: the model's text configuration, which names the attention implementation.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, store: PackedStore, group: Group, position: int, layer_idx: int, shape: LayerShape, config: Any
    ) -> None:
        super().__init__()
        self.store, self.group, self.position = store, group, position
        self.layer_idx, self.shape, self.config = layer_idx, shape, config
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Checks shapes and types; memory is taken when tokens are stored."""
        wanted = (self.shape.num_kv_heads, self.shape.head_dim)
        for name, x in (("keys", key_states), ("values", value_states)):
            if x.dim() != 4 or (x.shape[1], x.shape[3]) != wanted:
                raise ValueError(
                    f"{name} of layer {self.layer_idx} must be [batch, {wanted[0]}, tokens, {wanted[1]}], got {list(x.shape)}"
                )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new keys and values [batch, heads, count, d].

        With the attention implementation `kvturbo` they are returned as they are, for the attention function to store and
        attend. With any other one they are stored at once, and what is returned is the whole layer: dequantised, except
        for the new tokens and those in 16-bit windows.

        Raises:
            OutOfPagesError: max_tokens is too small; nothing has been stored.
            ValueError: a shape does not fit the model's configuration or the tokens that are stored.
            RuntimeError: the keys given before were never attended to, so the attention implementation is not `kvturbo`.
        """
        self.lazy_initialization(key_states, value_states)
        if self.config._attn_implementation == ATTENTION:
            self._stage(key_states, value_states)
            return key_states, value_states
        tell_once(self.config._attn_implementation)
        step = self.begin(key_states, None)
        whole = self._dequantised(step, key_states, value_states)
        self.finish(key_states, value_states)
        return whole

    def begin(self, k: Tensor, mask: Tensor | None) -> Step:
        """The step that new keys [batch, heads, count, d] belong to; the first layer that sees them starts it.

        Raises:
            ValueError: the keys are on another device than the pages.
            RuntimeError: the layers hold different numbers of tokens, after a forward pass that was interrupted.
        """
        count = k.shape[2]
        if self.group.paged is not None and k.device != self.group.paged.device:
            raise ValueError(
                f"the keys of layer {self.layer_idx} are on {k.device}, the cache's pages on {self.group.paged.device}: "
                "all packed layers must be on one device"
            )
        if self.length == self.store.rows.columns:
            self.store.begin(k.shape[0], count, k.device, mask)
        step = self.group.step
        if step is None or self.length + count != self.store.rows.columns:
            raise RuntimeError(
                f"layer {self.layer_idx} holds {self.length} tokens and gets {count}, but the cache is at "
                f"{self.store.rows.columns}: a forward pass was interrupted; reset() the cache"
            )
        return step

    def finish(self, k: Tensor, v: Tensor) -> None:
        """Stores the step's keys and values [batch, heads, count, d]."""
        self.group.store(self.position, k, v)
        self.length += k.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns after `query_length` new ones, and the first column: padding has columns though it is not stored."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far, padding included."""
        return self.length

    def get_max_length(self) -> int:
        """max_tokens, or -1 where the pages grow."""
        return -1 if self.group.max_tokens is None else self.group.max_tokens

    def _stage(self, k: Tensor, v: Tensor) -> None:
        before = _staged.get()
        if before is not None and before.layer.store is self.store:
            raise RuntimeError(
                f"the keys of layer {before.layer.layer_idx} were never attended to by {ATTENTION!r}: the configuration given to "
                f"TurboCache names that attention implementation, the model uses another"
            )
        _staged.set(Staged(self, k, v))

    def _dequantised(self, step: Step, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's keys and values before the step, then the new ones: two [batch, heads, columns, d]."""
        past = self.length
        if not past:
            return k, v
        batch, heads, count, d = k.shape
        whole_k, whole_v = (x.new_zeros(batch, past + count, heads, d) for x in (k, v))
        windows = self.group.window(self.position, k)
        for row in range(batch):
            columns = self.store.rows.stored_columns(row, past)
            parts = self._parts(step, row, windows, k.dtype)
            for whole, part in zip((whole_k, whole_v), parts, strict=True):
                whole[row, slice(past) if columns is None else columns.to(k.device)] = torch.cat(part)
        whole_k[:, past:], whole_v[:, past:] = k.transpose(1, 2), v.transpose(1, 2)
        self.store.packed_tokens_read += sum(step.before)
        return whole_k.transpose(1, 2), whole_v.transpose(1, 2)

    def _parts(self, step: Step, row: int, windows: Any, dtype: torch.dtype) -> list[list[Tensor]]:
        sequence = self.group.sequences[row]
        packed = self.group.pages.gather(self.position, sequence, 0, step.before[row], dtype=dtype)
        if windows is None:
            return [[x] for x in packed]
        sink, recent = step.sink[row], step.recent[row]
        return [[windows.sink[side, row, :sink], packed[side], windows.recent[side, row, :recent]] for side in range(2)]
