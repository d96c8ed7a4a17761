"""Outlier channels of a layer's keys, from the guard's plan beside the model or else from the checkpoint: vLLM knows a
layer's name, and both are found by it.

Every rank reads the plan, or the key projection of its layers, chooses channels for all heads, and keeps those of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.guard import PLAN_FILE, Plan, read_plan
from kvturbo.guard.moments import gain_plus_one
from kvturbo.outliers import Pairing, choose_outlier_channels

INTERLEAVED = (
    "chatglm", "codegen", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "ernie4_5_vl_moe", "glm", "glm4",
    "glm4v", "glm_ocr", "gptj",
)  # fmt: skip
"""Model types whose RoPE turns neighbouring channels, without the `_text` of multimodal models' language models."""
SPIKED_SHARE = 0.6
"""A head whose 16 strongest channels hold more than this share of the second moment needs `-o16`: white keys have 0.13 to 0.25."""
_DENSE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_ATTENTION = re.compile(r"^(layers\.\d+\.)(?:\w+\.)?(k_(?:proj|norm)\.\w+)$")
"""What some models (gpt-oss, Jamba) call attention in vLLM, but not in their checkpoints, where it is `self_attn`."""
_TOWERS = re.compile(r"(^|\.)(vision|visual|audio|image|speech)")


@dataclass(frozen=True)
class KeyWeights:
    """What is known of a layer's keys before any of them exists.

    Attributes:
        second_moment: [num_kv_heads, head_dim] fp64 of all heads of the model, for white inputs with unit variance.
        biased: whether a constant is added to the keys.
    """

    second_moment: Tensor
    biased: bool

    def spiked_share(self, count: int = 16) -> float:
        """The largest share of a head's second moment in its `count` strongest channels."""
        top = self.second_moment.topk(min(count, self.second_moment.shape[1]), -1).values.sum(-1)
        return float((top / self.second_moment.sum(-1).clamp(min=1e-30)).max())


