"""Oracles and builders that the tests of the operations, the cache and every backend share.

The attention here is written as loops over scalars in float64 and knows nothing of pages: its keys and values are
`dequantize(quantize(x))`. Builders put the same vectors into pages that are full of garbage everywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor

from kvturbo import KVFormat, Packed, dequantize, format_names, quantize
from kvturbo.config import HEAD_DIMS, SIDES, Side
from kvturbo.layout import PageLayout
from kvturbo.ops import backends
from kvturbo.ops.store.reference import store as reference_store

FIELDS = ("codes", "scales", "outliers", "outlier_scale", "residual_signs", "residual_norm")
RELATIVE_ERROR = {"reference": 1e-5, "triton": 1e-4, "cuda": 3e-4}
"""Bound on |out - oracle| / |oracle| (Frobenius) of fp32 decode per backend."""


def device_of(backend: str) -> torch.device:
    """Where a backend is tested: the reference on the CPU, the others on a GPU if there is one."""
    on_gpu = backend != "reference" and torch.cuda.is_available()
    return torch.device("cuda", 0) if on_gpu else torch.device("cpu")


def runs(backend: str, operation: str, fmt: KVFormat) -> bool:
    """Whether a backend runs an operation for a format on this machine."""
    return backends.unavailable(backend, operation, device_of(backend), fmt) is None


def relative_bound(backend: str) -> float:
    return RELATIVE_ERROR[backend]


BACKENDS_UNDER_TEST = tuple(b for b in backends.BACKENDS if runs(b, "store", KVFormat.from_name("k4v4", 128)))


def interpreted(backend: str) -> bool:
    """Whether a backend's kernels run in an interpreter here, a thousand times slower than compiled."""
    return backend != "reference" and device_of(backend).type == "cpu"


INTERPRETED_FORMATS = ("k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k2v2", "k8v4", "lite4", "k4v4-o16", "k3v2-o16")


def backend_formats(operation: str, names: Sequence[str] | None = None, head_dim: int = 128) -> list[ParameterSet]:
    """(backend, format) parameters: every pair that runs. Default: every format name of the head_dim but the aliases.

    An interpreted backend gets the first of the names only, or `INTERPRETED_FORMATS`; on a GPU it gets all.
    """
    everything = [n for n in format_names(head_dim) if n != "turboquant"]
    parameters = []
    for backend in BACKENDS_UNDER_TEST:
        few = INTERPRETED_FORMATS if names is None else names[:1]
        for name in few if interpreted(backend) else everything if names is None else names:
            fmt = KVFormat.from_name(name, head_dim)
            if runs(backend, operation, fmt):
                parameters.append(pytest.param(backend, fmt, id=f"{backend}-{name}-{head_dim}"))
    return parameters


def every_head_dim(operation: str, names: Sequence[str]) -> list[ParameterSet]:
    """(backend, format, page_size) parameters over all head_dims, the names and page sizes taken in turn."""
    parameters = []
    for i, head_dim in enumerate(HEAD_DIMS):
        page_size = (32, 64)[i % 2]
        for p in backend_formats(operation, [names[i % len(names)]], head_dim):
            parameters.append(pytest.param(*p.values, page_size, id=f"{p.id}-{page_size}"))
    return parameters


