"""Lloyd-Max codebooks of the standard normal distribution, rounded to half-integers over a constant T.

A level is +-(m + 1/2) / T with an integer m, so the negative of a level is the bitwise NOT of m: int8 arithmetic can use
the codebook as it stands. Rounding costs 0.04 % of the distortion at 4 bits, 0.001 % at 3 and nothing at 2.

Source: S. Lloyd, "Least squares quantization in PCM", 1982; J. Max, "Quantizing for minimum distortion", 1960.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Codebook:
    """A symmetric codebook; a code is `sign << (bits - 1) | magnitude`, sign 1 for negative.

    Attributes:
        bits: bits of a code.
        magnitudes: the positive levels times T, half-integers, ascending.
        T: what a magnitude is divided by to give the level for unit variance.
    """

    bits: int
    magnitudes: tuple[float, ...]
    T: float

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """Midpoints between neighbouring magnitudes, times T. A value above the i-th has a magnitude index above i."""
        return tuple((a + b) / 2 for a, b in zip(self.magnitudes, self.magnitudes[1:], strict=False))

    @cached_property
    def levels(self) -> tuple[float, ...]:
        """The level of every code times T, by code."""
        return self.magnitudes + tuple(-m for m in self.magnitudes)


CODEBOOKS = {
    2: Codebook(2, (35.5, 118.5), 78.46),
    3: Codebook(3, (12.5, 38.5, 68.5, 109.5), 50.90),
    4: Codebook(4, (5.5, 16.5, 27.5, 39.5, 52.5, 67.5, 86.5, 114.5), 41.86),
}
