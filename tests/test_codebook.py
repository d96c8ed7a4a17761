"""Codebooks against an independent Lloyd-Max solver."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from kvturbo.codebook import CODEBOOKS

# Max (1960) and Lloyd (1982) for the standard normal distribution.
PUBLISHED = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
PUBLISHED_DISTORTION = {2: 0.11748, 3: 0.03455, 4: 0.00950}
LARGEST_LOSS_OF_ROUNDING = {2: 1e-6, 3: 2e-5, 4: 5e-4}


def _pdf(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _moments(a: float, b: float) -> tuple[float, float, float]:
    """Integrals of 1, x and x^2 times the normal density from a to b."""
    mass = (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2))) / 2
    tails = (0 if math.isinf(x) else x * _pdf(x) for x in (a, b))
    return mass, _pdf(a) - _pdf(b), mass + next(tails) - next(tails)


def _cells(levels: list[float]) -> list[tuple[float, float]]:
    """Where each positive level is the closest one."""
    bounds = [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    return list(pairwise(bounds))


def _distortion(levels: list[float]) -> float:
    total = 0.0
    for level, cell in zip(levels, _cells(levels), strict=True):
        mass, first, second = _moments(*cell)
        total += 2 * (second - 2 * level * first + level * level * mass)
    return total


def _lloyd_max(bits: int) -> list[float]:
    levels = [3 * (i + 0.5) / 2 ** (bits - 1) for i in range(2 ** (bits - 1))]
    for _ in range(3000):
        levels = [first / mass for mass, first, _ in (_moments(*cell) for cell in _cells(levels))]
    return levels


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_solver_finds_the_published_optimum(bits: int) -> None:
    assert _lloyd_max(bits) == pytest.approx(PUBLISHED[bits], abs=6e-5)
    assert _distortion(_lloyd_max(bits)) == pytest.approx(PUBLISHED_DISTORTION[bits], abs=6e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_to_half_integers_costs_almost_nothing(bits: int) -> None:
    book = CODEBOOKS[bits]
    loss = _distortion([m / book.T for m in book.magnitudes]) / _distortion(_lloyd_max(bits)) - 1
    assert 0 <= loss <= LARGEST_LOSS_OF_ROUNDING[bits]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_half_integers_that_fit_int8(bits: int) -> None:
    book = CODEBOOKS[bits]
    assert len(book.magnitudes) == 2 ** (bits - 1)
    assert all(a < b for a, b in pairwise(book.magnitudes))
    for magnitude in book.magnitudes:
        m = int(magnitude - 0.5)
        assert magnitude == m + 0.5
        assert 0 <= m <= 127
        assert ~m + 0.5 == -magnitude, "the negative of a level is the bitwise NOT of its integer"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_is_the_sign_above_the_magnitude(bits: int) -> None:
    book = CODEBOOKS[bits]
    for code, level in enumerate(book.levels):
        sign, index = code >> (bits - 1), code & (2 ** (bits - 1) - 1)
        assert level == (-1) ** sign * book.magnitudes[index]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_thresholds_are_midpoints(bits: int) -> None:
    book = CODEBOOKS[bits]
    assert [2 * t for t in book.thresholds] == [a + b for a, b in pairwise(book.magnitudes)]
