"""The excess predicts the noise that quantised keys bring into scores, and the choice follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvturbo.config import KVFormat
from kvturbo.guard import LayerMoments, choose_format, key_excess, make_plan, value_excess
from kvturbo.guard.merit import candidates, channels_for, distortion
from kvturbo.quantizer import dequantize, quantize

D = 128


def moments(key: torch.Tensor, query: torch.Tensor, value_mean: float = 0.0) -> LayerMoments:
    """Of one head whose channels have these second moments [D] and whose values are normal around a constant."""
    mean = torch.full((1, D), value_mean, dtype=torch.float64)
    return LayerMoments(key.double()[None], query.double()[None], 1 + mean.square(), mean)


def biased(size: float, pairs: int = 4) -> torch.Tensor:
    """Second moments of keys of variance 1 with a constant of `size` times their norm in some pairs."""
    key = torch.ones(D)
    channels = torch.cat((torch.arange(pairs), D // 2 + torch.arange(pairs))) + 3
    key[channels] += size**2 * D / len(channels)
    return key


EVEN = torch.ones(D)


def test_even_channels_have_no_excess() -> None:
    assert float(key_excess(moments(EVEN, EVEN), "k4v4")) == pytest.approx(1)
    assert float(key_excess(moments(4 * EVEN, 9 * EVEN), "k2v2")) == pytest.approx(1)


@pytest.mark.parametrize("name", ["k4v4", "k3v2", "k2v2", "k8v4", "k4v4-o16", "k3v3-o32"])
@pytest.mark.parametrize("case", ["bias", "scales"])
def test_the_excess_is_the_measured_noise(name: str, case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, D, generator=generator)
    if case == "bias":
        key, x = biased(10), noise + (biased(10) - 1).sqrt() * torch.sign(torch.randn(D, generator=generator))
    else:
        scale = torch.exp(torch.randn(D // 2, generator=generator)).repeat(2)
        key, x = scale.square(), noise * scale
    query = 1 / key
    own = moments(key, query)
    fmt = KVFormat.from_name(name, D)
    channels = channels_for(own, fmt.outliers)[0] if fmt.outliers else None
    error = x - dequantize(quantize(x, fmt, "k", channels), fmt, "k", channels)
    q = torch.randn(4000, D, generator=generator) * query.sqrt()
    measured = float((q * error).sum(1).square().mean())
    least = (
        distortion("k4v4", D) / D * float((key[: D // 2] * 2 * query[: D // 2] * 2).sqrt().sum()) ** 2
    )  # = 2 in all pairs
    predicted = float(key_excess(own, name, "k4v4"))
    # A constant that swamps the rest is quantised to the same codes over and over: its error is no draw of a normal one's.
    assert predicted / 2.5 < measured / least < predicted * 2.5


def test_a_pairs_turn_changes_nothing() -> None:
    key = biased(10)
    turned = key.clone()
    turned[3], turned[3 + D // 2] = 0.25 * (key[3] + key[67]), 0.75 * (key[3] + key[67])
    a, b = (float(key_excess(moments(x, EVEN), "k4v4")) for x in (key, turned))
    assert a == pytest.approx(b)


def test_formats_by_need() -> None:
    blind = EVEN.where(biased(10) == 1, 0.0)
    assert choose_format(moments(EVEN, EVEN)) == "k4v4"
    assert choose_format(moments(biased(10), blind)) == "k4v4-o16"
    assert choose_format(moments(biased(10, pairs=12), EVEN.where(biased(10, 12) == 1, 0.0))) == "k4v4-o32"
    scales = torch.exp(torch.randn(D // 2, generator=torch.Generator().manual_seed(0))).repeat(2)
    assert choose_format(moments(scales.square(), 1 / scales.square())) == "k8v4"
    assert choose_format(moments(biased(300), EVEN)) == "16bit"


def test_a_format_that_is_chosen_is_within_the_limit_and_a_cheaper_one_is_not() -> None:
    for size in (0.5, 1, 2, 5, 20, 100):
        for base in ("k4v4", "k3v2", "k2v2"):
            own = moments(biased(size), EVEN)
            chosen = choose_format(own, base)
            names = candidates(base, D)
            assert float(key_excess(own, chosen, base)) <= 2
            assert all(float(key_excess(own, name, base)) > 2 for name in names[: names.index(chosen)])


def test_one_head_decides_for_its_layer() -> None:
    blind = EVEN.where(biased(10) == 1, 0.0)
    one, other = moments(EVEN, EVEN), moments(biased(10), blind)
    both = replace(one, **{
        name: torch.cat((getattr(one, name), getattr(other, name))) for name in ("key", "query", "value", "value_mean")
    })  # fmt: skip
    assert choose_format(both) == "k4v4-o16"


def test_values_with_a_mean_need_16_bits() -> None:
    assert float(value_excess(moments(EVEN, EVEN, 3.0))) == pytest.approx(10)
    assert choose_format(moments(EVEN, EVEN, 3.0)) == "16bit"
    assert choose_format(moments(EVEN, EVEN, 0.5)) == "k4v4"


def test_a_head_without_keys_or_values_is_even() -> None:
    nothing = torch.zeros(1, D, dtype=torch.float64)
    own = LayerMoments(nothing, nothing, nothing, nothing)
    assert choose_format(own) == "k4v4"


def test_a_plan_has_channels_for_every_count() -> None:
    plan = make_plan({3: moments(biased(10), EVEN.where(biased(10) == 1, 0.0))}, source="a test")
    layer = plan.layers[3]
    assert sorted(layer.channels) == [16, 32]
    assert set(range(3, 7)) | set(range(67, 71)) <= set(layer.channels[16][0])
    assert layer.key_excess == pytest.approx(101, rel=0.2)
    assert plan.channels(32)[3].shape == (1, 32)


@pytest.mark.parametrize(
    "base, limit, words",
    [
        ("k4v4-o16", 2.0, "one of k4v4, .*k8v4, got 'k4v4-o16'"),
        ("tq2.5", 2.0, "'tq2.5'"),
        ("k4v4", 0.5, "at least 1.*0.5"),
    ],
)
def test_bad_input(base: str, limit: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        choose_format(moments(EVEN, EVEN), base, limit)
