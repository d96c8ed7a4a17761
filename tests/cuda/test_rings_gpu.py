"""Who has which ring of raw tokens, on a GPU: the same engines as in the emulator."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("cuda.core", reason="needs the extra 'cuda'")

from kvturbo.vllm.rings import kernel_on
from ring_engine import LOADS, Load, engine_of

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("name", LOADS)
def test_rings_hold_the_newest_tokens_of_their_rows(gpu: torch.device, name: str) -> None:
    for seed in range(8):
        engine = engine_of(kernel_on(gpu), LOADS[name], seed, device=gpu)
        for _ in range(300):
            engine.step()


def test_a_large_batch(gpu: torch.device) -> None:
    load = Load(sequences=1200, blocks=16000, budget=4000, missing=0.3)
    engine = engine_of(kernel_on(gpu), load, 3, count=256, device=gpu)
    for _ in range(60):
        engine.step()
    assert engine.seen["kept"] > 500, engine.seen
