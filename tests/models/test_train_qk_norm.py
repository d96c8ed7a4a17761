"""The QK-norm variant starts near the model it is made from, learns, and is saved as a Qwen3."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kvturbo.eval.model import embedded_folder, load_model

MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.fixture(scope="module")
def script() -> Any:
    sys.path.insert(0, str(MODELS))  # the scripts import one another
    try:
        yield importlib.import_module("train_qk_norm")
    finally:
        sys.path.remove(str(MODELS))


@pytest.fixture(scope="module")
def text() -> np.ndarray:
    return load_model(device="cpu").text.astype(np.uint16)


def loss(model: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_it_starts_near_the_model_it_is_made_from(script: Any, text: np.ndarray) -> None:
    plain = LlamaForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32).eval()
    ids = torch.from_numpy(text[1000:1600].astype(np.int64))[None]
    normed = script.with_qk_norm(plain, ids).eval()
    assert isinstance(normed, Qwen3ForCausalLM)
    assert loss(plain, ids) < loss(normed, ids) < loss(plain, ids) + 1.5


def test_a_few_steps_train_and_the_result_is_saved(script: Any, text: np.ndarray, tmp_path: Path) -> None:
    plain = LlamaForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    model = script.with_qk_norm(plain, torch.from_numpy(text[:300].astype(np.int64))[None])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = replace(script.FULL, stages=script.SMOKE_STAGES, probe=())
    trainer = script.Trainer(recipe, "cpu", model)
    ids, weights = next(iter(importlib.import_module("data").Batches(text, 128, 2, 0)))
    losses = [float(trainer.learn(ids, weights)) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    script.export(trainer, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.config.model_type == "qwen3" and saved.dtype == torch.bfloat16


def test_a_model_with_norms_already_is_refused(script: Any) -> None:
    options = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=64, num_key_value_heads=1, head_dim=64, attention_bias=True, **options)
    )
    with pytest.raises(ValueError, match="must be a plain Llama, got Qwen3ForCausalLM with .*bias"):
        script.with_qk_norm(model, torch.arange(8)[None])
