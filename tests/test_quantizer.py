"""The codec: distortion, norms and bias against stated bounds, golden codes, edge values and bad input."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from golden import codec_spec
from kvturbo import KVFormat, Packed, dequantize, format_names, quantize
from kvturbo.codebook import CODEBOOKS
from kvturbo.config import HEAD_DIMS, Part
from kvturbo.quantizer import encode_int8, encode_part, to_fp16_scale
from kvturbo.rotation import rotate

ROOT = Path(__file__).parent
GOLDEN = json.loads((ROOT / "golden/codec.json").read_text())
CODEC_MD = (ROOT.parent / "docs/codec.md").read_text()
FP16_ROUNDING = 2.0**-11


def _normal(n: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def _there_and_back(x: Tensor, name: str, side: str) -> Tensor:
    fmt = KVFormat.from_name(name, x.shape[-1])
    channels = torch.arange(fmt.channel_count) if fmt.channel_count and side == "k" else None
    return dequantize(quantize(x, fmt, side, channels), fmt, side, channels)


def _distortion(x: Tensor, x_hat: Tensor) -> float:
    return float((x - x_hat).double().square().sum() / x.double().square().sum())


# E[1 - cos^2] of y and its levels c at d = 128, the least error that any scale reaches, by direct computation.
LEAST_ERROR = {4: 0.0081, 3: 0.0319, 2: 0.1153}


@pytest.mark.parametrize("name, bits", [("k4v4", 4), ("k3v3", 3), ("k2v2", 2)])
@pytest.mark.parametrize("side", ["k", "v"])
def test_distortion_is_that_of_the_unbiased_scale(name: str, bits: int, side: str) -> None:
    """1 / cos^2 - 1 instead of the least 1 - cos^2, and least squares on the same codes gives that."""
    x = _normal(20_000, 128)
    x_hat = _there_and_back(x, name, side)
    least = LEAST_ERROR[bits]
    assert _distortion(x, x_hat) == pytest.approx(least / (1 - least), rel=0.01)
    shrunk = x_hat * ((x * x_hat).sum(-1) / x_hat.square().sum(-1)).unsqueeze(-1)
    assert _distortion(x, shrunk) == pytest.approx(least, rel=0.01)


@pytest.mark.parametrize("d", [80, 96, 112, 128, 192])
def test_four_spiky_channels_are_spread(d: int) -> None:
    x = _normal(20_000, d)
    x[:, [0, 17, 18, d - 1]] *= 8
    bound = 0.0080 / (1 - 0.0080)
    assert _distortion(x, _there_and_back(x, "k4v4", "v")) <= bound
    assert _distortion(x, _there_and_back(x, "k4v4", "k")) <= bound


def test_without_rotation_spiky_channels_are_not_spread() -> None:
    x = _normal(2_000, 128)
    x[:, [0, 17, 18, 127]] *= 8
    assert _distortion(x, _there_and_back(x, "lite4", "v")) > 2 * 0.0080


def _vectors(d: int) -> Tensor:
    """Normal, spiky and constant vectors of all magnitudes."""
    x = _normal(600, d)
    x[200:400, :4] *= 20
    x[400:] = x[400:].abs() + 1
    return x * torch.logspace(-2, 3, 600).unsqueeze(-1)


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2", "lite4"])
@pytest.mark.parametrize("side", ["k", "v"])
def test_vectors_are_unbiased_one_by_one(name: str, d: int, side: str) -> None:
    x = _vectors(d).double()
    x_hat = _there_and_back(x.float(), name, side).double()
    bias = (x * x_hat).sum(-1) / x.square().sum(-1) - 1
    assert bias.abs().max() <= 1e-3
    assert bias.abs().max() <= FP16_ROUNDING * 1.02, "all of it is rounding of the scale"


@pytest.mark.parametrize("name", ["k4v4", "k4v3", "k4v2"])
def test_what_values_have_in_common_keeps_its_size(name: str) -> None:
    """Values c + n with c and n alike: <c, x^> + <n, x^> = |x|^2, so c comes back whole, less 1 - E[cos^2] with least squares."""
    groups, each = 256, 64
    common = _normal(groups, 128, seed=2).unsqueeze(1)
    values = common + _normal(groups * each, 128, seed=3).view(groups, each, 128)
    mean, restored = ((common * x).sum(-1).mean(1).double() for x in (values, _there_and_back(values, name, "v")))
    slope = restored.sum() / mean.sum()
    deviation = 4 * (restored - slope * mean).std() / mean.mean() / groups**0.5
    assert abs(slope - 1) <= deviation
    assert deviation < LEAST_ERROR[int(name[-1])] / 2, "the test can see what least squares takes off"


@pytest.mark.parametrize("name, bits", [("k4v4", 4), ("k4v3", 3), ("k4v2", 2)])
def test_the_scale_is_the_squared_norm_over_the_product_with_the_levels(name: str, bits: int) -> None:
    fmt, x = KVFormat.from_name(name, 96), _normal(50, 96)
    packed = quantize(x, fmt, "v")
    y = rotate(x, 0).double()
    c = torch.tensor(CODEBOOKS[bits].levels, dtype=torch.float64)[packed.codes.int()] / CODEBOOKS[bits].T
    expected = y.square().sum(-1) / (y * c).sum(-1)
    torch.testing.assert_close(packed.scales[:, 0].double(), expected, rtol=FP16_ROUNDING * 1.01, atol=0)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: "{format}-{head_dim}-{side}".format(**c))
def test_golden_codes(case: dict) -> None:
    name, d, side = case["format"], case["head_dim"], case["side"]
    fmt = KVFormat.from_name(name, d, seed=case["seed"])
    channels = {"-o": codec_spec.OUTLIER_CHANNELS, "tq": codec_spec.split_channels(d)}
    given_channels = next((torch.tensor(c) for mark, c in channels.items() if mark in name and side == "k"), None)
    packed = quantize(torch.from_numpy(codec_spec.vector(case["vector"], d)), fmt, side, given_channels)
    assert bytes(packed.codes.tolist()).hex() == case["codes"]
    assert packed.scales.tolist() == case["scales"]
    for field in ("outliers", "residual_signs"):
        data = getattr(packed, field)
        assert (None if data is None else bytes(data.tolist()).hex()) == case.get(field)
    for field in ("outlier_scale", "residual_norm"):
        data = getattr(packed, field)
        assert (None if data is None else data.item()) == case.get(field)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_search_is_never_worse_than_no_search(bits: int) -> None:
    y = _normal(3_000, 128)
    cosine = {}
    for search in (True, False):
        codes, _ = encode_part(y, Part(128, bits, "unbiased", search))
        levels = torch.tensor(CODEBOOKS[bits].levels)[codes.int()]
        cosine[search] = torch.cosine_similarity(y.double(), levels.double(), dim=-1)
    assert (cosine[True] >= cosine[False] - 1e-7).all()
    gain = 10 * math.log10((1 - cosine[False].square()).mean() / (1 - cosine[True].square()).mean())
    assert gain > {4: 0.40, 3: 0.15}[bits], "decibels at d = 128"


def test_of_equally_good_scales_the_smallest_is_taken() -> None:
    """With |y| constant every scale fits exactly; the smallest, 0.88 rms, puts 1 / 0.88 = 1.14 on magnitude 4."""
    y = torch.ones(2, 128)
    y[0, ::3] = -1
    codes, scale = encode_part(y, Part(128, 4, "unbiased", search=True))
    assert (codes & 7 == 4).all()
    assert torch.equal(codes >> 3 == 1, y < 0)
    assert scale.tolist() == [torch.tensor(41.86 / 52.5).half().item()] * 2


def test_magnitudes_change_at_the_midpoint_and_zero_is_positive() -> None:
    part, threshold = Part(2, 2, "unbiased", search=False), 77 / 78.46
    below = math.sqrt(1 / (2 / threshold**2 - 1))  # times another 1: on the threshold in units of rms
    for factor, index in ((0.9999, 0), (1.0001, 1)):
        codes, _ = encode_part(torch.tensor([[below * factor, 1.0]]), part)
        assert codes.tolist() == [[index, 1]]
    codes, _ = encode_part(torch.tensor([[0.0, -0.0, 1, -1]]), Part(4, 2, "unbiased", search=False))
    assert codes.tolist() == [[0, 0, 1, 3]]


@given(d=st.sampled_from(HEAD_DIMS), index=st.integers(0, 99), side=st.sampled_from("kv"), exponent=st.integers(-6, 6))
def test_a_power_of_two_scales_the_scale_and_nothing_else(d: int, index: int, side: str, exponent: int) -> None:
    names = format_names(d)
    fmt = KVFormat.from_name(names[index % len(names)], d)
    channels = torch.arange(fmt.channel_count)
    x = _normal(3, d, seed=index)
    packed, scaled = quantize(x, fmt, side, channels), quantize(x * 2.0**exponent, fmt, side, channels)
    assert torch.equal(packed.codes, scaled.codes)
    for a, b in (
        (packed.scales, scaled.scales),
        (packed.outlier_scale, scaled.outlier_scale),
        (packed.residual_norm, scaled.residual_norm),
    ):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a.double() * 2.0**exponent, b.double())


@given(
    d=st.sampled_from(HEAD_DIMS),
    index=st.integers(0, 99),
    side=st.sampled_from("kv"),
    leading=st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3)]),
)
def test_vectors_are_independent_of_their_company(d: int, index: int, side: str, leading: tuple[int, ...]) -> None:
    names = format_names(d)
    fmt = KVFormat.from_name(names[index % len(names)], d)
    channels = torch.arange(fmt.channel_count) if fmt.channel_count else None
    x = torch.randn(*leading, d, generator=torch.Generator().manual_seed(index))
    packed = quantize(x, fmt, side, channels)
    assert packed.codes.shape == x.shape
    assert packed.scales.shape == (*leading, len(fmt.side(side).parts))
    x_hat = dequantize(packed, fmt, side, channels)
    assert x_hat.shape == x.shape
    assert x_hat.dtype == torch.float32
    for i, row in enumerate(x.view(-1, d)):
        alone = quantize(row, fmt, side, channels)
        assert torch.equal(alone.codes, packed.codes.view(-1, d)[i])
        torch.testing.assert_close(dequantize(alone, fmt, side, channels), x_hat.view(-1, d)[i])


@pytest.mark.parametrize("name", ["k4v4", "k3v2", "k8v4", "lite4", "qjl4"])
def test_the_rotated_form_is_the_rotation_of_the_vector(name: str) -> None:
    fmt, x = KVFormat.from_name(name, 80), _normal(20, 80)
    for side in ("k", "v"):
        packed = quantize(x, fmt, side)
        plain, rotated = dequantize(packed, fmt, side), dequantize(packed, fmt, side, rotated=True)
        expected = rotate(plain, fmt.seed) if fmt.side(side).rotate else plain
        torch.testing.assert_close(rotated, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", format_names(128))
def test_zero_vectors_are_zero_again(name: str) -> None:
    x = _normal(3, 128)
    x[1] = 0
    for side in ("k", "v"):
        x_hat = _there_and_back(x, name, side)
        assert (x_hat[1] == 0).all()
        assert torch.isfinite(x_hat).all()
        assert _distortion(x[::2], x_hat[::2]) < 0.3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", format_names(128))
def test_nan_and_infinity_make_their_vector_nan_and_no_other(name: str, bad: float) -> None:
    fmt = KVFormat.from_name(name, 128)
    channels = torch.arange(fmt.channel_count) if fmt.channel_count else None
    for side in ("k", "v"):
        for channel in (0, 127):
            x = _normal(3, 128)
            clean = dequantize(quantize(x, fmt, side, channels), fmt, side, channels)
            x[1, channel] = bad
            x_hat = dequantize(quantize(x, fmt, side, channels), fmt, side, channels)
            assert x_hat[1].sum().isnan(), "every product with the vector is NaN"
            assert x_hat[1, channel].isnan()
            torch.testing.assert_close(x_hat[::2], clean[::2])


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2", "lite4", "qjl4", "tq2.5"])
def test_a_squared_norm_beyond_fp32_is_nan(name: str) -> None:
    for side in ("k", "v"):
        assert _there_and_back(torch.full((1, 128), 1e20), name, side).isnan().all()


@pytest.mark.parametrize("name", format_names(128))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_up_to_6e4(name: str, dtype: torch.dtype) -> None:
    """Finite whatever happens; as good as at any magnitude while the scale is below 65504 (|r| of qjl3 is not, at 2e4)."""
    largest = _normal(20, 128).sign() * 6e4
    assert torch.isfinite(_there_and_back(largest.to(dtype), name, "k")).all()
    assert torch.isfinite(_there_and_back(largest.to(dtype), name, "v")).all()
    x = _normal(50, 128).clamp(-3, 3)
    for side in "v" if name == "qjl3" else "kv":
        small, large = _there_and_back(x.to(dtype), name, side), _there_and_back((x * 2e4).to(dtype), name, side)
        assert _distortion(x * 2e4, large) == pytest.approx(_distortion(x, small), rel=0.03)


def test_scales_saturate_at_the_largest_fp16() -> None:
    scale = torch.tensor([65504.0, 65519, 65520, 1e30, math.inf])
    assert to_fp16_scale(scale).tolist() == [65504.0] * 5
    spike = torch.zeros(1, 128)
    spike[0, 0] = 1e6
    fmt = KVFormat.from_name("lite4", 128)
    packed = quantize(spike, fmt, "v")
    assert packed.scales.item() == 65504
    assert dequantize(packed, fmt, "v")[0, 0].item() == pytest.approx(65504 * 114.5 / 41.86, rel=1e-6)


def test_scales_below_the_smallest_fp16_are_zero() -> None:
    smallest = 2.0**-24
    scale = torch.tensor([0.0, 1e-45, smallest * 0.9999, smallest, 3 * smallest])
    assert to_fp16_scale(scale).tolist() == [0, 0, 0, smallest, 3 * smallest]
    assert to_fp16_scale(torch.tensor(math.nan)).isnan()


@pytest.mark.parametrize("name", format_names(128))
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e-20, 1e-10, 2.0**-24, 2.0**-20, 2.0**-14])
def test_tiny_vectors_stay_tiny(name: str, size: float) -> None:
    """Never NaN. The scale is a denormal or 0: a fixed error per channel, 2^-24 or 127 times that where it is an int8 step."""
    int8 = name == "k8v4" or "-o" in name
    slack = 128**0.5 * 2.0**-24 * (127 if int8 else 1)
    x = _normal(10, 128) * size
    for side in ("k", "v"):
        x_hat = _there_and_back(x, name, side)
        assert torch.isfinite(x_hat).all()
        assert (x_hat - x).norm(dim=-1).max() <= 0.5 * x.norm(dim=-1).max() + slack


def test_vectors_of_fp16_denormals_are_kept_as_well_as_their_scale() -> None:
    x = (_normal(200, 128) * 2.0**-17).half()
    for side in ("k", "v"):
        assert _distortion(x.float(), _there_and_back(x, "k4v4", side)) < 0.0090


def test_int8_has_the_step_of_its_fp16_scale() -> None:
    y = _normal(500, 64) * torch.logspace(-2, 3, 500).unsqueeze(-1)
    codes, step = encode_int8(y)
    assert ((step.float() - y.abs().amax(-1) / 127).abs() <= y.abs().amax(-1) / 127 * FP16_ROUNDING).all()
    signed = codes.view(torch.int8)
    assert signed.abs().max() == 127
    assert signed.min() >= -127
    error = (signed * step.float().unsqueeze(-1) - y).abs() / step.float().unsqueeze(-1)
    assert error.max() <= 0.5 + 127 * FP16_ROUNDING
    assert (error <= 0.5001).double().mean() > 0.99, "rounded with the step that is stored"


def _distortion_rows() -> list[tuple[str, ...]]:
    rows = re.findall(r"^\| `([^`]+)` \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", CODEC_MD, re.M)
    assert len(rows) == len(format_names(128)) - 1
    return rows


@pytest.mark.parametrize("row", _distortion_rows(), ids=lambda row: row[0])
def test_the_table_of_the_document(row: tuple[str, ...]) -> None:
    name, nbytes, bits, compression, key, value = row
    fmt = KVFormat.from_name(name, 128)
    assert fmt.bytes_per_token == int(nbytes)
    assert f"{fmt.bits_per_element:.3f}" == bits
    assert f"{fmt.compression:.2f}" == compression
    x = _normal(4_000, 128)
    for side, measured in (("k", key), ("v", value)):
        tolerance = 0.02 if float(measured) > 1e-4 else 0.1
        assert _distortion(x, _there_and_back(x, name, side)) == pytest.approx(float(measured), rel=tolerance)


K4V4 = KVFormat.from_name("k4v4", 128)
O16 = KVFormat.from_name("k4v4-o16", 128)
TQ = KVFormat.from_name("tq2.5", 128)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_vectors_that_are_not_floating_point_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"vectors must be floating point, got {dtype}"):
        quantize(torch.zeros(2, 128, dtype=dtype), K4V4, "k")


@pytest.mark.parametrize("shape", [(2, 64), (128, 2), (2, 129), (0,)])
def test_another_last_axis_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"'k4v4' must have head_dim 128, got shape \[") as refused:
        quantize(torch.zeros(shape), K4V4, "v")
    assert str(list(shape)) in str(refused.value)


def test_a_wrong_side_is_refused() -> None:
    with pytest.raises(ValueError, match="side must be 'k' or 'v', got 'q'"):
        quantize(torch.zeros(1, 128), K4V4, "q")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="side must be 'k' or 'v', got 'q'"):
        dequantize(quantize(torch.zeros(1, 128), K4V4, "k"), K4V4, "q")  # type: ignore[arg-type]


def test_missing_outlier_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'k4v4-o16' needs outlier_channels: 16 channel indices per KV head"):
        quantize(torch.zeros(1, 128), O16, "k")
    packed = quantize(torch.zeros(1, 128), O16, "k", torch.arange(16))
    with pytest.raises(ValueError, match=r"'k4v4-o16' needs outlier_channels"):
        dequantize(packed, O16, "k")


@pytest.mark.parametrize("fmt", [O16, TQ], ids=lambda f: f.name)
@pytest.mark.parametrize("wrong", ["fewer", "more", "int32", "float", "negative", "beyond", "twice"])
def test_wrong_outlier_channels_are_refused(fmt: KVFormat, wrong: str) -> None:
    count = fmt.channel_count
    good = torch.arange(count)
    channels = {
        "fewer": good[:-1],
        "more": torch.arange(count + 1),
        "int32": good.int(),
        "float": good.float(),
        "negative": good - 1,
        "beyond": good + 129 - count,
        "twice": good.clamp(max=count - 2),
    }[wrong]
    packed = quantize(torch.zeros(1, 128), fmt, "k", good)
    with pytest.raises(ValueError, match=r"outlier_channels .*(int64 \[\.\.\., \d+\]|from 0 to 127|distinct).*got"):
        quantize(torch.zeros(1, 128), fmt, "k", channels)
    with pytest.raises(ValueError, match="outlier_channels"):
        dequantize(packed, fmt, "k", channels)


@pytest.mark.parametrize("fmt, side", [(O16, "k"), (TQ, "k"), (TQ, "v")], ids=["o16-k", "tq-k", "tq-v"])
def test_a_rotated_form_that_does_not_exist_is_refused(fmt: KVFormat, side: str) -> None:
    packed: Packed = quantize(torch.zeros(1, 128), fmt, side, torch.arange(fmt.channel_count))
    with pytest.raises(ValueError, match=f"format '{fmt.name}' has no rotated form of its "):
        dequantize(packed, fmt, side, torch.arange(fmt.channel_count), rotated=True)


def test_values_of_an_outlier_format_have_a_rotated_form() -> None:
    packed = quantize(_normal(4, 128), O16, "v")
    torch.testing.assert_close(dequantize(packed, O16, "v", rotated=True), rotate(dequantize(packed, O16, "v"), 0))
