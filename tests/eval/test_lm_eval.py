"""lm-evaluation-harness through a packed cache, on a task of its own that needs no download."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'kvturbo[lm-eval]'")

from kvturbo.config import KVFormat
from kvturbo.eval.caches import CacheSpec, PackedReadsError
from kvturbo.eval.codec import packed_codec
from kvturbo.eval.lm_eval import PackedCacheLM
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.simulation import Simulation, run
from tiny_model import HEAD_DIM, LAYERS

TASK = """task: squares
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["4", "9"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def harness(tiny_folder: Path) -> Any:
    def make(**options: Any) -> PackedCacheLM:
        return PackedCacheLM(str(tiny_folder), device="cpu", dtype="float32", **options)

    return make


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    rows = [{"text": "Line 2: the square of 2 is " * (i + 1)} for i in range(3)]
    data = tmp_path / "squares.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "squares.yaml").write_text(TASK.format(data=data))
    return tmp_path


def test_log_likelihoods_are_those_of_a_simulation_in_the_same_chunks(tiny: LoadedModel, harness: Any) -> None:
    ids = torch.from_numpy(tiny.text[None, :150])
    model = harness(format="k4v2", chunk=32)
    logits = model._model_call(ids)
    codec = packed_codec(KVFormat.from_name("k4v2", HEAD_DIM))
    simulated, exact = (
        run(tiny.model, ids, Simulation(which, first=32, chunk=32, raw_dtype=None)) for which in (codec, None)
    )
    assert (logits - simulated).abs().max() < 0.05 < (logits - exact).abs().max()
    assert model.packed_tokens_read == LAYERS * (32 + 64 + 96 + 128)


def test_generation_reads_packed_tokens_at_every_step(tiny: LoadedModel, harness: Any) -> None:
    model = harness(format="k4v4")
    ids = torch.from_numpy(tiny.text[None, :40])
    out = model._model_generate(ids, max_length=50, stop=[], attention_mask=torch.ones_like(ids))
    assert out.shape == (1, 50)
    assert model.packed_tokens_read == LAYERS * sum(range(40, 49))


def test_left_padding_is_not_counted(tiny: LoadedModel, harness: Any) -> None:
    model = harness(format="k4v4")
    ids = torch.from_numpy(tiny.text[None, :40]).repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    model._model_generate(ids, max_length=45, stop=[], attention_mask=mask)
    assert model.packed_tokens_read == LAYERS * (sum(range(40, 44)) + sum(range(30, 34)))


def test_bypassing_the_packed_cache_is_an_error(tiny: LoadedModel, harness: Any, monkeypatch: Any) -> None:
    model = harness(format="k4v4")
    monkeypatch.setattr(model, "_new_cache", lambda: CacheSpec("16bit").new(tiny))
    with pytest.raises(PackedReadsError, match="0 packed tokens were read of the k4v4 cache"):
        model._model_call(torch.from_numpy(tiny.text[None, :150]))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"format": "k5v5"}, "unknown format 'k5v5'; valid formats: "),
        ({"format": "kivi2"}, "format 'kivi2' is simulated"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedCacheLM("no/such/model", **options)


def test_the_command_runs_a_task(tiny_folder: Path, task_folder: Path) -> None:
    arguments = [
        "--model", "kvturbo", "--model_args", f"pretrained={tiny_folder},format=k4v4,dtype=float32,chunk=16",
        "--tasks", "squares", "--include_path", str(task_folder), "--device", "cpu", "--batch_size", "2",
        "--output_path", str(task_folder / "out"),
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "kvturbo.eval.lm_eval", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((task_folder / "out").rglob("results_*.json")).read_text())
    assert 0 <= results["results"]["squares"]["acc,none"] <= 1 and results["n-samples"]["squares"]["effective"] == 3