class Checkpoint:
    """The safetensors of a model's folder.

    Args:
        folder: where they lie.

    Raises:
        FileNotFoundError: there are none.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        if not self._files:
            raise FileNotFoundError(f"no safetensors in {folder}")

    def _name(self, suffix: str) -> str | None:
        for end in (suffix, _ATTENTION.sub(r"\1self_attn.\2", suffix)):
            names = [name for name in self._files if name.endswith("." + end) or name == end]
            names = [name for name in names if not _TOWERS.search(name)]
            if names:
                return min(names, key=lambda name: (name.startswith("mtp."), len(name)))
        return None

    def biased(self, layer_name: str) -> bool:
        """Whether a constant is added to a layer's keys; reads no weights."""
        return self._name(f"{_module(layer_name)}.k_proj.bias") is not None

    def find(self, suffix: str) -> Tensor | None:
        """The language model's tensor whose name ends with a suffix that begins at a layer, or None."""
        name = self._name(suffix)
        if name is None:
            return None
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def key_weights(self, layer_name: str, num_kv_heads: int, head_dim: int, unit_offset: bool) -> KeyWeights:
        """The key projection of a layer.

        Args:
            layer_name: vLLM's, such as `model.layers.3.self_attn.attn`.
            num_kv_heads: of the whole model.
            head_dim: channels of a key.
            unit_offset: whether norms multiply by 1 + weight.

        Raises:
            ValueError: the checkpoint has no `k_proj` for the layer, or not in numbers.
        """
        module = _module(layer_name)
        gain = self.find(f"{module}.k_norm.weight")
        if gain is not None and gain.numel() == head_dim:
            moment = (gain.double() + unit_offset).square()
            return KeyWeights(moment.expand(num_kv_heads, -1), biased=False)
        weight, bias = self._projection(f"{module}.k_proj"), self.find(f"{module}.k_proj.bias")
        if weight is None or weight.shape[0] != num_kv_heads * head_dim:
            raise ValueError(
                f"kvturbo: the checkpoint has no {module}.k_proj.weight of {num_kv_heads} heads, in 16 bits or more or in fp8 or "
                "int8 with a weight_scale; -o formats need it"
            )
        moment = weight.square().sum(1)
        if bias is not None:
            moment = moment + bias.double().square()
        return KeyWeights(moment.view(num_kv_heads, head_dim), biased=bias is not None)

    def _projection(self, name: str) -> Tensor | None:
        """A projection's weights [out, in] in fp64, those of 8 bits times their scales; None if there are none like that."""
        weight = self.find(f"{name}.weight")
        if weight is None or weight.ndim != 2:
            return None
        if weight.dtype in _DENSE:
            return weight.double()
        scale = self.find(f"{name}.weight_scale")
        scale = self.find(f"{name}.weight_scale_inv") if scale is None else scale
        if scale is None or weight.dtype not in _EIGHT_BIT:
            return None
        scale = scale.double().view(-1, 1) if scale.ndim < 2 else scale.double()  # of the whole, of rows, or of blocks
        if any(size % count for size, count in zip(weight.shape, scale.shape, strict=True)):
            return None
        for side in range(2):
            scale = scale.repeat_interleave(weight.shape[side] // scale.shape[side], side)
        return weight.double() * scale


def _module(layer_name: str) -> str:
    """The module that a layer of vLLM belongs to, from `layers.` on: what comes before is not the same in every checkpoint."""
    return layer_name[layer_name.find("layers.") :].rpartition(".")[0]


@lru_cache(maxsize=4)
def _checkpoint(folder: str) -> Checkpoint:
    return Checkpoint(Path(folder))


def checkpoint_of(model_config: Any, load_config: Any) -> Checkpoint:
    """The checkpoint that vLLM has loaded: a folder, or a repository in the local Hugging Face cache.

    Raises:
        FileNotFoundError: its safetensors are not on this machine.
    """
    folder = Path(model_config.model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(
            snapshot_download(
                model_config.model, revision=model_config.revision, cache_dir=load_config.download_dir,
                local_files_only=True,
            )
        )  # fmt: skip
    return _checkpoint(str(folder))


def model_of(layer: Any, vllm_config: Any) -> Any:
    """vLLM's model_config of the model that a layer belongs to: the draft model's for its layers."""
    return vllm_config.speculative_config.draft_model_config if layer.is_draft_layer else vllm_config.model_config


def outlier_channels(layer: Any, fmt: KVFormat, num_kv_heads: int, vllm_config: Any) -> Tensor:
    """The outlier channels of the heads of a layer that this rank has: [num_kv_heads, channels] int64.

    Args:
        layer: vLLM's attention layer, for its name and its model.
        fmt: an `-o` format.
        num_kv_heads: of this rank.
        vllm_config: vLLM's.

    Raises:
        FileNotFoundError, ValueError: the plan is not one for this model, or the checkpoint does not say which.
    """
    model = model_of(layer, vllm_config)
    total, parallel = model.get_total_num_kv_heads(), vllm_config.parallel_config
    # A model's own drafting layers lie in its folder and are counted from 0 again: the plan is not for them.
    drafts = layer.is_draft_layer and vllm_config.speculative_config.method != "draft_model"
    plan = None if drafts else plan_of(model)
    if plan is not None:
        chosen = planned_channels(plan, layer.layer_name, fmt, total, plan_path(model))
        return chosen[heads_of_rank(total, num_kv_heads, parallel.tensor_parallel_size, tensor_rank())]
    text = model.hf_text_config
    pairing: Pairing = "interleaved" if _family(text) in INTERLEAVED else "half"
    rotary = rotary_dim(text, fmt.head_dim)
    if vllm_config.load_config.load_format == "dummy":  # random weights have no outliers: any channels will do
        moment = torch.ones(num_kv_heads, fmt.head_dim)
        return choose_outlier_channels(moment, fmt.channel_count, pairing=pairing, rotary_dim=rotary)
    weights = checkpoint_of(model, vllm_config.load_config).key_weights(
        layer.layer_name, total, fmt.head_dim, unit_offset(text)
    )
    chosen = choose_outlier_channels(weights.second_moment, fmt.channel_count, pairing=pairing, rotary_dim=rotary)
    return chosen[heads_of_rank(total, num_kv_heads, parallel.tensor_parallel_size, tensor_rank())]


def _family(text_config: Any) -> str:
    return str(text_config.model_type).removesuffix("_text").removesuffix("_mtp")  # vLLM's name of a model's own drafts


def unit_offset(text_config: Any) -> bool:
    """Whether a model's norms multiply by 1 + weight."""
    return gain_plus_one(_family(text_config))


def plan_path(model_config: Any) -> Path:
    """Where the guard's plan of a model in a folder lies, if it has one."""
    return Path(model_config.model) / PLAN_FILE


@lru_cache(maxsize=4)
def _plan(path: Path) -> Plan:
    return read_plan(path)


def plan_of(model_config: Any) -> Plan | None:
    """The plan beside a model in a folder, or None.

    Raises:
        ValueError: the file is no valid plan.
    """
    path = plan_path(model_config)
    return _plan(path) if path.is_file() else None


def layer_number(layer_name: str) -> int | None:
    """A layer's index in its model, from vLLM's name of it."""
    number = _LAYER.search(layer_name)
    return int(number[1]) if number else None


def planned_channels(plan: Plan, layer_name: str, fmt: KVFormat, num_kv_heads: int, path: Path) -> Tensor:
    """The outlier channels that a plan has for a layer: [num_kv_heads, fmt.outliers] int64.

    Args:
        plan: from `path`.
        layer_name: vLLM's.
        fmt: an `-o` format.
        num_kv_heads: of the whole model.

    Raises:
        ValueError: the plan has none for this layer, or is for another shape.
    """
    number = layer_number(layer_name)
    entry = None if number is None else plan.layers.get(number)
    if entry is None:
        raise ValueError(f"kvturbo: {path} has no layer for {layer_name}; it has {', '.join(map(str, plan.layers))}")
    if (entry.num_kv_heads, entry.head_dim) != (num_kv_heads, fmt.head_dim):
        raise ValueError(
            f"kvturbo: {path} is for another model: layer {number} has {entry.num_kv_heads} KV heads of {entry.head_dim} there, "
            f"{num_kv_heads} of {fmt.head_dim} here"
        )
    if fmt.outliers not in entry.channels:
        raise ValueError(
            f"kvturbo: {path} has no {fmt.outliers} outlier channels for layer {number}, but {sorted(entry.channels)}; write it "
            "again with kvturbo check"
        )
    return torch.tensor(entry.channels[fmt.outliers], dtype=torch.int64)


def source_of_channels(model_config: Any, load_config: Any) -> str:
    """Where `outlier_channels` takes them from, for people."""
    if plan_of(model_config) is not None:
        return str(plan_path(model_config))
    return "nowhere (random weights)" if load_config.load_format == "dummy" else "the keys' weights in the checkpoint"


def heads_of_rank(total: int, count: int, ranks: int, rank: int) -> Sequence[int]:
    """Which KV heads of the model a tensor-parallel rank has, where there are fewer heads than ranks shared by several."""
    if count == total:  # not sharded, as a draft model may be
        return list(range(total))
    first = rank * count if total >= ranks else rank * total // ranks
    return list(range(first, first + count))


def tensor_rank() -> int:
    """This process's tensor-parallel rank."""
    from vllm.distributed import get_tensor_model_parallel_rank

    rank: int = get_tensor_model_parallel_rank()
    return rank


def rotary_dim(text_config: Any, head_dim: int) -> int:
    """Channels that RoPE turns."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    parameters = parameters.get("full_attention", parameters)  # some models have them by kind of layer
    factor = parameters.get("partial_rotary_factor") or getattr(text_config, "partial_rotary_factor", None) or 1.0
    return int(head_dim * factor)
