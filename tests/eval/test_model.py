"""Models are found where they are, and what is not there is said plainly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kvturbo.eval import model as module
from kvturbo.eval.model import LoadedModel, embedded_folder, load_model


def test_a_cpu_computes_in_fp32_unless_told_otherwise(tiny: LoadedModel, tiny_folder: Path) -> None:
    assert tiny.model.dtype == torch.float32 and not tiny.model.training
    assert load_model(str(tiny_folder), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_text_and_retrieval_tokens_come_from_the_models_folder(tiny: LoadedModel, tiny_folder: Path) -> None:
    assert tiny.text.dtype == np.int64 and tiny.text[0] == tiny.tokenizer.bos_token_id
    assert tiny.tokenizer.decode(tiny.text[1:]) == (tiny_folder / "heldout.txt").read_text()
    assert tiny.retrieval_vocab.size == tiny.model.config.vocab_size


def test_another_text_can_be_given(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("abc")
    assert len(load_model(str(tiny_folder), device="cpu", text=tmp_path / "mine.txt").text) == 4


@pytest.mark.parametrize("name", ["./missing", "/no/such/folder", "a/b/c", "~/nowhere/at/all"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="model must be a folder or a hub id .*, got "):
        load_model(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"can't load model '{tmp_path}'"):
        load_model(str(tmp_path))


def test_damaged_weights_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"can't load model '{folder}': .*not fully covered"):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize("option", [{"device": "tpu-7"}, {"device": "cuda:99"}, {"dtype": "int8"}])
def test_devices_and_dtypes_are_checked_before_loading(tiny_folder: Path, option: dict[str, str]) -> None:
    name, value = next(iter(option.items()))
    with pytest.raises(ValueError, match=f"^{name} .*{value}"):
        load_model(str(tiny_folder), **option)


def test_without_the_embedded_model_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "embedded_folder", lambda: None)
    with pytest.raises(FileNotFoundError, match="name a model with --model"):
        load_model()


@pytest.mark.skipif(embedded_folder() is None, reason="models/ holds no model")
def test_the_demos_hard_setting_is_the_one_chosen_for_the_embedded_model() -> None:
    from kvturbo.cli.demo import HARD_SETTING

    folder = embedded_folder()
    assert folder is not None
    assert json.loads((folder / "eval.json").read_text())["hard"]["4k"] == HARD_SETTING
