"""What tells a tie of the scale search from an error: a float64 search ties now and then, and planted errors are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_checks import check_vectors, pick
from kvturbo import KVFormat, Packed, quantize
from kvturbo.codebook import CODEBOOKS
from kvturbo.config import SIDES, Side
from kvturbo.quantizer import SEARCH_STEPS, encode_int8, to_fp16_scale
from kvturbo.rotation import hadamard_matrix, signs
from near_codes import explained
from support import channels_for

HEADS = 2
SIZES = torch.tensor([1.0, 3.0, 100.0, 0.01, 1e-7])


def vectors(fmt: KVFormat, count: int) -> Tensor:
    x = torch.randn(count, HEADS, fmt.head_dim, generator=torch.Generator().manual_seed(1))
    return x * SIZES[torch.arange(count) % len(SIZES)][:, None, None]


def other_rounding(x: Tensor, fmt: KVFormat, side: Side, channels: Tensor | None) -> Packed:
    """What `quantize` gives when rotation and search are in float64."""
    y, outliers = x.double(), (None, None)
    if fmt.side(side).outliers:
        assert channels is not None
        index = channels.expand(*x.shape[:-1], -1)
        outliers = encode_int8(x.gather(-1, index))
        y = y.scatter(-1, index, 0.0)
    if fmt.side(side).rotate:
        y = y @ (hadamard_matrix(fmt.head_dim) * signs(fmt.head_dim, fmt.seed) * fmt.head_dim**-0.5).T
    book = CODEBOOKS[fmt.side(side).parts[0].bits]
    rms, size = y.square().mean(-1, keepdim=True).sqrt(), y.abs()
    thresholds, levels = (torch.tensor(t, dtype=torch.float64) for t in (book.thresholds, book.magnitudes))
    steps = SEARCH_STEPS if fmt.side(side).parts[0].search else (1.0,)
    index = torch.stack([torch.bucketize(size / (rms * step / book.T), thresholds) for step in steps])
    dot, cc = (size * levels[index]).sum(-1), levels[index].square().sum(-1)
    best = (dot * dot / cc).argmax(0, keepdim=True)
    codes = index.gather(0, best.unsqueeze(-1).expand(1, *size.shape))[0] + (y < 0).long() * len(levels)
    scale = y.square().sum(-1) / dot.gather(0, best)[0] * book.T
    return Packed(codes.to(torch.uint8), to_fp16_scale(scale.float()).unsqueeze(-1), *outliers)


@pytest.mark.parametrize("name,head_dim", [("lite4", 80), ("k4v4-o16", 80), ("k3v3", 128), ("k2v2", 112)])
def test_float64_searches_differ_now_and_then_and_rounding_explains_all_of_it(name: str, head_dim: int) -> None:
    fmt = KVFormat.from_name(name, head_dim, seed=1)
    x, channels = vectors(fmt, 12_000), channels_for(fmt, HEADS)
    differing = 0
    for side in SIDES:
        wanted, got = quantize(x, fmt, side, channels), other_rounding(x, fmt, side, channels)
        check_vectors(fmt, side, wanted, got, x, channels)
        differing += int((wanted.codes != got.codes).any(-1).sum())
    assert differing > 0 or name == "k2v2", "nothing to explain: the test shows nothing"


def another_scale(packed: Packed, x: Tensor, fmt: KVFormat) -> Packed:
    """Codes of the best of the scales that the search has not picked, for a format that is not rotated."""
    book = CODEBOOKS[4]
    size, levels = x.abs(), torch.tensor(book.magnitudes)
    unit = x.square().mean(-1, keepdim=True).sqrt() / book.T
    for step in SEARCH_STEPS:
        index = torch.bucketize(size / (unit * step), torch.tensor(book.thresholds))
        if (index != packed.codes % 8).any():
            scale = x.square().sum(-1) / (size * levels[index]).sum(-1) * book.T
            return replace(packed, codes=(index + 8 * (x < 0)).to(torch.uint8), scales=scale.half().unsqueeze(-1))
    raise AssertionError("all scales give the same codes")


def changed(field: Tensor, by: int) -> Tensor:
    field = field.clone()
    field[..., 7] ^= by
    return field


ERRORS = {
    "an element one level off": lambda p, x, fmt: replace(p, codes=changed(p.codes, 1)),
    "a sign": lambda p, x, fmt: replace(p, codes=changed(p.codes, 8)),
    "a scale two units off": lambda p, x, fmt: replace(p, scales=(p.scales.view(torch.int16) + 3).view(torch.float16)),
    "a scale that is not the best": another_scale,
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_not_explained(kind: str) -> None:
    fmt = KVFormat.from_name("lite4", 80)
    x = vectors(fmt, 4)[1:2, :1]
    packed = quantize(x, fmt, "v")
    assert explained(packed, x, fmt, "v", None).all()
    assert not explained(ERRORS[kind](packed, x, fmt), x, fmt, "v", None).any()


@pytest.mark.parametrize("name", ["k8v4", "k4v4-o16"])
def test_an_int8_code_one_step_off_is_not_explained(name: str) -> None:
    fmt = KVFormat.from_name(name, 80)
    x, channels = vectors(fmt, 3), channels_for(fmt, HEADS)
    packed = quantize(x, fmt, "k", channels)
    field = "codes" if packed.outliers is None else "outliers"
    assert explained(packed, x, fmt, "k", channels).all()
    wrong = replace(packed, **{field: changed(getattr(packed, field), 1)})
    assert not explained(wrong, x, fmt, "k", channels).any()


def test_an_unexplained_vector_is_named() -> None:
    fmt = KVFormat.from_name("k4v4-o16", 80)
    x, channels = vectors(fmt, 2000), channels_for(fmt, HEADS)
    wanted = quantize(x, fmt, "k", channels)
    got = pick(wanted, (slice(None),))
    got.codes = got.codes.clone()
    got.codes[1234, 1, 3] ^= 1
    with pytest.raises(AssertionError, match=r"vectors \[\[1234, 1\]\] of side k: no rounding explains"):
        check_vectors(fmt, "k", wanted, got, x, channels)
