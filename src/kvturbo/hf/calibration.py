"""Moments of a model's queries, keys and values: from its weights, or from a forward pass over a text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from kvturbo.guard.moments import LayerMoments, moments_of_weights, rotary_dim_of
from kvturbo.hf.attention import attend, attending_with, attention_mask
from kvturbo.hf.geometry import full_attention_shapes, stock_layers
from kvturbo.outliers import Pairing

RECORDING = "kvturbo_recording"
"""Name of an attention implementation that looks at queries, keys and values and attends as the stock one does."""

Sums = dict[int, tuple[int, list[Tensor]]]
"""Layer index -> tokens, and sums over them: query^2, key^2, value^2 and value, [heads, head_dim] float64 each."""
_sums: ContextVar[Sums | None] = ContextVar("kvturbo_recording", default=None)


def moments_of_model(model: Any, *, pairing: Pairing = "half") -> dict[int, LayerMoments]:
    """Moments of the full-attention layers from the model's weights, see `kvturbo.guard.moments_of_weights`.

    Raises:
        ValueError: a layer has no `k_proj`.
    """
    return moments_of_weights(model.state_dict(), model.config.to_dict(), pairing=pairing)


@torch.no_grad()
def moments_of_text(model: Any, input_ids: Tensor, *, pairing: Pairing = "half") -> dict[int, LayerMoments]:
    """Moments of the full-attention layers on a text, in one forward pass.

    Args:
        model: a decoder-only model.
        input_ids: [rows, tokens] int64 without padding; some thousand tokens of ordinary text are plenty.
        pairing: which channels the model's RoPE turns together, see `kvturbo.outliers.rope_pairs`.

    Raises:
        ValueError: the model has no full-attention layer, or input_ids has another shape.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids must be [rows, tokens] with at least one token, got {list(input_ids.shape)}")
    shapes = full_attention_shapes(model.config, stock_layers(model.config))
    with _recording(model) as sums:
        model(input_ids=input_ids.to(next(model.parameters()).device), use_cache=False)
    text = model.config.get_text_config(decoder=True)
    found = {}
    for i, shape in shapes.items():
        tokens, own = sums[i]
        query, key, value, mean = (x.cpu() for x in own)
        rotary = rotary_dim_of(text.per_layer_config[i].to_dict(), shape.head_dim)
        grouped = query.view(shape.num_kv_heads, -1, shape.head_dim).mean(1)
        found[i] = LayerMoments(key / tokens, grouped / tokens, value / tokens, mean / tokens, pairing, rotary)
    return found


@contextmanager
def _recording(model: Any) -> Iterator[Sums]:
    sums: Sums = {}
    token = _sums.set(sums)
    try:
        with attending_with(model, RECORDING, _record, attention_mask):
            yield sums
    finally:
        _sums.reset(token)


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    sums = _sums.get()
    if sums is not None:
        q, k, v = (x.double() for x in (query, key, value))
        own = [q.square().sum((0, 2)), k.square().sum((0, 2)), v.square().sum((0, 2)), v.sum((0, 2))]
        sums[module.layer_idx] = key.shape[0] * key.shape[2], own
    return attend(module, query, key, value, *args, **kwargs)
