"""Which codes a kernel may store where the reference stores others: those that rounding explains, found in float64.

Rounding explains a different code in two ways: two scales of the search are equally good, or an element lies on a threshold of the
scale that was picked (at 8 bits: halfway between two steps). Of normal vectors about 1 of 10,000 has one or the other. Everything
else is an error of the kernel, however little it moves the distortion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo import KVFormat, Packed
from kvturbo.codebook import CODEBOOKS, Codebook
from kvturbo.config import Side
from kvturbo.quantizer import SEARCH_STEPS
from kvturbo.rotation import hadamard_matrix, signs

ON_A_THRESHOLD = 4e-6
"""Distance of an element from a threshold that fp32 may see on the other side, in units of the vector's rms."""
EQUALLY_GOOD = 4e-6
"""Relative difference of two scales' objectives that fp32 may see the other way round."""
HALFWAY = 0.501
"""Distance from an int8 code, in steps, at which it may still be the nearest."""


def explained(got: Packed, x: Tensor, fmt: KVFormat, side: Side, channels: Tensor | None) -> Tensor:
    """Whether rounding explains the codes of finite vectors.

    Args:
        got: codes of [n, heads, d] vectors.
        x: the vectors, fp32.
        fmt, side: their format.
        channels: [heads, o] or [n, heads, o] outlier channels, or None.

    Returns:
        [n, heads] bool.
    """
    form, x = fmt.side(side), x.double()
    good = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    if got.outliers is not None:
        assert channels is not None and got.outlier_scale is not None
        index = channels.expand(*x.shape[:-1], -1)
        good &= nearest_steps(got.outliers, got.outlier_scale, x.gather(-1, index))
        x = x.scatter(-1, index, 0.0)
    y = x
    if form.rotate:
        matrix = hadamard_matrix(fmt.head_dim).to(x.device) * signs(fmt.head_dim, fmt.seed, x.device)
        y = x @ (matrix * fmt.head_dim**-0.5).T
    part = form.parts[0]
    if part.bits == 8:
        return good & nearest_steps(got.codes, got.scales[..., 0], y)
    return good & searched(got, y, CODEBOOKS[part.bits], SEARCH_STEPS if part.search else (1.0,))


def nearest_steps(codes: Tensor, step: Tensor, y: Tensor) -> Tensor:
    """Whether every int8 code is a nearest one, given the step that is stored with it, which is the largest size over 127."""
    stored = step.double()
    wanted = (y.abs().amax(-1) / 127).clamp(max=65504.0)
    right = (stored - wanted).abs() <= wanted * 2**-10 + 2.0**-24
    steps = torch.where(stored.unsqueeze(-1) > 0, y / stored.unsqueeze(-1), 0.0).clamp(-127, 127)
    return right & ((codes.view(torch.int8).double() - steps).abs() <= HALFWAY).all(-1)


def searched(got: Packed, y: Tensor, book: Codebook, steps: tuple[float, ...]) -> Tensor:
    """Whether the codes belong to a scale that is as good as the best, and the stored scale to the codes."""
    size, rms = y.abs(), y.square().mean(-1, keepdim=True).sqrt()
    sign_bit = book.bits - 1
    index = (got.codes & ((1 << sign_bit) - 1)).long()
    negative = (got.codes >> sign_bit).bool()
    levels = torch.tensor(book.magnitudes, dtype=torch.float64, device=y.device)
    edges = torch.tensor([-torch.inf, *book.thresholds, torch.inf], dtype=torch.float64, device=y.device)
    margin = ON_A_THRESHOLD * rms
    fits, objective = [], []
    for step in steps:
        unit = rms * step / book.T
        low, high = (torch.where(e.isinf(), e, e * unit) for e in (edges[index], edges[index + 1]))
        fits.append(((size > low - margin) & (size <= high + margin)).all(-1) | (rms == 0).squeeze(-1))
        own = levels[torch.bucketize(size / unit.clamp(min=1e-300), edges[1:-1])]
        objective.append((size * own).sum(-1).square() / own.square().sum(-1))
    best = torch.stack(objective).amax(0)
    as_good = torch.stack([o >= best * (1 - EQUALLY_GOOD) for o in objective])
    scale = (y.square().sum(-1) / (size * levels[index]).sum(-1) * book.T).nan_to_num(0.0)
    stored = got.scales[..., 0].double()
    right = (stored - scale.clamp(max=65504.0)).abs() <= scale * 2**-10 + 2.0**-24
    signed = ((y < 0) == negative) | (size <= margin)
    return (torch.stack(fits) & as_good).any(0) & signed.all(-1) & right
