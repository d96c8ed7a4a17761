"""Models whose cache is hard to quantise and whose output is that of the model they are made from, to rounding.

Real models have a few key channels far larger than the rest (a constant `k_proj.bias` in Qwen2 and Qwen2.5, uneven channel
scales elsewhere) and values with a mean. The embedded model has none of that, so each case rewrites its weights without
changing its function, and what a packed cache loses on the case but not on the model is the outliers' doing.

    PYTHONPATH=src python models/hard_cases.py --case key-bias --out build/hard/key-bias
"""

from __future__ import annotations

import argparse
import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvturbo.config import HEAD_DIMS

BIASED_PAIRS = 4
BIAS_RATIO = 10.0
"""Norm of the key bias over the root mean square norm of the keys; Qwen2.5-7B has 605 and 921 over about 22 in two layers."""
SCALE_SIGMA = 1.0
LARGE_PAIRS, LARGE_SCALE = 2, 12.0
VALUE_RATIO = 4.0
"""Norm of the constant added to values over the root mean square norm of the values."""


def key_bias(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A large constant in four RoPE pairs of the keys of the first and the last layer, where no query looks.

    The pairs are those that `widen` adds: queries are zero there, so any constant leaves every score as it is. Compare
    with `widen(model)`, which has the same head_dim.
    """
    case = widen(model)
    generator = torch.Generator().manual_seed(seed)
    heads, head_dim = case.config.num_key_value_heads, case.config.head_dim
    old = model.config.head_dim // 2
    for attention in (case.model.layers[0].self_attn, case.model.layers[-1].self_attn):
        bias = attention.k_proj.bias.data.view(heads, 2, head_dim // 2)
        for head in range(heads):
            pairs = old + torch.randperm(head_dim // 2 - old, generator=generator)[:BIASED_PAIRS]
            direction = torch.randn(2, BIASED_PAIRS, generator=generator)
            norm = BIAS_RATIO * _rms_norm(attention.k_proj.weight, _gain(case, attention), heads)[head]
            bias[head, :, pairs] += norm * direction / direction.norm()
    return case


def key_scale(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Keys with uneven channels, both of a RoPE pair alike, and queries with the inverse.

    Pair p of KV head h is multiplied by s, lognormal with sigma 1 and for two pairs 12 times as much, and pair p of every
    query head of its group by 1 / s; a pair's two channels turn together, so the product of the two is what it was.
    """
    case = rebuilt(model)
    generator = torch.Generator().manual_seed(seed)
    config = case.config
    heads, half = config.num_key_value_heads, config.head_dim // 2
    for layer in case.model.layers:
        scale = (SCALE_SIGMA * torch.randn(heads, half, generator=generator)).exp()
        for head in range(heads):
            scale[head, torch.randperm(half, generator=generator)[:LARGE_PAIRS]] *= LARGE_SCALE
        _scale_rows(layer.self_attn.k_proj, scale)
        _scale_rows(layer.self_attn.q_proj, 1 / scale.repeat_interleave(config.num_attention_heads // heads, 0))
    return case


def value_mean(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A constant added to the values of every head, and its image under `o_proj` taken from the output's bias.

    The weights of attention sum to 1, so the constant comes out of every head as it went in.
    """
    case = rebuilt(model)
    generator = torch.Generator().manual_seed(seed)
    config = case.config
    heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    for layer in case.model.layers:
        attention = layer.self_attn
        direction = torch.randn(heads, config.head_dim, generator=generator)
        norm = VALUE_RATIO * _rms_norm(attention.v_proj.weight, _gain(case, attention), heads)
        constant = direction / direction.norm(dim=1, keepdim=True) * norm[:, None]
        attention.v_proj.bias.data += constant.flatten()
        shift = attention.o_proj.weight.data.double() @ constant.repeat_interleave(group, 0).flatten().double()
        attention.o_proj.bias.data -= shift.float()
    return case


def widen(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with a larger head_dim, whose new RoPE pairs are zero in queries, keys and values.

    Frequencies are theta ** (-2 i / head_dim): theta ** (new / old) for the larger head_dim keeps the old ones for the first
    pairs. Scores are divided by sqrt(head_dim), so queries grow by sqrt(new / old).

    Raises:
        ValueError: there is no supported head_dim with `BIASED_PAIRS` pairs more.
    """
    old = model.config.head_dim
    new = next((d for d in HEAD_DIMS if d >= old + 2 * BIASED_PAIRS), None)
    if new is None:
        raise ValueError(f"head_dim must be less than {HEAD_DIMS[-1]} to be widened, got {old}")
    return rebuilt(model, new)


def rebuilt(model: PreTrainedModel, head_dim: int | None = None) -> PreTrainedModel:
    """A copy in fp32 whose attention has biases, and `head_dim` channels per head.

    Raises:
        ValueError: the model's configuration has no `attention_bias` or no plain RoPE.
    """
    config = copy.deepcopy(model.config)
    rope = getattr(config, "rope_parameters", None) or {}
    if not hasattr(config, "attention_bias") or rope.get("rope_type") != "default":
        raise ValueError(f"model must be a Llama with default RoPE, got {type(model).__name__} with {rope}")
    old, new = config.head_dim, head_dim or config.head_dim
    config.attention_bias, config.head_dim = True, new
    config.rope_parameters = rope | {"rope_theta": rope["rope_theta"] ** (new / old)}
    config.dtype = torch.float32
    case = type(model)(config).float().eval()
    state = {name: tensor.float() for name, tensor in model.state_dict().items()}
    own = case.state_dict()
    for name in own:
        own[name] = _placed(name, state[name], old, new) if name in state else torch.zeros_like(own[name])
    case.load_state_dict(own)
    with torch.no_grad():
        case.model.rotary_emb.inv_freq[: old // 2] = model.model.rotary_emb.inv_freq
    return case


CASES: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "key-bias": key_bias,
    "key-scale": key_scale,
    "value-mean": value_mean,
}
"""Name -> a function that returns a copy in fp32 with the same output as the model it is given."""
CONTROLS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {"key-bias": widen}
"""Name of a case -> the model of the same shape without what makes it hard; where there is none, the original."""


def _placed(name: str, tensor: Tensor, old: int, new: int) -> Tensor:
    """A projection's rows (of q, k, v) or columns (of o) put where the larger head_dim has them."""
    if new == old or "_proj" not in name or "self_attn" not in name:
        return tensor
    axis = 1 if "o_proj" in name and tensor.dim() == 2 else 0
    if "o_proj" in name and tensor.dim() == 1:
        return tensor
    x = tensor.movedim(axis, 0)
    wide = x.new_zeros(x.shape[0] // old, 2, new // 2, *x.shape[1:])
    wide[:, :, : old // 2] = x.view(x.shape[0] // old, 2, old // 2, *x.shape[1:])
    wide = wide.flatten(0, 2).movedim(0, axis).contiguous()
    return wide * (new / old) ** 0.5 if "q_proj" in name else wide


def _scale_rows(projection: torch.nn.Linear, scale: Tensor) -> None:
    """Multiplies both rows of every pair by scale [heads of the projection, pairs]."""
    rows = torch.cat((scale, scale), 1).flatten()
    projection.weight.data *= rows[:, None]
    projection.bias.data *= rows


def _gain(model: PreTrainedModel, attention: torch.nn.Module) -> Tensor:
    """Weights of the norm before the projections."""
    return model.model.layers[attention.layer_idx].input_layernorm.weight.data


def _rms_norm(weight: Tensor, gain: Tensor, heads: int) -> Tensor:
    """[heads] root mean square norm of a head's vectors for white inputs of the norm."""
    return (weight * gain).view(heads, -1).norm(dim=1).detach()


def main() -> None:
    """Makes a case and saves it as a model folder, tokenizer and texts included."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", required=True, choices=list(CASES))
    parser.add_argument("--model", type=Path, default=Path("models/kvturbo-12m"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--control", action="store_true", help="save what the case is compared with instead")
    arguments = parser.parse_args()
    source = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    make = CONTROLS.get(arguments.case, rebuilt) if arguments.control else CASES[arguments.case]
    make(source).save_pretrained(arguments.out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "retrieval.json", "heldout.txt"):
        shutil.copy(arguments.model / name, arguments.out / name)


if __name__ == "__main__":
    main()
