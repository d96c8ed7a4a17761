"""Teacher-forced scoring of whole texts in chunks, in one forward pass, with a codec in place of a cache.

A chunk's queries see the raw keys and values of their own chunk, as a prefill does, the windows in 16 bits, and what the
codec gives back for everything before. All chunks of a layer depend on the layer below only, so a layer computes them one
after another and the model runs once: the same numbers as feeding the chunks to a cache one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvturbo.config import SIDES, Side
from kvturbo.eval.codec import Codec
from kvturbo.eval.scoring import chunks
from kvturbo.hf.attention import attending_with

NAME = "kvturbo_simulation"

Observe = Callable[[int, Tensor, Tensor, Tensor], None]
Prefix = dict[int, tuple[Tensor, Tensor]]
"""Layer -> raw keys and values [batch, KV heads, tokens, d] of a context that has been read before."""


@dataclass
class Simulation:
    """How the attention of a forward pass reads its keys and values.

    Attributes:
        codec: what the cache is; None is the 16-bit cache.
        first, chunk: tokens of the first chunk and of all others. With a prefix every chunk has `chunk` tokens.
        heads: layer -> [KV heads] bool, which are packed; None: all of them.
        sides: which of keys and values are packed.
        prefix: a context before the tokens.
        keep: keep the raw keys and values of the pass in `kept`.
        observe: called with (layer, queries, keys, values) of every layer.
        raw_dtype: what raw keys and values are rounded to, as an engine holds them; None leaves them as they are.
        packed_tokens_read: of tokens from earlier chunks that came from the codec, summed over rows, layers and chunks.
    """

    codec: Codec | None = None
    first: int = 1 << 30
    chunk: int = 1 << 30
    heads: dict[int, Tensor] | None = None
    sides: Sequence[Side] = SIDES
    prefix: Prefix | None = None
    keep: bool = False
    observe: Observe | None = None
    raw_dtype: torch.dtype | None = torch.bfloat16
    kept: Prefix = field(default_factory=dict)
    packed_tokens_read: int = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of one layer: q [B, Hq, T, d], k and v [B, H, T, d] -> [B, Hq, T, d]."""
        k, v = self._rounded(k), self._rounded(v)
        if self.observe is not None:
            self.observe(layer, q, k, v)
        if self.keep:
            dtype = self.raw_dtype or k.dtype
            self.kept[layer] = k.to(dtype), v.to(dtype)
        if self.prefix is not None:
            k, v = (torch.cat((old.to(new), new), 2) for old, new in zip(self.prefix[layer], (k, v), strict=True))
        offset = k.shape[2] - q.shape[2]
        bounds = [(offset + a, offset + b) for a, b in self.bounds(q.shape[2])]
        restored = self._restored(layer, k, v, bounds[-1][0])
        pieces = []
        for start, stop in bounds:
            packed = (0, 0) if self.codec is None else self.codec.packed_range(start, layer)
            keys, values = (_seen(raw, back, packed, stop) for raw, back in zip((k, v), restored, strict=True))
            pieces.append(_attend_chunk(q[:, :, start - offset : stop - offset], keys, values, scale))
            self.packed_tokens_read += len(q) * (packed[1] - packed[0])
        return torch.cat(pieces, 2)

    def bounds(self, tokens: int) -> list[tuple[int, int]]:
        """First token and one past the last of every chunk of a pass."""
        first = min(self.first if self.prefix is None else self.chunk, tokens)
        return [(0, first)] + [(first + a, first + b) for a, b in chunks(tokens - first, self.chunk)]

    def _rounded(self, x: Tensor) -> Tensor:
        return x if self.raw_dtype is None else x.to(self.raw_dtype).to(x.dtype)

    def _restored(self, layer: int, k: Tensor, v: Tensor, tokens: int) -> list[Tensor | None]:
        """What the codec gives back for the tokens that any chunk reads, None for a side that is not packed."""
        first, stop = (0, 0) if self.codec is None else self.codec.packed_range(tokens, layer)
        if self.codec is None or first == stop:
            return [None, None]
        chosen = None if self.heads is None else self.heads[layer].to(k.device)
        if chosen is not None and not bool(chosen.any()):
            return [None, None]
        restored: list[Tensor | None] = []
        for side, raw in zip(SIDES, (k, v), strict=True):
            if side not in self.sides:
                restored.append(None)
                continue
            back = self.codec.restore(raw[:, :, :tokens].float(), side, layer).to(raw.dtype)
            restored.append(
                back if chosen is None else torch.where(chosen[None, :, None, None], back, raw[:, :, :tokens])
            )
        return restored


def _seen(raw: Tensor, restored: Tensor | None, packed: tuple[int, int], stop: int) -> Tensor:
    """The first `stop` of the raw tokens, those of the packed range as the codec gives them back."""
    if restored is None:
        return raw[:, :, :stop]
    begin, end = packed
    return torch.cat((raw[:, :, :begin], restored[:, :, begin:end], raw[:, :, end:stop]), 2)


_CURRENT: ContextVar[Simulation | None] = ContextVar("simulation", default=None)


@contextmanager
def simulated(model: Any, simulation: Simulation) -> Iterator[Simulation]:
    """Lets the model's attention read its keys and values as the simulation says."""
    token = _CURRENT.set(simulation)
    try:
        with attending_with(model, NAME, _attention, _no_mask):
            yield simulation
    finally:
        _CURRENT.reset(token)


@torch.inference_mode()
def run(model: Any, ids: Tensor, simulation: Simulation, start: int = 0) -> Tensor:
    """One forward pass.

    Args:
        model: a causal language model of transformers whose layers all have full attention.
        ids: [B, T] int64, rows of equal length without padding.
        simulation: how attention reads keys and values; its counts go up.
        start: rows of logits before this one are not computed.

    Returns:
        Logits [B, T - start, V].
    """
    offset = 0 if simulation.prefix is None else next(iter(simulation.prefix.values()))[0].shape[2]
    positions = torch.arange(offset, offset + ids.shape[1], device=ids.device)[None]
    with simulated(model, simulation):
        return model(ids, position_ids=positions, use_cache=False, logits_to_keep=ids.shape[1] - start).logits


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    simulation = _CURRENT.get()
    if simulation is None:
        raise RuntimeError(f"attention {NAME!r} is only for kvturbo.eval.simulation.run")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"a simulated cache does not support {name} (got {kwargs[name]})")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return simulation.attend(layer, query, key, value, scale).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Simulations make their own masks."""


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, Hq, n, d] at the end of k and v [B, H, t, d]; the query heads of a group are rows of one KV head."""
    batch, heads, n, d = q.shape
    kv_heads, t = k.shape[1], k.shape[2]
    group = heads // kv_heads
    if n == t:  # causal without a mask: half of the work
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale)
    seen = torch.ones(n, t, dtype=torch.bool, device=q.device).tril(t - n).repeat(group, 1)
    rows = q.reshape(batch, kv_heads, group * n, d)
    out = F.scaled_dot_product_attention(rows, k, v, seen, scale=scale)
    return out.reshape(batch, heads, n, d)
