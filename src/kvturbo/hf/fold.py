"""Rewrites of a model's weights that leave its output as it is and make its keys and values easier to quantise.

*Key scales.* Both channels of a RoPE pair turn together, so keys may be multiplied by s and queries by 1 / s, pair by pair.
Where noise spreads evenly over the channels of a key, the error of the scores is least for s = sqrt(|q| / |k|) (equalised as in
SmoothQuant, Xiao et al. 2022, with alpha = 1/2, but between queries and keys). The factors go into `q_proj` and `k_proj`, or
into the gains of the norms that follow them. A constant in keys that no query looks at is scaled away with it.

*Value means.* The weights of attention sum to 1, so a constant taken from every value comes out of a head as it went in: it
goes from the bias of `v_proj` through `o_proj` into that one's bias.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kvturbo.guard.merit import LIMIT, key_excess, value_excess
from kvturbo.guard.moments import LayerMoments

_SMALLEST = 1e-12
"""Of the largest moment in a head: less is nothing."""


@torch.no_grad()
def fold(model: Any, moments: Mapping[int, LayerMoments], *, limit: float = LIMIT) -> Any:
    """A copy of a model that gives the same output, to rounding, from keys of even channels and values without a mean.

    Args:
        model: a decoder-only model with `q_proj`, `k_proj`, `v_proj` and `o_proj` in its attention modules.
        moments: by layer index; of a text (`kvturbo.hf.calibration.moments_of_text`), as weights know no mean of their inputs.
        limit: keys of layers whose key excess is above it are scaled, values of layers whose value excess is above it lose
            their mean (`kvturbo.guard`). Others stay as they are: measured on a model without outliers, scaling gains nothing.

    Returns:
        The copy. Where a value's mean was folded and the output's projection had no bias it has one now, which
        `from_pretrained` knows only for architectures whose configuration has `attention_bias`; that is set then.

    Raises:
        ValueError: a layer lacks such a projection, attends with sinks that have no value, or has other shapes.
    """
    folded = copy.deepcopy(model)
    modules = {getattr(m, "layer_idx", None): m for m in folded.modules() if hasattr(m, "k_proj")}
    means: list[int] = []
    for i, own in moments.items():
        if i not in modules or not all(hasattr(modules[i], f"{name}_proj") for name in "qkvo"):
            raise ValueError(f"layer {i} has no q_proj, k_proj, v_proj and o_proj, which folding needs")
        if bool((key_excess(own, "k4v4") > limit).any()):
            _fold_scales(modules[i], own)
        if bool((value_excess(own) > limit).any()):
            _fold_means(modules[i], own, i)
            means.append(i)
    if means and hasattr(folded.config.get_text_config(decoder=True), "attention_bias"):
        _complete_biases(folded, modules)
    return folded


def key_scales(moments: LayerMoments, alpha: float = 0.5) -> Tensor:
    """Factors on the keys, |q|^(1 - alpha) / |k|^alpha per RoPE pair, of geometric mean 1 in every head.

    Pairs without keys stay as they are. Keys of a pair that no query looks at (a bias there, say) become next to nothing: the
    query counts as the smallest that is told from zero, and the pair does not count in the mean.

    Args:
        moments: of the layer.
        alpha: 1/2 makes the scores' error least; 1 evens out the keys.

    Returns:
        [num_kv_heads, head_dim] float64.
    """
    key, query = (x.double()[:, moments.pairs].sum(-1) for x in (moments.key, moments.query))
    least_key, least_query = (_SMALLEST * x.amax(1, keepdim=True) for x in (key, query))
    kept = key > least_key
    log = torch.where(kept, 0.5 * ((1 - alpha) * _log(query.maximum(least_query)) - alpha * _log(key)), torch.nan)
    mean = log.where(query > least_query, torch.nan).nanmean(1, keepdim=True)
    scale = torch.ones_like(moments.key, dtype=torch.float64)
    scale[:, moments.pairs.flatten()] = (log - mean).nan_to_num(0.0).exp().repeat_interleave(2, 1)
    return scale


def _log(x: Tensor) -> Tensor:
    return x.clamp(min=1e-300).log()


def _fold_scales(attention: Any, moments: LayerMoments) -> None:
    norms = [norm for name in ("q_norm", "k_norm") if (norm := getattr(attention, name, None)) is not None]
    if not norms:
        scale = key_scales(moments)
        group = attention.q_proj.weight.shape[0] // scale.numel()
        _scale_rows(attention.k_proj, scale)
        _scale_rows(attention.q_proj, 1 / scale.repeat_interleave(group, 0))
    elif len(norms) == 2 and all(norm.weight.shape == (moments.head_dim,) for norm in norms):
        pooled = replace(moments, key=moments.key.mean(0, keepdim=True), query=moments.query.mean(0, keepdim=True))
        scale = key_scales(pooled)[0]
        _scale_gain(norms[0], 1 / scale)
        _scale_gain(norms[1], scale)
    else:
        raise ValueError("norms over all heads of queries and keys can't take scales of their own per head")


def _scale_gain(norm: Any, scale: Tensor) -> None:
    """Multiplies a norm's gains by scale [head_dim]."""
    gain = norm(torch.ones_like(norm.weight)[None])[0].double()
    offset = (gain - norm.weight).round()  # some norms multiply by 1 + weight
    norm.weight.copy_(gain * scale.to(gain.device) - offset)


def _scale_rows(projection: nn.Linear, scale: Tensor) -> None:
    """Multiplies the rows of a projection by scale [heads, head_dim]."""
    rows = scale.flatten().to(projection.weight.device)
    projection.weight.copy_(projection.weight.double() * rows[:, None])
    if projection.bias is not None:
        projection.bias.copy_(projection.bias.double() * rows)


def _fold_means(attention: Any, moments: LayerMoments, layer: int) -> None:
    if getattr(attention, "sinks", None) is not None:
        raise ValueError(
            f"layer {layer} has attention sinks: its weights don't sum to 1, so means of values can't be folded"
        )
    mean = moments.value_mean.double().to(attention.v_proj.weight.device)
    value, out = _with_bias(attention.v_proj), _with_bias(attention.o_proj)
    group = attention.o_proj.weight.shape[1] // mean.numel()
    value.copy_(value.double() - mean.flatten())
    out.copy_(out.double() + attention.o_proj.weight.double() @ mean.repeat_interleave(group, 0).flatten())


def _with_bias(projection: Any) -> Tensor:
    if projection.bias is None:
        projection.bias = nn.Parameter(projection.weight.new_zeros(projection.weight.shape[0]), requires_grad=False)
    return projection.bias


def _complete_biases(model: Any, modules: Mapping[Any, Any]) -> None:
    """Zero biases for the projections without one, as `attention_bias` stands for all of them."""
    for attention in modules.values():
        for name in "qkvo":
            _with_bias(getattr(attention, f"{name}_proj"))
    model.config.get_text_config(decoder=True).attention_bias = True
