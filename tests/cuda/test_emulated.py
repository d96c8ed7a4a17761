"""The store and gather kernels, thread by thread on the CPU, against the reference: their logic and every address."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from emulator import EmulatedKernel
from kernel_checks import (
    check_gather,
    check_not_finite,
    check_recent_copies,
    check_store,
    mixed_slots,
    rotations,
    vectors,
)
from kvturbo import KVFormat
from kvturbo.ops.gather import cuda as gather
from kvturbo.ops.store import cuda as store

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

FORMATS = [
    ("k4v4", 128, 16, torch.bfloat16),
    ("k3v3-o16", 80, 16, torch.float32),
    ("k4v3", 112, 32, torch.float16),
    ("k3v2", 96, 64, torch.float32),
    ("k8v4", 192, 32, torch.bfloat16),
    ("k2v2-o32", 256, 16, torch.float32),
    ("lite4", 64, 64, torch.float32),
]


@pytest.fixture(params=FORMATS, ids=lambda p: "-".join(map(str, p[:3])), scope="module")
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    name, head_dim, page_size, dtype = request.param
    fmt = KVFormat.from_name(name, head_dim, seed=5)
    folder = tmp_path_factory.mktemp("emulated")

    @lru_cache
    def stores(ring_size: int) -> EmulatedKernel:
        variant, own = store.Variant(fmt, page_size, store.TYPES[dtype], ring_size), folder / str(ring_size)
        own.mkdir()
        return EmulatedKernel(variant.source(), variant.macros(), "store", own)

    return SimpleNamespace(fmt=fmt, page_size=page_size, dtype=dtype, folder=folder, stores=stores)


@pytest.fixture(autouse=True)
def without_gpu(kernel: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_kernel", lambda *kind: kernel.stores(kind[3]))
    for module in (store, gather):
        monkeypatch.setattr(module, "current_stream", lambda _: 0)


@pytest.mark.parametrize("single", [True, False], ids=["single tokens", "octets"])
def test_store_is_the_references(kernel: SimpleNamespace, single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_MOST_SINGLE", 10**9 if single else 0)
    slots = mixed_slots(kernel.page_size)
    k, v = (x.to(kernel.dtype) for x in vectors(kernel.fmt, len(slots), 3))
    check_store(store.store, kernel.fmt, kernel.page_size, slots, k, v, "cpu")


def prepared(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    slots: Tensor,
    *,
    fmt: KVFormat,
    outlier_channels: Tensor | None = None,
    recent_rows: Tensor | None = None,
    recent_slots: Tensor | None = None,
) -> None:
    """The store as calls that have been checked before run it."""
    tensors = k, v, pages, slots, outlier_channels, recent_rows, recent_slots
    store.prepare(*tensors, fmt=fmt)(*tensors)


@pytest.mark.parametrize("run", [store.store, prepared])
@pytest.mark.parametrize("single", [True, False], ids=["single tokens", "octets"])
def test_tokens_are_copied_into_rings(
    kernel: SimpleNamespace, single: bool, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MOST_SINGLE", 10**9 if single else 0)
    slots = mixed_slots(kernel.page_size)
    k, v = (x.to(kernel.dtype) for x in vectors(kernel.fmt, len(slots), 3))
    check_recent_copies(run, kernel.fmt, kernel.page_size, slots, k, v, "cpu")


def test_strides_of_one_token_do_not_count(kernel: SimpleNamespace) -> None:
    x = torch.zeros(1, 2, kernel.fmt.head_dim, dtype=kernel.dtype)
    pages = torch.zeros(1, 2, kernel.fmt.page_bytes(kernel.page_size), dtype=torch.uint8)
    tensors = x.as_strided(x.shape, (3, *x.stride()[1:])), x, pages, torch.tensor([0]), None, None, None
    for strided in (tensors, (x, *tensors[1:])):
        assert isinstance(store.prepare(*strided, fmt=kernel.fmt), store._Call)


def test_rings_that_the_kernel_cannot_write_are_refused(kernel: SimpleNamespace) -> None:
    fmt, unit = kernel.fmt, 4 * kernel.dtype.itemsize
    k, slots = torch.zeros(1, 1, fmt.head_dim, dtype=kernel.dtype), torch.tensor([0])
    pages = torch.zeros(1, 1, fmt.page_bytes(kernel.page_size), dtype=torch.uint8)
    options = {"fmt": fmt, "outlier_channels": torch.arange(fmt.outliers)[None] if fmt.outliers else None}
    rows = torch.zeros(16 * fmt.head_dim + 1, dtype=kernel.dtype)[1:].view(1, 1, 2, 8, fmt.head_dim)
    with pytest.raises(ValueError, match=f"recent_rows must begin at a multiple of {unit} bytes, got address 0x"):
        store.store(k, k, pages, slots, recent_rows=rows, recent_slots=slots, **options)
    with pytest.raises(TypeError, match=r"bfloat16, .* for the cuda backend, got torch.float64"):
        store.store(k.double(), k.double(), pages, slots, recent_rows=rows.double(), recent_slots=slots, **options)
    assert not pages.any() and not rows.any()


@pytest.mark.parametrize("single", [True, False], ids=["single tokens", "octets"])
def test_what_is_not_finite_stays_in_its_vector(
    kernel: SimpleNamespace, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MOST_SINGLE", 10**9 if single else 0)
    if kernel.dtype == torch.float32:
        check_not_finite(store.store, kernel.fmt, kernel.page_size, 8, "cpu")


def test_gather_is_the_references(kernel: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = [(0, 2 * kernel.page_size), (5, kernel.page_size + 3), (9, 10), (4, 4)]
    for rotated in rotations(kernel.fmt):
        variant = gather.Variant(kernel.fmt, kernel.page_size, gather.TYPES[kernel.dtype], rotated)
        folder = kernel.folder / str(rotated)
        folder.mkdir()
        built = EmulatedKernel(variant.source(), variant.macros(), "gather", folder)
        monkeypatch.setattr(gather, "_kernel", lambda *_, built=built: built)
        check_gather(gather.gather, kernel.fmt, kernel.page_size, ranges, "cpu", rotated=rotated, dtype=kernel.dtype)
