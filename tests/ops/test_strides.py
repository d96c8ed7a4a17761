"""Small tensors with gaps: what lies in the gaps is never taken for a slot, a length, a page, a channel or a sink."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.ops import decode, gather, store
from support import BACKENDS_UNDER_TEST, Batch, batch_of, device_of, ints, same_bits

FMT = KVFormat.from_name("k4v4-o16", 64)


def gappy(x: Tensor, fill: int = 1) -> Tensor:
    """The same values, with another one after each."""
    y = torch.stack((x, torch.full_like(x, fill)), -1)[..., 0]
    assert not y.is_contiguous() and torch.equal(x, y)
    return y


def batch_on(backend: str) -> Batch:
    return batch_of(FMT, [20, 33], device=device_of(backend))


@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
def test_store(backend: str) -> None:
    batch = batch_on(backend)
    device, channels = batch.pages.device, batch.channels
    assert channels is not None
    k, v = torch.randn(2, 4, 2, 64).to(device)
    slots = torch.tensor([-1, 9, -1, 40], device=device)
    pages = [batch.pages.clone() for _ in range(2)]
    rows = [torch.zeros(2, 2, 2, 8, 64, device=device) for _ in range(2)]
    places = torch.tensor([0, -1, 2, 11], device=device)
    options: dict[str, Any] = {"fmt": FMT, "backend": backend}
    store(k, v, pages[0], slots, outlier_channels=channels, recent_rows=rows[0], recent_slots=places, **options)
    store(
        k, v, pages[1], gappy(slots, 5), outlier_channels=gappy(channels), recent_rows=rows[1],
        recent_slots=gappy(places, 5), **options,
    )  # fmt: skip
    assert same_bits(*pages) and not same_bits(pages[0], batch.pages)
    assert same_bits(*rows) and rows[0].any()


@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
def test_gather(backend: str) -> None:
    batch = batch_on(backend)
    assert batch.channels is not None
    wanted, got = (
        gather(batch.pages, table, 3, 20, fmt=FMT, outlier_channels=channels, backend=backend)
        for table, channels in (
            (batch.block_table[:, :2], batch.channels),
            (gappy(batch.block_table[:, :2]), gappy(batch.channels)),
        )
    )
    assert all(same_bits(a, b) for a, b in zip(wanted, got, strict=True))


@pytest.mark.parametrize("name", ["block_table", "seq_lens", "q_lens", "seq_starts", "sinks", "outlier_channels"])
@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
def test_decode(backend: str, name: str) -> None:
    """The cuda backend refuses what it would have to copy in every call."""
    batch = batch_on(backend)
    device = batch.pages.device
    arguments: dict[str, Any] = {
        "block_table": batch.block_table, "seq_lens": batch.seq_lens, "q_lens": ints([1, 2], device),
        "seq_starts": ints([3, 0], device), "sinks": torch.tensor([0.5, -1, 2, 0], device=device),
        "outlier_channels": batch.channels,
    }  # fmt: skip
    q = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(1)).to(device)
    options: dict[str, Any] = {"fmt": FMT, "scale": 0.2, "backend": backend}
    wanted = decode(q, batch.pages, **arguments, **options)
    changed = arguments | {name: gappy(arguments[name])}
    if backend == "cuda":
        with pytest.raises(ValueError, match=f"{name}.* must be contiguous"):
            decode(q, batch.pages, **changed, **options)
        return
    got = decode(q, batch.pages, **changed, **options)
    assert all(same_bits(a, b) for a, b in zip(wanted, got, strict=True))
