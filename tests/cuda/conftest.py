"""The emulated decode kernels that tests run; without a parameter each of `CASES`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from emulated_decode import CASES, CTAS, LIMITS, Runner, build
from emulator import EmulatedKernel
from kvturbo.ops.decode import cuda, cuda_schedule, variants


@pytest.fixture(scope="module")
def schedule_kernel(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernel:
    return EmulatedKernel(variants.schedule_source(), {}, "schedule", tmp_path_factory.mktemp("schedule"))


@pytest.fixture(params=CASES, ids=lambda case: case.label, scope="module")
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return SimpleNamespace(case=request.param, decode=build(request.param, tmp_path_factory.mktemp("decode")))


@pytest.fixture
def run(kernel: SimpleNamespace, schedule_kernel: EmulatedKernel, monkeypatch: pytest.MonkeyPatch) -> Runner:
    runner = Runner(kernel.case, kernel.decode, CTAS)
    monkeypatch.setattr(cuda_schedule, "kernels", lambda *_: runner.kernels(schedule_kernel))
    monkeypatch.setattr(cuda_schedule, "limits_of", lambda _: LIMITS if kernel.case.few else variants.Limits())
    for module in (cuda, cuda_schedule):
        monkeypatch.setattr(module, "current_stream", lambda _: 0)
    monkeypatch.setattr(cuda, "current_device", lambda: None)  # the CPU's index
    monkeypatch.setattr(
        cuda, "empty_strided", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype)
    )
    return runner
