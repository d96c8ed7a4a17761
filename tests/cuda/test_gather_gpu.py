"""The gather kernel on a GPU, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from kernel_checks import check_gather, random_pages, rotations
from kvturbo import KVFormat
from kvturbo.config import HEAD_DIMS, PAGE_SIZES
from kvturbo.ops.gather import cuda as gather

pytestmark = pytest.mark.gpu
NAMES = ("k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k2v2", "k8v4", "lite4", "k4v4-o16", "k3v3-o16", "k2v2-o32")
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_copies_are_the_references(head_dim: int, name: str) -> None:
    if name == "k2v2-o32" and head_dim < 128:
        pytest.skip("no such format")
    page_size = PAGE_SIZES[HEAD_DIMS.index(head_dim) % 3]
    fmt = KVFormat.from_name(name, head_dim, seed=1)
    ranges = [(0, 2 * page_size), (5, page_size + 3), (9, 10), (4, 4)]
    for rotated in rotations(fmt):
        check_gather(gather.gather, fmt, page_size, ranges, DEVICE, rotated=rotated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(dtype: torch.dtype) -> None:
    for name in ("k4v4", "k4v4-o16"):
        fmt = KVFormat.from_name(name, 128)
        check_gather(gather.gather, fmt, 16, [(0, 32), (7, 20)], DEVICE, rotated=False, dtype=dtype)


def test_only_the_range_is_written_into_an_out_with_gaps() -> None:
    fmt = KVFormat.from_name("k4v4", 128)
    pages = random_pages(fmt, 16, 4, 2).to(DEVICE)
    table = torch.tensor([[1, 3]], dtype=torch.int32, device=DEVICE)
    whole = torch.full((2, 1, 24, 3, 128), 7.0, device=DEVICE)
    dense = tuple(torch.empty(1, 20, 2, 128, device=DEVICE) for _ in range(2))
    gather.gather(pages, table, 5, 25, dense, fmt=fmt)
    gather.gather(pages, table, 5, 25, (whole[0, :, 2:22, 1:], whole[1, :, 2:22, 1:]), fmt=fmt)
    torch.testing.assert_close(whole[:, :, 2:22, 1:], torch.stack(dense), rtol=0, atol=0, equal_nan=True)
    assert (whole[:, :, :2] == 7).all()
    assert (whole[:, :, 22:] == 7).all()
    assert (whole[:, :, :, 0] == 7).all()
