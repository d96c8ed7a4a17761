"""Second moments of a layer's queries, keys and values by channel: what a quantiser's error follows from.

From weights alone they are those for white inputs of unit variance, which is what a norm makes of its input on average: a
channel of W x + b has b^2 + |row of W g|^2, with g the gains of the norm before it. Where keys and queries are normalised
afterwards (Qwen3), a channel has the square of that norm's gain. A calibration text gives the true ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvturbo.outliers import Pairing, rope_pairs

_KEY = re.compile(r"(?P<layer>.*layers\.(?P<index>\d+)\.)(?P<attention>\w+\.)k_proj\.weight")
_OTHER_MODALITY = re.compile(r"vision|visual|audio")
_GAIN_PLUS_ONE = {
    "gemma", "gemma2", "gemma3", "vaultgemma", "recurrent_gemma", "qwen3_next", "qwen3_5", "qwen3_5_moe", "step3p5", "step3p7",
}  # fmt: skip
"""Model types whose norms multiply by 1 + weight, without the `_text` of multimodal models' language models."""


def gain_plus_one(model_type: str) -> bool:
    """Whether the norms of a model type multiply by 1 + weight; the type as in a model's config.json."""
    return model_type.removesuffix("_text") in _GAIN_PLUS_ONE


@dataclass(frozen=True)
class LayerMoments:
    """Moments over tokens, by KV head and channel: [num_kv_heads, head_dim] float64 each, on the CPU.

    Attributes:
        key: E[k^2].
        query: E[q^2], mean over the query heads of the group.
        value: E[v^2].
        value_mean: E[v].
        pairing, rotary_dim: which channels RoPE turns together, see `kvturbo.outliers.rope_pairs`.
    """

    key: Tensor
    query: Tensor
    value: Tensor
    value_mean: Tensor
    pairing: Pairing = "half"
    rotary_dim: int | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.key.shape[0]

    @property
    def head_dim(self) -> int:
        return self.key.shape[1]

    @property
    def pairs(self) -> Tensor:
        """[head_dim / 2, 2] int64."""
        return rope_pairs(self.head_dim, self.pairing, self.rotary_dim)


def moments_of_folder(folder: str | Path, *, pairing: Pairing = "half") -> dict[int, LayerMoments]:
    """Moments of a checkpoint folder's full-attention layers, by layer index. Only the tensors that are needed are read.

    Args:
        folder: holds `config.json` and safetensors files.
        pairing: see `rope_pairs`.

    Raises:
        FileNotFoundError: there is no configuration or no safetensors file.
        ValueError: a file is damaged, or as `moments_of_weights`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {folder}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors file in {folder}")
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = dict(_wanted_tensors(files))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is damaged: {error}") from error
    return moments_of_weights(weights, config, pairing=pairing)


def moments_of_weights(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], *, pairing: Pairing = "half"
) -> dict[int, LayerMoments]:
    """Moments of the full-attention layers from their weights, by layer index.

    Args:
        weights: tensors by checkpoint name, such as `model.layers.0.self_attn.k_proj.weight`.
        config: the model's configuration as in `config.json`.
        pairing: see `rope_pairs`.

    Raises:
        ValueError: a full-attention layer has no `k_proj`, or a shape does not fit the configuration.
    """
    text = config.get("text_config") or config
    found = {}
    for name in weights:
        match = _KEY.fullmatch(name)
        if match and not _OTHER_MODALITY.search(name):
            found[int(match["index"])] = match
    wanted = full_attention_layers(text)
    missing = [i for i in wanted if i not in found]
    if missing:
        raise ValueError(
            f"layers {missing} have no k_proj, so nothing can be said from the weights; use a calibration text"
        )
    return {i: _layer(weights, text, found[i]["layer"], found[i]["attention"], pairing) for i in wanted}


def full_attention_layers(config: Mapping[str, Any]) -> list[int]:
    """Indices of the layers that attend to everything, from a configuration as in `config.json`."""
    kinds = config.get("layer_types") or ["full_attention"] * int(config["num_hidden_layers"])
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def rotary_dim_of(config: Mapping[str, Any], head_dim: int) -> int:
    """Channels that RoPE turns, from a configuration as in `config.json`."""
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get("full_attention", parameters)  # some models have them by kind of layer
    factor = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return int(head_dim * factor)


def _wanted_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    ends = tuple(f"{x}_{kind}" for x in "qkv" for kind in ("proj.weight", "proj.bias", "norm.weight"))
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith((*ends, "input_layernorm.weight")):
                    yield name, file.get_tensor(name)


def _layer(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], layer: str, attention: str, pairing: Pairing
) -> LayerMoments:
    prefix = layer + attention
    heads = int(config["num_attention_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    gain = _gain(weights, config, layer + "input_layernorm")
    k, v = (_projected(weights, f"{prefix}{side}_proj", gain, head_dim) for side in "kv")
    normed_k, normed_q = (_normed(weights, config, f"{prefix}{side}_norm", head_dim) for side in "kq")
    if normed_k is not None:
        k = normed_k.expand_as(k) if normed_k.shape[0] == 1 else normed_k
    q = normed_q if normed_q is not None else _projected(weights, f"{prefix}q_proj", gain, head_dim)
    if q.shape[0] > 1 and q.shape[0] % k.shape[0]:
        raise ValueError(f"{prefix}q_proj has {q.shape[0]} heads, which {k.shape[0]} KV heads can't share")
    q = q.expand_as(k) if q.shape[0] == 1 else q.view(k.shape[0], -1, head_dim).mean(1)
    bias = weights.get(f"{prefix}v_proj.bias")
    mean = torch.zeros_like(v) if bias is None else bias.detach().double().cpu().view_as(v)
    return LayerMoments(k, q, v, mean, pairing, rotary_dim_of(config, head_dim))


def _projected(weights: Mapping[str, Tensor], name: str, gain: Tensor | None, head_dim: int) -> Tensor:
    """[heads, head_dim] of a projection W x + b."""
    if f"{name}.weight" not in weights:
        raise ValueError(f"the weights have no {name}.weight")
    weight = weights[f"{name}.weight"].detach().double().cpu()
    if weight.dim() != 2 or weight.shape[0] % head_dim:
        raise ValueError(f"{name}.weight must have a multiple of head_dim {head_dim} rows, got {list(weight.shape)}")
    moment = (weight if gain is None else weight * gain).square().sum(1)
    bias = weights.get(f"{name}.bias")
    if bias is not None:
        moment = moment + bias.detach().double().cpu().square()
    return moment.view(-1, head_dim)


def _normed(weights: Mapping[str, Tensor], config: Mapping[str, Any], name: str, head_dim: int) -> Tensor | None:
    """[1 or heads, head_dim] after a norm of the heads, None without one."""
    gain = _gain(weights, config, name)
    return None if gain is None else gain.square().view(-1, head_dim)


def _gain(weights: Mapping[str, Tensor], config: Mapping[str, Any], norm: str) -> Tensor | None:
    weight = weights.get(f"{norm}.weight")
    if weight is None:
        return None
    return weight.detach().double().cpu() + float(gain_plus_one(str(config.get("model_type"))))
