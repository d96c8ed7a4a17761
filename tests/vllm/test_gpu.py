"""vLLM on a real GPU: runs `checks.py` once, in a process of its own, and looks at every result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_standin

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
NAMES = (
    "eager", "chunks", "full_graphs", "piecewise_graphs", "compiled", "prefix_hit", "ngram", "draft_model", "preemption",
    "skip_layers", "half_precision", "outliers", "many_texts", "two_bits", "sliding", "head_dims", "soft_caps", "sinks",
    "mamba", "gated_delta", "cpu_offload", "processes", "server", "tensor_parallel", "reference_path", "speed",
    "rings", "same_text_as_reference", "same_text_across_batch_sizes", "same_text_across_batch_sizes_fp16", "local_chunks",
    "eval_of_servers", "small_pieces",
)  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if not vllm_standin.installed():
        pytest.skip("vLLM is not installed here")
    path = tmp_path_factory.mktemp("vllm") / "results.json"
    names = [name for name in NAMES if name != "tensor_parallel" or torch.cuda.device_count() > 1]
    script = str(Path(__file__).with_name("checks.py"))
    command = [sys.executable, script, *names, "--jobs", "8", "--json", str(path), "--log", str(path.parent / "logs")]
    subprocess.run(command, check=False)
    return {result["name"]: result for result in json.loads(path.read_text())}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_vllm(name: str, results: dict[str, Any]) -> None:
    if name == "tensor_parallel" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert name in results, "the process ended before this check"
    assert results[name]["ok"], results[name]["text"]