def channels_for(fmt: KVFormat, heads: int, seed: int = 0) -> Tensor | None:
    """Outlier channels, other ones in every head: [heads, channel_count] int64 in whole RoPE pairs, or None."""
    if not fmt.channel_count:
        return None
    generator = torch.Generator().manual_seed(seed)
    half = fmt.head_dim // 2
    pairs = [torch.randperm(half, generator=generator)[: fmt.channel_count // 2] for _ in range(heads)]
    return torch.stack([torch.cat((pair, pair + half)).sort().values for pair in pairs])


def through_codec(x: Tensor, fmt: KVFormat, side: Side, channels: Tensor | None = None) -> Tensor:
    """What the cache stands for: x [L, heads, d] quantised and dequantised, as float64."""
    return dequantize(quantize(x, fmt, side, channels), fmt, side, channels).double()


def attention_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    first: int,
    window: int | None = None,
    seq_start: int = 0,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence, float64, a loop per row, head and key. Query i stands at position first + i, key j at position j.

    Args:
        q: [n, num_q_heads, d].
        k, v: [L, num_kv_heads, d].

    Returns:
        out [n, num_q_heads, d], lse [n, num_q_heads]; a row that sees nothing is 0 and -inf (the sink, if there is one).
    """
    queries, keys, values = (x.double().numpy() for x in (q, k, v))
    n, heads, d = queries.shape
    out, lse = np.zeros((n, heads, d)), np.full((n, heads), -math.inf)
    for i in range(n):
        low = max(seq_start, 0 if window is None else first + i - window + 1)
        seen = range(low, min(first + i, len(keys) - 1) + 1)
        for h in range(heads):
            kv_head = h // (heads // keys.shape[1]) if len(keys) else 0
            logits = [scale * float(np.dot(queries[i, h], keys[j, kv_head])) for j in seen]
            if soft_cap is not None:
                logits = [soft_cap * math.tanh(x / soft_cap) for x in logits]
            sink = [] if sinks is None else [float(sinks[h])]
            if not logits + sink:
                continue
            if any(math.isnan(x) for x in logits):
                out[i, h], lse[i, h] = math.nan, math.nan
                continue
            top = max(logits + sink)
            weights = [math.exp(x - top) for x in logits]
            total = sum(weights) + sum(math.exp(x - top) for x in sink)
            for j, weight in zip(seen, weights, strict=True):
                out[i, h] += weight / total * values[j, kv_head]
            lse[i, h] = top + math.log(total)
    return torch.from_numpy(out), torch.from_numpy(lse)


@dataclass
class Batch:
    """Ragged sequences in pages, and what the pages stand for.

    Attributes:
        fmt, channels: the format and its outlier channels.
        pages, block_table, seq_lens: arguments of the operations. Pages lie in random order; everything that no token owns is
            0xFF (NaN scales); unused entries of the block table are -1 or 2**31 - 1.
        k, v: per sequence, [L, heads, d] float64, `through_codec`.
        slots: per sequence, [L] int64, the slot of every token.
    """

    fmt: KVFormat
    channels: Tensor | None
    pages: Tensor
    block_table: Tensor
    seq_lens: Tensor
    k: list[Tensor]
    v: list[Tensor]
    slots: list[Tensor]

    @property
    def layout(self) -> PageLayout:
        return PageLayout.of(self.fmt, PageLayout.page_size_of(self.fmt, self.pages.shape[2]))

    def put(self, sequence: int, position: int, side: Side, value: float) -> None:
        """Makes one channel of one stored vector `value` (NaN or infinity), in the pages and in k or v, in all heads."""
        x = {"k": self.k, "v": self.v}[side][sequence][position : position + 1].float()
        x[..., 1] = value
        kv = [x if s == side else self.sides(s)[sequence][position : position + 1].float() for s in SIDES]
        on_host = self.pages.cpu()
        before = self.layout.read(on_host, "v" if side == "k" else "k")
        reference_store(*kv, on_host, self.slots[sequence][position : position + 1], **self.format_options("cpu"))
        self.layout.write(on_host, "v" if side == "k" else "k", before)  # the other side keeps its first codes
        self.pages.copy_(on_host)
        self.sides(side)[sequence][position] = math.nan

    def sides(self, side: Side) -> list[Tensor]:
        return self.k if side == "k" else self.v

    def format_options(self, device: torch.device | str | None = None) -> dict[str, object]:
        channels = None if self.channels is None else self.channels.to(device or self.pages.device)
        return {"fmt": self.fmt, "outlier_channels": channels}


def batch_of(
    fmt: KVFormat,
    lengths: Sequence[int],
    *,
    heads: int = 2,
    page_size: int = 16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    spare_pages: int = 2,
) -> Batch:
    """A batch of sequences with normal keys and values, stored by the reference so that every backend reads the same codes."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts) + spare_pages, generator=generator)
    pages = torch.full((len(order), heads, fmt.page_bytes(page_size)), 0xFF, dtype=torch.uint8)
    table = torch.full((len(lengths), max(counts, default=0) + 1), -1, dtype=torch.int32)
    table[:, -1] = 2**31 - 1
    channels = channels_for(fmt, heads, seed)
    k, v, slots, used = [], [], [], 0
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[b, :count] = order[used : used + count]
        used += count
        raw = torch.randn(2, length, heads, fmt.head_dim, generator=generator)
        position = torch.arange(length)
        slots.append(table[b].long()[position // page_size] * page_size + position % page_size)
        reference_store(*raw, pages, slots[b], fmt=fmt, outlier_channels=channels)
        k.append(through_codec(raw[0], fmt, "k", channels))
        v.append(through_codec(raw[1], fmt, "v", channels))
    lens = torch.tensor(lengths, dtype=torch.int32)
    on_device = None if channels is None else channels.to(device)
    return Batch(fmt, on_device, pages.to(device), table.to(device), lens.to(device), k, v, slots)


def decode_oracle(
    q: Tensor,
    batch: Batch,
    *,
    scale: float,
    q_lens: Sequence[int] | None = None,
    seq_starts: Sequence[int] | None = None,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`kvturbo.ops.decode` by `attention_oracle`, on the host: out [T, num_q_heads, d] and lse, padding rows included."""
    q = q.cpu()
    sinks = None if sinks is None else sinks.cpu()
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    if sinks is not None:
        lse[:] = sinks.double()
    row = 0
    for b, (k, v) in enumerate(zip(batch.k, batch.v, strict=True)):
        n = 1 if q_lens is None else q_lens[b]
        rows = slice(row, row + n)
        row += n
        if len(k):
            start = 0 if seq_starts is None else seq_starts[b]
            options = {"window": window, "seq_start": start, "soft_cap": soft_cap, "sinks": sinks}
            out[rows], lse[rows] = attention_oracle(q[rows], k, v, scale=scale, first=len(k) - n, **options)
    return out, lse


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| (Frobenius) over what is finite; NaN and infinities must lie in the same places."""
    got, wanted = got.double().cpu(), wanted.double().cpu()
    finite = wanted.isfinite()
    torch.testing.assert_close(got[~finite], wanted[~finite], equal_nan=True)
    assert got[finite].isfinite().all(), "not finite where the oracle is"
    return float((got - wanted)[finite].norm() / wanted[finite].norm().clamp(min=1e-30))


def ints(values: Sequence[int] | None, device: torch.device | str) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same bytes; NaN equals itself."""
    if a is None or b is None:
        return a is b
    a, b = a.cpu().contiguous(), b.cpu().contiguous()
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def vectors_equal(a: Packed, b: Packed) -> Tensor:
    """Per vector, whether all fields have the same bits: a and b of shape [...] -> [...] bool."""
    equal = torch.ones(a.codes.shape[:-1], dtype=torch.bool)
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            x, y = x.cpu().contiguous().view(torch.uint8), y.cpu().contiguous().view(torch.uint8)
            equal &= (x == y).reshape(*equal.shape, -1).all(-1)
    return equal
