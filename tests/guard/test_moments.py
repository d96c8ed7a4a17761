"""Moments from weights are those that white inputs give, whatever the weights are called and wherever they lie."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvturbo.guard import LayerMoments, moments_of_folder, moments_of_weights

CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}  # fmt: skip
PREFIX = "model.layers.0."


def weights(prefix: str = PREFIX, biases: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"{prefix}input_layernorm.weight": 1 + 0.5 * torch.rand(32, generator=generator)}
    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        made[f"{prefix}self_attn.{name}_proj.weight"] = torch.randn(heads * 64, 32, generator=generator)
        if biases:
            made[f"{prefix}self_attn.{name}_proj.bias"] = 5 * torch.randn(heads * 64, generator=generator)
    return made


def test_moments_are_those_of_white_inputs() -> None:
    own = weights()
    moments = moments_of_weights(own, CONFIG)[0]
    x = torch.randn(20000, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x * own[f"{PREFIX}input_layernorm.weight"].double()

    def projected(name: str) -> torch.Tensor:
        weight, bias = (own[f"{PREFIX}self_attn.{name}_proj.{kind}"].double() for kind in ("weight", "bias"))
        return (x @ weight.T + bias).view(len(x), -1, 64)

    q, k, v = (projected(name) for name in "qkv")
    torch.testing.assert_close(moments.key, k.square().mean(0), rtol=0.06, atol=0)
    torch.testing.assert_close(moments.value, v.square().mean(0), rtol=0.06, atol=0)
    torch.testing.assert_close(moments.query, q.square().mean(0).view(2, 2, 64).mean(1), rtol=0.06, atol=0)
    torch.testing.assert_close(moments.value_mean, v.mean(0), rtol=0, atol=0.4)
    assert moments.rotary_dim == 64


def test_normalised_keys_and_queries_have_the_norms_gains() -> None:
    gains = torch.rand(2, 64, dtype=torch.float64)
    own = weights() | {f"{PREFIX}self_attn.k_norm.weight": gains[0], f"{PREFIX}self_attn.q_norm.weight": gains[1]}
    for model_type, offset in (("qwen3", 0), ("gemma3_text", 1), ("qwen3_5_moe_text", 1)):
        moments = moments_of_weights(own, CONFIG | {"model_type": model_type})[0]
        assert torch.equal(moments.key, (gains[0] + offset).square().expand(2, -1))
        assert torch.equal(moments.query, (gains[1] + offset).square().expand(2, -1))


def test_only_full_attention_layers_of_the_language_model_count() -> None:
    own = weights("model.language_model.layers.0.") | weights("model.language_model.layers.1.", biases=False)
    own |= {name.replace("language_model", "vision_tower"): x + 100 for name, x in own.items()}
    text = CONFIG | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    moments = moments_of_weights(own, {"model_type": "llava", "text_config": text})
    assert list(moments) == [1]
    assert float(moments[1].key.max()) < 200 and not moments[1].value_mean.any()


def test_a_folder_gives_what_its_tensors_give(tmp_path: Path) -> None:
    own = weights()
    names = sorted(own)
    save_file({name: own[name] for name in names[:3]}, tmp_path / "model-1.safetensors")
    save_file(
        {name: own[name] for name in names[3:]} | {"lm_head.weight": torch.ones(2, 2)}, tmp_path / "b.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found, wanted = moments_of_folder(tmp_path)[0], moments_of_weights(own, CONFIG)[0]
    for name in ("key", "query", "value", "value_mean"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"drop": "k_proj.weight"}, "layers [0] have no k_proj, so nothing can be said from the weights"),
        ({"drop": "q_proj.weight"}, "the weights have no model.layers.0.self_attn.q_proj.weight"),
        ({"head_dim": 96}, "must have a multiple of head_dim 96 rows, got [128, 32]"),
    ],
)
def test_weights_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    own = {name: x for name, x in weights().items() if not name.endswith(change.get("drop", "nothing"))}
    with pytest.raises(ValueError, match=re.escape(message)):
        moments_of_weights(own, CONFIG | {key: x for key, x in change.items() if key != "drop"})


def test_folders_that_hold_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no config.json in"):
        moments_of_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match="no safetensors file in"):
        moments_of_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        moments_of_folder(tmp_path)


def test_partial_rotation_reaches_the_pairs() -> None:
    moments = moments_of_weights(weights(), CONFIG | {"partial_rotary_factor": 0.5})[0]
    assert isinstance(moments, LayerMoments)
    assert moments.pairs[:2].tolist() == [[0, 16], [1, 17]] and moments.pairs[-1].tolist() == [62, 63]
