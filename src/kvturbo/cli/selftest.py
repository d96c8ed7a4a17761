"""A few tokens through one operation of one backend, compared with the reference on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvturbo import ops
from kvturbo.config import KVFormat
from kvturbo.layout import PageLayout

TOKENS, KV_HEADS, Q_HEADS, PAGE_SIZE = 77, 2, 4, 16
LIMIT = 0.03
"""Relative RMS error allowed: a fast decode quantises its query and its weights to 8 bits, which alone gives about 0.01."""


def check_store(fmt: KVFormat, device: torch.device, backend: str) -> float:
    """Relative error of what a store's pages decode to, against the pages of the reference store."""
    k, v = _vectors(fmt)
    pages = _empty_pages(fmt).to(device)
    ops.store(k.to(device), v.to(device), pages, torch.arange(TOKENS).to(device), fmt=fmt, backend=backend)
    return _error(_gathered(pages.cpu(), fmt), _gathered(_reference_pages(fmt), fmt))


def check_decode(fmt: KVFormat, device: torch.device, backend: str) -> float:
    """Relative error of a decode of the last token."""
    q = torch.randn(1, Q_HEADS, fmt.head_dim, generator=torch.Generator().manual_seed(1)).half()
    outs = []
    for place, name in ((device, backend), (torch.device("cpu"), "reference")):
        lens = torch.tensor([TOKENS], dtype=torch.int32, device=place)
        pages, scale = _reference_pages(fmt).to(place), fmt.head_dim**-0.5
        outs.append(ops.decode(q.to(place), pages, _table(place), lens, fmt=fmt, scale=scale, backend=name)[0].cpu())
    return _error(*outs)


def check_gather(fmt: KVFormat, device: torch.device, backend: str) -> float:
    """Relative error of gathered keys and values."""
    pages = _reference_pages(fmt)
    return _error(_gathered(pages.to(device), fmt, backend).cpu(), _gathered(pages, fmt))


CHECKS: dict[str, Callable[[KVFormat, torch.device, str], float]] = {
    "store": check_store,
    "decode": check_decode,
    "gather": check_gather,
}


def _vectors(fmt: KVFormat) -> tuple[Tensor, Tensor]:
    kv = torch.randn(2, TOKENS, KV_HEADS, fmt.head_dim, generator=torch.Generator().manual_seed(0)).half()
    return kv[0], kv[1]


def _empty_pages(fmt: KVFormat) -> Tensor:
    shape = -(-TOKENS // PAGE_SIZE), KV_HEADS, PageLayout.of(fmt, PAGE_SIZE).page_bytes
    return torch.zeros(shape, dtype=torch.uint8)


def _reference_pages(fmt: KVFormat) -> Tensor:
    pages = _empty_pages(fmt)
    ops.store(*_vectors(fmt), pages, torch.arange(TOKENS), fmt=fmt, backend="reference")
    return pages


def _table(device: torch.device) -> Tensor:
    return torch.arange(-(-TOKENS // PAGE_SIZE), dtype=torch.int32, device=device)[None]


def _gathered(pages: Tensor, fmt: KVFormat, backend: str = "reference") -> Tensor:
    return torch.stack(ops.gather(pages, _table(pages.device), 0, TOKENS, fmt=fmt, backend=backend))


def _error(got: Tensor, wanted: Tensor) -> float:
    difference = (got.double() - wanted.double()).square().sum() / wanted.double().square().sum()
    return difference.sqrt().item()
