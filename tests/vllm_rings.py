"""Rings of raw tokens without a GPU: the kernel in the emulator, and decode by the reference backend."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

from emulator import EmulatedKernel
from kvturbo.vllm import rings

THREADS = 64


@cache
def launch() -> rings.Launch:
    """Runs rings.cu with few threads."""
    folder = Path(tempfile.mkdtemp())
    kernel = EmulatedKernel(rings.SOURCE.read_text(), rings.MACROS | {"THREADS": THREADS}, "rings", folder)
    return lambda parameters: kernel.launch(1, THREADS, parameters, 0)


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives rings to layers of the reference backend."""

    def kernel_on(device: torch.device) -> rings.Launch:
        return launch()

    monkeypatch.setattr(rings, "BACKENDS", ("reference",))
    monkeypatch.setattr(rings, "kernel_on", kernel_on)
