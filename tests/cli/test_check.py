"""`kvturbo check` tells what it finds in a checkpoint, what the cache takes, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvturbo.cli.check import LEAST_TOKENS
from kvturbo.guard import read_plan
from kvturbo.hf import TurboCache
from kvturbo.hf.sizes import cache_bytes
from tiny_model import CONTEXT, HEAD_DIM, KV_HEADS, LAYERS

BIASED = [3, 3 + HEAD_DIM // 2]


def altered(folder: Path, target: Path, *, key_bias: float = 0.0, value_bias: float = 0.0, **config: object) -> Path:
    """A copy of a model with biases in its attention, and other entries in its configuration."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    for i in range(LAYERS):
        prefix = f"model.layers.{i}.self_attn."
        for name, rows in (("q_proj", 2 * HEAD_DIM), ("k_proj", HEAD_DIM), ("v_proj", HEAD_DIM), ("o_proj", 32)):
            weights[f"{prefix}{name}.bias"] = torch.zeros(rows, dtype=torch.bfloat16)
        weights[f"{prefix}q_proj.weight"].view(2, HEAD_DIM, 32)[:, BIASED] = 0
        weights[f"{prefix}k_proj.bias"][BIASED] = key_bias
        weights[f"{prefix}v_proj.bias"][:] = value_bias
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    data = json.loads((target / "config.json").read_text()) | {"attention_bias": True} | config
    (target / "config.json").write_text(json.dumps(data))
    return target


def test_an_even_model_keeps_its_format(kvturbo, tiny_folder: Path) -> None:
    data = kvturbo("check", tiny_folder, "--json").data
    assert [layer["format"] for layer in data["layers"]] == ["k4v4"] * LAYERS
    assert data["one_format"] == {"format": "k4v4", "sixteen_bit_layers": []}
    assert data["cache_bytes"] == LAYERS * KV_HEADS * 68 * 8192
    assert data["sixteen_bit_bytes"] == LAYERS * KV_HEADS * 4 * HEAD_DIM * 8192
    assert (data["advice"], data["refused"], data["plan"]) == ("", None, None)


@pytest.mark.parametrize("source", ["weights", "text"])
def test_a_key_bias_is_found_and_the_plan_written(kvturbo, tiny_folder: Path, tmp_path: Path, source: str) -> None:
    model, path = altered(tiny_folder, tmp_path / "model", key_bias=60.0), tmp_path / "plan.json"
    options = [] if source == "weights" else ["--text", "--tokens", 300]
    ran = kvturbo("check", model, "--out", path, "--json", "--context", 1000, *options)
    assert ran.code == 0
    for layer in ran.data["layers"]:
        assert layer["format"] == "k4v4-o16" and layer["key_excess"] > 10
    assert "keys of layers [0, 1]" in ran.data["advice"]
    plan = read_plan(path)
    assert all(set(BIASED) <= set(layer.channels[16][0]) for layer in plan.layers.values())
    assert ran.data["cache_bytes"] == cache_bytes(plan, 1000)
    text = kvturbo("generate", "--model", model, "--plan", path, "--prompt", "Line 3", "--max-new-tokens", 2, "--json")
    assert text.data["format"].startswith("plan.json@")


def test_a_mean_in_all_values_is_refused(kvturbo, tiny_folder: Path, tmp_path: Path) -> None:
    model = altered(tiny_folder, tmp_path / "model", value_bias=30.0)
    ran = kvturbo("check", model)
    assert ran.code == 1
    assert "16bit" in ran.out and "Values of layers [0, 1] have a mean" in ran.out
    assert ran.err.startswith("kvturbo check: no layer can be packed as k4v4: values of layers [0, 1] have a mean")
    assert ran.err.count("\n") == 1
    assert kvturbo("check", model, "--json").data["one_format"] == {"format": "16bit", "sixteen_bit_layers": [0, 1]}


def test_a_plan_can_be_used(kvturbo, tiny_folder: Path, tmp_path: Path) -> None:
    assert kvturbo("check", tiny_folder, "--format", "k3v2", "--out", tmp_path).code == 0
    from transformers import AutoConfig

    cache = TurboCache(AutoConfig.from_pretrained(tiny_folder), plan=tmp_path)
    assert {fmt.name for fmt in cache.formats.values()} == {"k3v2"}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--format", "k9v9"), ("k9v9", "k4v4")),
        (("--format", "tq2.5"), ("tq2.5", "k8v4")),
        (("--limit", "0.5"), ("0.5", "at least 1")),
        (("--context", "0"), ("--context must be at least 1, got 0",)),
        (("--text", "/no/such/file"), ("/no/such/file",)),
        (("--out", "/dev/null/p.json"), ("--out: /dev/null is not a folder",)),
        (("--text", "--tokens", "0"), ("--tokens must be at least 1, got 0",)),
    ],
)
def test_bad_input(kvturbo, tiny_folder: Path, arguments: tuple, words: tuple[str, ...]) -> None:
    ran = kvturbo("check", tiny_folder, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1 and all(word in ran.err for word in words)


def test_more_tokens_than_the_models_context_are_refused(kvturbo, tiny_folder: Path) -> None:
    ran = kvturbo("check", tiny_folder, "--text", "--tokens", CONTEXT + 1)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith(f"calibration takes at most {CONTEXT} tokens, the model's context, got {CONTEXT + 1}\n")


def test_a_text_too_short_to_judge_by_is_refused(kvturbo, tiny_folder: Path) -> None:
    ran = kvturbo("check", tiny_folder, "--text", "--tokens", LEAST_TOKENS - 1)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith("kvturbo check: calibration needs at least 32 tokens of text, got 31\n")
    assert kvturbo("check", tiny_folder, "--text", "--tokens", LEAST_TOKENS).code == 0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"head_dim": 100}, "head_dim must be a multiple of 16, got 100"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "multi-head latent attention (kv_lora_rank 512)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "cross attention"),
    ],
)
def test_models_that_cannot_be_packed(kvturbo, tiny_folder: Path, tmp_path: Path, change: dict, words: str) -> None:
    ran = kvturbo("check", altered(tiny_folder, tmp_path / "model", **change))
    assert ran.code == 2 and words in ran.err and ran.out == ""


def test_no_model(kvturbo, tmp_path: Path) -> None:
    empty = kvturbo("check", tmp_path)
    assert empty.code == 2 and str(tmp_path) in empty.err and "config.json" in empty.err
    ran = kvturbo("check", tmp_path / "nowhere")
    assert ran.code == 2 and "nowhere" in ran.err
    assert CONTEXT == 8192
