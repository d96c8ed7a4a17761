"""Gather against the codec, at ranges that are not whole pages."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.ops import gather
from kvturbo.quantizer import has_rotated_form
from kvturbo.rotation import unrotate
from support import Batch, backend_formats, batch_of, channels_for, device_of, every_head_dim, relative_error, same_bits

RANGES = [(0, 33), (0, 16), (5, 5), (5, 6), (15, 17), (16, 32), (7, 31), (32, 33)]


def run(
    batch: Batch, start: int, stop: int, backend: str, dtype: torch.dtype = torch.float32, rotated: bool = False
) -> tuple[Tensor, Tensor]:
    table = batch.block_table[:, : -(-stop // batch.layout.page_size)]
    return gather(
        batch.pages, table, start, stop, dtype=dtype, rotated=rotated, backend=backend, **batch.format_options()
    )


def check(batch: Batch, start: int, stop: int, backend: str) -> None:
    for got, wanted in zip(run(batch, start, stop, backend), (batch.k, batch.v), strict=True):
        expected = torch.stack([x[start:stop] for x in wanted])
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize("backend,fmt", backend_formats("gather"))
def test_gather_is_the_dequantised_vectors(backend: str, fmt: KVFormat) -> None:
    check(batch_of(fmt, [33, 40], device=device_of(backend)), 3, 33, backend)


@pytest.mark.parametrize("backend,fmt,page_size", every_head_dim("gather", ["k4v4", "k3v2-o16", "k2v2"]))
def test_gather_for_every_head_dim_and_page_size(backend: str, fmt: KVFormat, page_size: int) -> None:
    check(batch_of(fmt, [70], page_size=page_size, device=device_of(backend)), 9, 66, backend)


@pytest.mark.parametrize("backend,fmt", backend_formats("gather", ["k4v4"], 64))
def test_gather_of_ranges_that_are_not_whole_pages(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, [33, 35], device=device_of(backend))
    for start, stop in RANGES:
        check(batch, start, stop, backend)


ROTATED = [
    parameter
    for head_dim in (64, 80, 112)
    for parameter in backend_formats("gather", ["k4v4", "k8v4", "k2v2", "qjl3", "lite4"], head_dim)
]


@pytest.mark.parametrize("backend,fmt", ROTATED)
def test_unrotating_what_gather_leaves_rotated_gives_the_vectors(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, [33, 35], device=device_of(backend))
    plain, rotated = run(batch, 4, 30, backend), run(batch, 4, 30, backend, rotated=True)
    for x, y in zip(plain, rotated, strict=True):
        assert relative_error(unrotate(y, fmt.seed) if fmt.k.rotate else y, x) <= 1e-6
        assert fmt.k.rotate is not torch.equal(x, y)


@pytest.mark.parametrize("backend,fmt", backend_formats("gather", ["k4v4-o16", "tq2.5"], 64))
def test_formats_without_a_rotated_form_say_so(backend: str, fmt: KVFormat) -> None:
    assert not has_rotated_form(fmt.k)
    with pytest.raises(ValueError, match="has no rotated form"):
        run(batch_of(fmt, [16], device=device_of(backend)), 0, 16, backend, rotated=True)


@pytest.mark.parametrize("dtype,bound", [(torch.float16, 5e-4), (torch.bfloat16, 4e-3), (torch.float64, 1e-6)])
@pytest.mark.parametrize("backend,fmt", backend_formats("gather", ["k4v4", "k2v2-o16"], 64))
def test_gather_in_every_dtype(backend: str, fmt: KVFormat, dtype: torch.dtype, bound: float) -> None:
    batch = batch_of(fmt, [20], device=device_of(backend))
    k, v = run(batch, 2, 20, backend, dtype=dtype)
    assert k.dtype == v.dtype == dtype
    assert relative_error(k, batch.k[0][None, 2:20]) <= bound
    assert relative_error(v, batch.v[0][None, 2:20]) <= bound


@pytest.mark.parametrize("backend,fmt", backend_formats("gather", ["k3v3"], 64))
def test_gather_writes_into_out(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, [20], device=device_of(backend))
    room = torch.full((2, 1, 30, 2, 64), 7.0, dtype=torch.float16, device=batch.pages.device)
    out = room[0][:, 5:15], room[1][:, 5:15]
    table = batch.block_table[:, :2]
    k, v = gather(batch.pages, table, 3, 13, out=out, backend=backend, **batch.format_options())
    assert k is out[0] and v is out[1]
    assert relative_error(k, batch.k[0][None, 3:13]) <= 5e-4
    assert relative_error(v, batch.v[0][None, 3:13]) <= 5e-4
    assert (room[:, :, :5] == 7).all() and (room[:, :, 15:] == 7).all()


@pytest.mark.parametrize("backend,fmt", backend_formats("gather", ["k4v4", "k4v4-o16"], 64))
def test_a_poisoned_vector_is_nan_and_its_neighbours_are_not(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, [20], device=device_of(backend))
    batch.put(0, 6, "v", math.nan)
    k, v = run(batch, 0, 20, backend)
    assert v[0, 6].isnan().all()
    assert k.isfinite().all() and v[0, [*range(6), *range(7, 20)]].isfinite().all()


@pytest.mark.parametrize("backend,fmt", backend_formats("gather", ["k4v4"], 64))
def test_gather_is_deterministic(backend: str, fmt: KVFormat) -> None:
    batch = batch_of(fmt, [33], device=device_of(backend))
    first, second = run(batch, 1, 33, backend), run(batch, 1, 33, backend)
    assert same_bits(first[0], second[0]) and same_bits(first[1], second[1])


@pytest.mark.gpu
@pytest.mark.parametrize("backend,fmt", backend_formats("gather"))
def test_gather_of_a_long_range(backend: str, fmt: KVFormat) -> None:
    assert (channels_for(fmt, 2) is None) == (not fmt.channel_count)
    check(batch_of(fmt, [2000, 2100], device=device_of(backend)), 13, 1999, backend)
