"""Tests that need vLLM's Python get it with a stand-in for the GPU; `make test-vllm` installs it."""

from __future__ import annotations

import pytest
import torch

import vllm_standin


@pytest.fixture(scope="session")
def vllm_python() -> None:
    """vLLM's Python, the plugin registered."""
    if not vllm_standin.installed():
        pytest.skip("vLLM is not installed here: make test-vllm")
    if torch.cuda.is_available():
        pytest.skip("a stand-in for the GPU is for machines without one: tests/vllm/test_gpu.py has the real one")
    vllm_standin.set_up()
