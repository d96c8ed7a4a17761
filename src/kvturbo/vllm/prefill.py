"""Prompts: a chunk attends to its own raw keys and values with the engine's flash attention, and to the packed prefix before it
with the same flash attention over 16-bit copies of bounded pieces (`pieces`), in rotated space; results are merged by their
log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kvturbo import ops
from kvturbo.config import KVFormat
from kvturbo.quantizer import has_rotated_form
from kvturbo.rotation import hadamard_matrix, signs
from kvturbo.vllm.pieces import ROWS_AT_ONCE, PrefixPiece, tokens_at_once

if TYPE_CHECKING:
    from kvturbo.vllm.metadata import PromptRows

Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""(out, first, its lse, second, its lse, lse of out): attention over both sets of keys; out overlaps neither."""


class Flash(Protocol):
    """Dense attention of several sequences at once."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        starts: tuple[Tensor, Tensor],
        longest: tuple[int, int],
        causal: bool,
        out: Tensor,
    ) -> Tensor:
        """Writes out [n, num_q_heads, d] and returns lse [num_q_heads, n] fp32.

        Args:
            q: [n, num_q_heads, d].
            k, v: [m, num_kv_heads, d].
            starts: where each sequence's rows of q and of k begin, and their ends: int32.
            longest: the longest sequence's rows of q and of k.
            causal: whether the last query sees the last key, the one before it one key less, and so on.
            out: where to write.
        """  # fmt: skip


@dataclass(frozen=True)
class Shapes:
    """What the workspace is made for.

    Attributes:
        num_q_heads, num_kv_heads, head_size: of a layer on this rank.
        dtype: of queries and 16-bit copies.
    """

    num_q_heads: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def piece_tokens(self) -> int:
        """Tokens of a prefix that are copied at once."""
        return tokens_at_once(self.num_kv_heads, self.head_size)

    def buffers(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shapes and dtypes: k, v, query, partial, merged, result; and lse of the merged and the result, [Hq, rows] fp32 flat."""
        copies = (self.piece_tokens, self.num_kv_heads, self.head_size)
        rows = (ROWS_AT_ONCE, self.num_q_heads, self.head_size)
        lse = (self.num_q_heads * ROWS_AT_ONCE,)
        return [(copies, self.dtype)] * 2 + [(rows, self.dtype)] * 4 + [(lse, torch.float32)] * 2

    def nbytes(self) -> int:
        """Bytes of the workspace: constant, whatever the length of prompts and contexts."""
        total = 0
        for shape, dtype in self.buffers():
            total += torch.Size(shape).numel() * dtype.itemsize
        return total


@dataclass(frozen=True)
class Prompts:
    """Attention of the prompts of a step in one layer.

    Attributes:
        fmt: the format.
        scale: factor on the scores.
        flash, merge: the engine's.
        workspace: gives the tensors of `Shapes.buffers`.
        backend: of gather.
    """

    fmt: KVFormat
    scale: float
    flash: Flash
    merge: Merge
    workspace: Callable[[], list[Tensor]]
    backend: str

    def warm_up(self, dtype: torch.dtype, device: torch.device) -> None:
        """Takes the workspace and puts the rotation's matrix on the device."""
        self.workspace()
        _rotation(self.fmt.head_dim, self.fmt.seed, dtype, device)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, rows: PromptRows, channels: Tensor | None, out: Tensor
    ) -> Tensor:
        """Attention of all chunks; writes out and returns lse [num_q_heads, n] fp32.

        Args:
            q: [n, num_q_heads, d], the chunks' queries one after another.
            k, v: [n, num_kv_heads, d], raw.
            pages: [num_pages, num_kv_heads, page_bytes] uint8.
            rows: where chunks and prefixes lie.
            channels: outlier channels, [num_kv_heads, count] int64 or None.
            out: [n, num_q_heads, d].
        """
        lse = self.flash(q, k, v, (rows.starts, rows.starts), (rows.longest, rows.longest), True, out)
        tensors = self.workspace() if rows.pieces else []
        state: _Prefix | None = None
        for piece in rows.pieces:
            state = state or _Prefix(self, piece, q, tensors)
            state.add(piece, pages, channels)
            if piece.ends:
                state.finish(out, lse)
                state = None
        return lse


