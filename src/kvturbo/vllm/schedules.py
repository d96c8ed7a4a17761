"""Plans of splits that live as long as the engine: one set of buffers per kernel, shared by all batch sizes and layers."""

from __future__ import annotations

import copy

import torch

from kvturbo.config import KVFormat
from kvturbo.ops.decode.cuda_schedule import Schedule
from kvturbo.ops.decode.variants import Variant, limits_of, variant_for


class Schedules:
    """The schedules of a metadata builder.

    A captured graph holds the addresses of its plan and workspace, so these are made before any capture. Steps follow one another
    on a stream, and a plan is refreshed right before its step, so batches of all sizes share the buffers.

    Args:
        fmt, page_size: the pages.
        num_q_heads, num_kv_heads: of a layer on this rank.
        dtype: of queries and outputs.
        most: sequences in the largest batch.
        max_q_len: queries of a sequence at most, 1 to 8.
        device: the GPU.
        ring_size: tokens of a ring, if decode reads the newest tokens from rings; 0 if it does not.
    """

    def __init__(
        self,
        fmt: KVFormat,
        page_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        dtype: torch.dtype,
        most: int,
        max_q_len: int,
        device: torch.device,
        ring_size: int = 0,
    ) -> None:
        self._fmt, self._page_size, self._dtype, self._device = fmt, page_size, dtype, device
        self._group, self._kv_heads, self._most = num_q_heads // num_kv_heads, num_kv_heads, most
        self._limits, self._ring_size = limits_of(device), ring_size
        self._buffers: dict[Variant, Schedule] = {}
        self._views: dict[tuple[int, int], Schedule] = {}
        for q_len in range(1, max_q_len + 1):
            for batch in (1, most):  # few tasks have a kernel of their own
                self.of(batch, batch * q_len)

    def of(self, batch: int, tokens: int) -> Schedule:
        """The schedule for a batch of sequences with that many queries in all; its plan is that of another step until `update`."""
        q_len = -(-tokens // batch)
        if (batch, q_len) not in self._views:
            view = copy.copy(self._buffer(q_len, batch))
            view.batch = batch
            self._views[batch, q_len] = view
        return self._views[batch, q_len]

    def _buffer(self, q_len: int, batch: int) -> Schedule:
        variant = variant_for(
            self._fmt, self._page_size, self._dtype, self._dtype, self._group, q_len, batch * self._kv_heads,
            self._limits, self._ring_size,
        )  # fmt: skip
        if variant not in self._buffers:
            self._buffers[variant] = Schedule(variant, self._most, self._kv_heads, self._device)
        return self._buffers[variant]
