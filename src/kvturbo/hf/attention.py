"""The attention implementation `kvturbo` and its mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, prepare_padding_mask, sdpa_mask

from kvturbo.hf.compute import Scoring, attend_dense, attend_packed
from kvturbo.hf.layer import ATTENTION, take_staged


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer: over packed pages if a TurboCache has packed it, as transformers' `sdpa` does it otherwise.

    Args:
        module: the attention module; its `layer_idx` says which layer this is.
        query: [batch, query heads, count, d].
        key, value: what the cache's `update` returned.
        attention_mask: what `attention_mask` of this file made.
        scaling: factor on the scores, by default d ** -0.5.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [query heads], a logit per head without a value.

    Returns:
        [batch, count, query heads, d], and None for the weights.

    Raises:
        OutOfPagesError: max_tokens of the cache is too small; nothing has been stored.
        ValueError: dropout, a position bias or a sliding window is asked of a packed layer, or a mask can't be followed.
    """
    staged = take_staged(getattr(module, "layer_idx", None))
    if staged is None:
        return _attend_stock(
            module, query, key, value, attention_mask, dropout, scaling, softcap=softcap, s_aux=s_aux, **kwargs
        )
    _refuse(staged.layer.layer_idx, dropout=dropout, **kwargs)
    scoring = _scoring(query, scaling, softcap, s_aux)
    return attend_packed(staged, query, attention_mask, scoring).contiguous(), None


@contextmanager
def attending_with(model: Any, name: str, forward: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Registers an attention implementation and its mask, and has the model use them for a while.

    Args:
        model: a model of transformers.
        name: of the implementation.
        forward, mask: as transformers' `AttentionInterface` and `AttentionMaskInterface` take them.
    """
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask for `attend`: of plain causal attention only the padding, [batch, kv_length] bool; otherwise that of `sdpa`.

    None means causal without padding, and then q_length is 1 or kv_length. Nothing of size q_length x kv_length is made
    for causal attention.
    """
    plain = mask_function is causal_mask_function and local_size is None and kwargs.get("allow_is_causal_skip", True)
    grows = isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
    if not (plain and grows):
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, **kwargs
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and not bool(padding.all()):
        return padding[:, :kv_length]
    if q_length in (1, kv_length):
        return None
    return torch.ones(1, 1, dtype=torch.bool, device=kwargs.get("device", "cpu")).expand(batch_size, kv_length)


def register() -> None:
    """Makes `kvturbo` known to transformers, as attention and as mask."""
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, attention_mask)


def _refuse(layer_idx: int, **kwargs: Any) -> None:
    for name in ("dropout", "position_bias", "sliding_window"):
        value = kwargs.get(name)
        if value is not None and not (name == "dropout" and value == 0):
            shown = list(value.shape) if isinstance(value, Tensor) else value
            raise ValueError(f"layer {layer_idx} is packed, and packed layers don't support {name} (got {shown})")


def _attend_stock(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    *,
    softcap: float | None,
    s_aux: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """A layer that is not packed. `sdpa` knows neither soft caps nor sinks; those are computed plainly."""
    if mask is not None and mask.dim() == 2:
        mask = _full_mask(mask, query.shape[2])
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    if mask is None:
        mask = _full_mask(torch.ones(len(key), key.shape[2], dtype=torch.bool, device=key.device), query.shape[2])
    return attend_dense(query, key, value, mask, _scoring(query, scaling, softcap, s_aux)), None


def _scoring(query: Tensor, scaling: float | None, softcap: float | None, s_aux: Tensor | None) -> Scoring:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return Scoring(scale, softcap, None if s_aux is None else s_aux.float())


def _full_mask(padding: Tensor, q_length: int) -> Tensor:
    """Causal mask [batch, 1, q_length, columns] with padding [batch, columns]."""
    columns = padding.shape[1]
    causal = torch.ones(q_length, columns, dtype=torch.bool, device=padding.device).tril(columns - q_length)
    return causal & padding[:, None, None, :]
