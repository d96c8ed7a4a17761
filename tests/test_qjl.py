"""The `qjl` formats: unbiased over S, with the variance of the theory and below the bound of the paper."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat, dequantize, quantize
from kvturbo.rotation import rotate

SEEDS = 20
VECTORS = 400


@cache
def _errors(name: str, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """<q, k>, <q, k^> - <q, k> and the variance by theory: [seeds, vectors] fp64, k of unit norm, q = k + noise."""
    g = torch.Generator().manual_seed(7)
    k = torch.nn.functional.normalize(torch.randn(VECTORS, d, generator=g), dim=-1)
    q = k + torch.randn(VECTORS, d, generator=g) * d**-0.5
    truth, error, variance = [], [], []
    for seed in range(SEEDS):
        fmt = KVFormat.from_name(name, d, seed=seed)
        packed = quantize(k, fmt, "k")
        estimate = (q * dequantize(packed, fmt, "k")).double().sum(-1)
        packed.residual_norm = torch.zeros_like(packed.residual_norm)
        residual = (rotate(k, seed) - dequantize(packed, fmt, "k", rotated=True)).double()
        q_residual = (rotate(q, seed) * residual).sum(-1)
        truth.append((q * k).double().sum(-1))
        error.append(estimate - truth[-1])
        variance.append(
            (math.pi / 2 * residual.square().sum(-1) * q.double().square().sum(-1) - q_residual.square()) / d
        )
    return torch.stack(truth), torch.stack(error), torch.stack(variance)


CASES = pytest.mark.parametrize("name, d", [("qjl4", 128), ("qjl3", 128), ("qjl4", 80)])


@CASES
def test_the_slope_is_one(name: str, d: int) -> None:
    truth, error, variance = _errors(name, d)
    slope = 1 + (truth * error).sum() / truth.square().sum()
    standard_error = (truth.square() * variance).sum().sqrt() / truth.square().sum()
    assert abs(slope - 1) <= 3 * standard_error
    assert standard_error < 0.002, "the test can see a bias of a percent"


@CASES
def test_without_the_residual_the_slope_is_not_one(name: str, d: int) -> None:
    fmt = KVFormat.from_name(name, d)
    k = torch.randn(500, d, generator=torch.Generator().manual_seed(3))
    packed = quantize(k, fmt, "k")
    packed.residual_norm = torch.zeros_like(packed.residual_norm)
    slope = (k * dequantize(packed, fmt, "k")).sum() / k.square().sum()
    assert slope < {"qjl4": 0.98, "qjl3": 0.90}[name]


@CASES
def test_the_variance_is_that_of_the_theory(name: str, d: int) -> None:
    _, error, variance = _errors(name, d)
    assert error.square().sum() / variance.sum() == pytest.approx(1, abs=0.05)


@CASES
def test_the_variance_is_below_the_bound_of_theorem_2(name: str, d: int) -> None:
    """sqrt(3) pi^2 |q|^2 / d * 4^-b for keys of unit norm, b bits in all (arXiv 2504.19874)."""
    bits = int(name[-1])
    _, error, _ = _errors(name, d)
    g = torch.Generator().manual_seed(7)
    k = torch.nn.functional.normalize(torch.randn(VECTORS, d, generator=g), dim=-1)
    q = k + torch.randn(VECTORS, d, generator=g) * d**-0.5
    bound = math.sqrt(3) * math.pi**2 * q.double().square().sum(-1) / d * 4.0**-bits
    assert error.square().mean() < bound.mean()
    assert (error.square().mean(0) / bound).mean() < 0.9


def test_signs_and_norm_are_those_of_the_residual() -> None:
    fmt = KVFormat.from_name("qjl3", 64, seed=2)
    k = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    packed = quantize(k, fmt, "k")
    assert set(packed.residual_signs.unique().tolist()) == {0, 1}
    with_residual = dequantize(packed, fmt, "k", rotated=True)
    norm, packed.residual_norm = packed.residual_norm, torch.zeros_like(packed.residual_norm)
    residual = rotate(k, 2) - dequantize(packed, fmt, "k", rotated=True)
    torch.testing.assert_close(norm.float(), residual.norm(dim=-1), rtol=2.0**-11, atol=0)
    correction = with_residual - dequantize(packed, fmt, "k", rotated=True)
    cosine = torch.cosine_similarity(correction, residual, dim=-1)
    assert cosine.mean() == pytest.approx((math.pi / 2 + 1) ** -0.5, abs=0.03)
    assert quantize(k, fmt, "v").residual_signs is None