class _Prefix:
    """Some rows' attention over the pieces of their prefix."""

    def __init__(self, prompts: Prompts, piece: PrefixPiece, q: Tensor, tensors: list[Tensor]) -> None:
        self._prompts, self._rows = prompts, slice(piece.first, piece.last)
        count, fmt = piece.last - piece.first, prompts.fmt
        self._k, self._v, *buffers = tensors[:6]
        query, self._partial, self._merged, self._result = (x[:count] for x in buffers)
        self._lses = [x[: q.shape[1] * count].view(q.shape[1], count) for x in tensors[6:]]
        self._rotated = has_rotated_form(fmt.k) and has_rotated_form(fmt.v)
        self._turned = self._rotated and fmt.k.rotate
        self._query = turn(q[self._rows], fmt, query) if self._turned else q[self._rows]
        self._lse: Tensor | None = None

    def add(self, piece: PrefixPiece, pages: Tensor, channels: Tensor | None) -> None:
        """Attends to one more piece."""
        count, prompts = piece.stop - piece.start, self._prompts
        copies = self._k[:count], self._v[:count]
        ops.gather(
            pages, piece.table, piece.start, piece.stop, fmt=prompts.fmt, rotated=self._rotated,
            outlier_channels=channels, out=(copies[0][None], copies[1][None]), backend=prompts.backend,
        )  # fmt: skip
        bounds, longest = piece.bounds, piece.longest
        if self._lse is None:
            self._lse = prompts.flash(self._query, *copies, bounds, longest, False, self._merged)
            return
        lse = prompts.flash(self._query, *copies, bounds, longest, False, self._partial)
        prompts.merge(self._result, self._merged, self._lse, self._partial, lse, self._lses[0])
        self._merged, self._result = self._result, self._merged
        self._lse = self._lses[0]
        self._lses.reverse()

    def finish(self, out: Tensor, lse: Tensor) -> None:
        """Merges with the rows' attention over their own chunk, in place."""
        assert self._lse is not None
        if self._turned:
            turn_back(self._merged, self._prompts.fmt, self._partial)
            self._merged, self._partial = self._partial, self._merged
        own = lse[:, self._rows].contiguous()
        self._prompts.merge(self._result, self._merged, self._lse, out[self._rows], own, self._lses[0])
        out[self._rows] = self._result
        lse[:, self._rows] = self._lses[0]


@lru_cache(maxsize=16)
def _rotation(head_dim: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rotation times sqrt(head_dim): [d, d] of +-1, exact in 16 bits."""
    return (hadamard_matrix(head_dim) * signs(head_dim, seed).double()).to(device=device, dtype=dtype)


def turn(x: Tensor, fmt: KVFormat, out: Tensor) -> Tensor:
    """Rotates vectors [..., d] into out, a contiguous tensor of the same shape and dtype."""
    return _multiply(x, _rotation(fmt.head_dim, fmt.seed, x.dtype, x.device).T, out)


def turn_back(x: Tensor, fmt: KVFormat, out: Tensor) -> Tensor:
    """The inverse of `turn`."""
    return _multiply(x, _rotation(fmt.head_dim, fmt.seed, x.dtype, x.device), out)


def _multiply(x: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """Products in fp32, scaled before they are rounded: the matrix alone would have rounded entries."""
    flat, head_dim = out.view(-1, out.shape[-1]), x.shape[-1]
    torch.addmm(flat, x.reshape(-1, head_dim), matrix, beta=0, alpha=head_dim**-0.5, out=flat)
    return out


def dense_workspace(shapes: Shapes, device: torch.device) -> Callable[[], list[Tensor]]:
    """Tensors of their own, for where no engine hands out memory."""
    tensors: list[Any] = []

    def get() -> list[Tensor]:
        if not tensors:
            tensors.extend(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes.buffers())
        return tensors

    return get
