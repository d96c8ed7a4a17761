"""The rotation: orthonormal, mixes all channels, and the same numbers everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import codec_spec
from kvturbo.config import HEAD_DIMS
from kvturbo.rotation import factor, gaussian_matrix, hadamard_matrix, paley, rotate, signs, splitmix64, unrotate

SIZES = (16, 32, 48, *HEAD_DIMS)
"""All head_dims and the parts of the `tq` formats."""


def test_splitmix64_gives_the_published_words() -> None:
    assert splitmix64(0, 3).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert splitmix64(1234567, 5).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("m", [12, 20, 28])
def test_paley_matrices_are_hadamard_matrices(m: int) -> None:
    matrix = paley(m)
    assert set(np.unique(matrix)) == {-1, 1}
    assert np.array_equal(matrix @ matrix.T, m * np.eye(m))


@pytest.mark.parametrize("n", SIZES)
def test_the_matrix_is_orthogonal_and_the_documented_one(n: int) -> None:
    matrix = hadamard_matrix(n)
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))
    assert torch.equal(matrix.abs(), torch.ones_like(matrix))
    assert np.array_equal(matrix.numpy(), codec_spec.hadamard(n))


@pytest.mark.parametrize("n", SIZES)
def test_rotation_is_the_matrix_applied_to_signed_channels(n: int) -> None:
    x = torch.randn(7, n, generator=torch.Generator().manual_seed(n))
    expected = (x.double() * signs(n, 5)) @ hadamard_matrix(n).T / n**0.5
    torch.testing.assert_close(rotate(x, 5).double(), expected, rtol=0, atol=4e-6)
    assert rotate(x, 5).dtype == torch.float32


@pytest.mark.parametrize("n", SIZES)
def test_every_channel_reaches_every_other_with_equal_weight(n: int) -> None:
    spread = rotate(torch.eye(n), 0)
    torch.testing.assert_close(spread.abs(), torch.full((n, n), n**-0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", SIZES)
def test_unrotating_gives_the_vector_back_and_norms_are_kept(n: int) -> None:
    x = 100 * torch.randn(50, n, generator=torch.Generator().manual_seed(n))
    y = rotate(x, 3)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=2e-6, atol=0)
    torch.testing.assert_close(unrotate(y, 3), x, rtol=0, atol=3e-4)


@given(n=st.sampled_from(SIZES), seed=st.integers(0, 2**64 - 1), rows=st.integers(0, 3))
def test_products_of_rotated_vectors_are_those_of_the_vectors(n: int, seed: int, rows: int) -> None:
    a, b = torch.randn(2, rows, n, generator=torch.Generator().manual_seed(seed % 2**63))
    rotated = (rotate(a, seed) * rotate(b, seed)).sum(-1)
    torch.testing.assert_close(rotated, (a * b).sum(-1), rtol=0, atol=2e-4)


def test_any_floating_type_and_any_leading_axes() -> None:
    x = torch.randn(2, 3, 80)
    torch.testing.assert_close(rotate(x, 0)[1, 2], rotate(x[1, 2], 0))
    assert torch.equal(rotate(x.half(), 0), rotate(x.half().float(), 0))
    assert torch.equal(rotate(x.bfloat16(), 0), rotate(x.bfloat16().float(), 0))


def test_signs_are_the_top_bits_of_the_words() -> None:
    assert signs(4, 0).tolist() == [-1, 1, 1, -1]  # 0xE2.., 0x6E.., 0x06.., 0xF8..
    assert not torch.equal(signs(128, 0), signs(128, 1))
    assert abs(signs(256, 0).sum()) < 64


@pytest.mark.parametrize("n", [0, 6, 36, 60, 100, 144])
def test_sizes_without_a_matrix_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"no Hadamard matrix here for {n} channels"):
        factor(n)


def test_the_qjl_matrix_is_normal_and_reproducible() -> None:
    matrix = gaussian_matrix(128, 0).double()
    n = matrix.numel()
    assert abs(matrix.mean()) < 4 / n**0.5
    assert abs(matrix.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((matrix**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert (matrix.abs() > 3).double().mean() == pytest.approx(0.0027, abs=4 * (0.0027 / n) ** 0.5)
    correlation = matrix @ matrix.T / 128 - torch.diag((matrix**2).mean(1))
    assert correlation.abs().max() < 5 / 128**0.5
    np.testing.assert_allclose(matrix, codec_spec.gaussian(128, 0), atol=1e-6)
    assert not torch.equal(gaussian_matrix(128, 0), gaussian_matrix(128, 1))
