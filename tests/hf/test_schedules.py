"""The packed layers of a step share one schedule, and no step gets another step's."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

from hf.models import prompt, tiny
from kvturbo import ops
from kvturbo.hf import TurboCache
from kvturbo.ops.decode.cuda_schedule import Schedule
from support import BACKENDS_UNDER_TEST, device_of

SIZES = [126, 1, 1, 1, 3]
"""Chunks that cross the end of a block of 128 tokens, with other numbers of queries."""
CLOSE = {"triton": 2e-3, "cuda": 5e-2}
"""Logits that the order of sums may move apart; a token that is not seen moves them by more than 0.1."""


def plans(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every plan that is made."""
    made: list[int] = []
    owner, name = (Schedule, "plan_at") if backend == "cuda" else (import_module("kvturbo.ops.decode.triton"), "plan")
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: made.append(1) or real(*args, **options))
    return made


def store_by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is decode; an interpreted store takes a minute."""
    store = ops.store
    monkeypatch.setattr(ops, "store", lambda *args, **options: store(*args, **options | {"backend": "reference"}))


@pytest.mark.parametrize("backend", [b for b in BACKENDS_UNDER_TEST if b != "reference"])
@pytest.mark.parametrize(
    "format, windows, groups, padded",
    [
        ("k4v4", (0, 0), 1, False),
        ("k4v4", (0, 0), 1, True),
        ("k4v4", (4, 8), 1, True),
        (["k4v4", "k3v3"], (0, 0), 2, False),
    ],
)
def test_layers_share_a_plan_and_steps_do_not(
    backend: str, format: Any, windows: tuple[int, int], groups: int, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_of(backend)
    model = tiny("llama").to(device)
    model.set_attn_implementation("kvturbo")
    sizes = SIZES if not any(windows) else [SIZES[0] + sum(windows) + 2, *SIZES[1:]]  # 128, 129, 130 in pages before
    ids = prompt(2, sum(sizes)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0 if padded else 1
    options: dict[str, Any] = dict(zip(("sink", "recent"), windows, strict=True))
    caches = [TurboCache(model.config, format, backend=name, **options) for name in ("reference", backend)]
    store_by_reference(monkeypatch)
    made, start = plans(backend, monkeypatch), 0
    real = mask.bool()
    for size in [*sizes, -3, 3]:  # at last three tokens go, and others come
        if size < 0:
            for cache in caches:
                cache.crop(size)
            start += size
            continue
        made.clear()
        chunk = slice(start, start + size)
        want, got = (feed_at(model, cache, ids, mask, chunk) for cache in caches)
        assert len(made) == (0 if not start else groups)
        assert (want - got)[real[:, chunk]].abs().max() <= CLOSE[backend]
        start += size


def feed_at(model: Any, cache: TurboCache, ids: torch.Tensor, mask: torch.Tensor, chunk: slice) -> torch.Tensor:
    positions = (mask[:, : chunk.stop].cumsum(1) - 1).clamp(min=0)[:, chunk]
    with torch.no_grad():
        seen = mask[:, : chunk.stop]
        return model(ids[:, chunk], attention_mask=seen, position_ids=positions, past_key_values=cache).logits
