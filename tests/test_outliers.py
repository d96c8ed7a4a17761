"""Outlier channels: which are chosen, and that they remove the harm that a key bias does."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvturbo import KVFormat, choose_outlier_channels, dequantize, quantize
from kvturbo.outliers import rope_pairs

KEYS, QUERIES, D = 4_096, 64, 128
PAIRS = [3, 10, 17, 25, 33, 41, 52, 63]
BIASED = sorted(PAIRS + [p + D // 2 for p in PAIRS])


def _rope(x: Tensor) -> Tensor:
    """Row n of x turned as token n: channels i and i + d / 2 by n * 10000^(-2i / d)."""
    n, d = x.shape
    angle = torch.arange(n)[:, None].double() * 10000.0 ** (-2 * torch.arange(d // 2).double() / d)
    a, b = x.double().split(d // 2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1).float()


@cache
def _keys(bias: str) -> Tensor:
    """Normal keys; with a bias of ten times their deviation on 16 channels: none, constant, or turned by RoPE with its key."""
    g = torch.Generator().manual_seed(11)
    noise = torch.randn(KEYS, D, generator=g)
    offset = torch.zeros(D)
    offset[BIASED] = 10 * torch.randn(len(BIASED), generator=g).sign()
    return noise + {"none": 0, "constant": 1, "rope": 1}[bias] * (
        _rope(offset.expand(KEYS, D)) if bias == "rope" else offset
    )


@cache
def _logit_error(name: str, bias: str) -> float:
    """Rms over queries and keys of the logits' error, its mean over keys removed (softmax does not see the mean)."""
    k, fmt = _keys(bias), KVFormat.from_name(name, D)
    channels = None
    if fmt.outliers:
        channels = choose_outlier_channels(k.double().square().mean(0)[None], fmt.channel_count)[0]
    k_hat = dequantize(quantize(k, fmt, "k", channels), fmt, "k", channels)
    q = torch.randn(QUERIES, D, generator=torch.Generator().manual_seed(12))
    error = (q @ (k_hat - k).T).double()
    return float((error - error.mean(-1, keepdim=True)).square().mean().sqrt())


@pytest.mark.parametrize("bias", ["constant", "rope"])
def test_outliers_remove_the_harm_of_a_bias(bias: str) -> None:
    assert _logit_error("k4v4-o16", bias) <= 1.05 * _logit_error("k4v4-o16", "none")


@pytest.mark.parametrize("bias", ["constant", "rope"])
def test_without_outliers_the_harm_is_real(bias: str) -> None:
    assert _logit_error("k4v4", bias) >= 3 * _logit_error("k4v4", "none")
    assert _logit_error("k4v4", bias) >= 3 * _logit_error("k4v4-o16", "none")


@pytest.mark.parametrize("bias", ["constant", "rope"])
def test_the_biased_channels_are_chosen(bias: str) -> None:
    assert choose_outlier_channels(_keys(bias).square().mean(0)[None], 16).tolist() == [BIASED]


def test_a_variance_would_not_see_a_constant_bias() -> None:
    by_variance = choose_outlier_channels(_keys("constant").var(0)[None], 16)[0].tolist()
    assert len(set(by_variance) & set(BIASED)) < 8


@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_outlier_channels_are_int8_and_the_rest_is_as_without_them(d: int) -> None:
    fmt = KVFormat.from_name("k3v3-o16", d)
    channels = torch.randperm(d, generator=torch.Generator().manual_seed(d))[:16]
    k = torch.randn(200, d, generator=torch.Generator().manual_seed(1))
    k[:, channels] *= 300
    k_hat = dequantize(quantize(k, fmt, "k", channels), fmt, "k", channels)
    step = k[:, channels].abs().amax(-1, keepdim=True) / 127
    assert ((k_hat - k)[:, channels].abs() <= step * (0.5 + 127 * 2.0**-11)).all()
    rest = k.scatter(-1, channels.expand(200, 16), 0.0)
    plain = KVFormat.from_name("k3v3", d)
    expected = dequantize(quantize(rest, plain, "k"), plain, "k").scatter(-1, channels.expand(200, 16), 0.0)
    assert torch.equal(k_hat.scatter(-1, channels.expand(200, 16), 0.0), expected)


def test_every_head_may_have_its_own_channels() -> None:
    fmt = KVFormat.from_name("k4v4-o16", 64)
    channels = torch.stack([torch.arange(h, h + 32, 2) for h in range(3)])
    k = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(1))
    k_hat = dequantize(quantize(k, fmt, "k", channels), fmt, "k", channels)
    for h in range(3):
        alone = dequantize(quantize(k[:, h], fmt, "k", channels[h]), fmt, "k", channels[h])
        torch.testing.assert_close(k_hat[:, h], alone)


@pytest.mark.parametrize("side", ["k", "v"])
def test_tq_parts_are_the_given_channels_and_the_others(side: str) -> None:
    """Each part is a vector of its own: what one part holds does not change the other. Values always split at a quarter."""
    fmt = KVFormat.from_name("tq3.5", 64)
    channels = torch.tensor([1, 62, 5, 40, 33, 20, 8, 11, 50, 51, 52, 53, 2, 3, 4, 30])
    first = channels if side == "k" else torch.arange(16)
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[:, first] *= -7
    a, b = (quantize(v, fmt, side, channels) for v in (x, changed))
    assert torch.equal(a.codes[:, 16:], b.codes[:, 16:])
    assert torch.equal(a.scales[:, 1], b.scales[:, 1])
    assert not torch.equal(a.scales[:, 0], b.scales[:, 0])
    assert torch.equal(a.codes[:, :16] ^ 8, b.codes[:, :16]), "minus seven times: the same magnitudes, other signs"
    error = (dequantize(a, fmt, side, channels) - x).square()
    others = [c for c in range(64) if c not in first.tolist()]
    assert error[:, first].mean() < 0.012 < 0.02 < error[:, others].mean()


@given(
    pairing=st.sampled_from(["half", "interleaved"]),
    head_dim=st.sampled_from([64, 80, 128]),
    count=st.sampled_from([0, 2, 16, 32]),
    seed=st.integers(0, 2**31),
    part=st.sampled_from([0, 0.25, 0.5, 1]),
)
def test_whole_pairs_are_chosen_the_same_number_in_every_head(
    pairing: str, head_dim: int, count: int, seed: int, part: float
) -> None:
    rotary_dim = int(head_dim * part) // 2 * 2
    moment = torch.rand(2, 3, head_dim, generator=torch.Generator().manual_seed(seed)) ** 4
    chosen = choose_outlier_channels(moment, count, pairing=pairing, rotary_dim=rotary_dim)
    assert chosen.shape == (2, 3, count)
    assert chosen.dtype == torch.int64
    partner = {}
    for a, b in rope_pairs(head_dim, pairing, rotary_dim).tolist():
        partner |= {a: b, b: a}
    assert sorted(partner) == list(range(head_dim))
    for head, energy in zip(chosen.view(6, count).tolist(), moment.view(6, head_dim).double(), strict=True):
        assert head == sorted(set(head))
        assert {partner[c] for c in head} == set(head)
        pair = torch.tensor([float(energy[c] + energy[partner[c]]) for c in range(head_dim)])
        rest = [c for c in range(head_dim) if c not in head]
        assert not head or not rest or pair[head].min() >= pair[rest].max() - 1e-12


def test_pairs_of_rope() -> None:
    assert rope_pairs(8).tolist() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert rope_pairs(8, "interleaved").tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert rope_pairs(8, rotary_dim=4).tolist() == [[0, 2], [1, 3], [4, 5], [6, 7]]


def test_the_choice_is_the_same_before_and_after_rope() -> None:
    """Turning a pair keeps the sum of its two second moments."""
    raw = torch.randn(1_000, D, generator=torch.Generator().manual_seed(1)) * torch.linspace(1, 2, D)
    raw[:, [5, 9, 100]] += 6
    before, after = (choose_outlier_channels(x.square().mean(0)[None], 16) for x in (raw, _rope(raw)))
    assert torch.equal(before, after)


def test_of_equal_pairs_the_first_are_chosen() -> None:
    assert choose_outlier_channels(torch.ones(1, 64), 4).tolist() == [[0, 1, 32, 33]]


@pytest.mark.parametrize("count", [-2, 3, 66])
def test_a_wrong_count_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=rf"must be even and from 0 to 64, got {count}$"):
        choose_outlier_channels(torch.ones(1, 64), count)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_second_moments_that_cannot_be_are_refused(bad: float) -> None:
    moment = torch.ones(1, 64)
    moment[0, 3] = bad
    with pytest.raises(ValueError, match="second moments must be finite and not negative, got"):
        choose_outlier_channels(moment, 16)


@pytest.mark.parametrize("rotary_dim", [-2, 7, 66])
def test_a_wrong_rotary_dim_is_refused(rotary_dim: int) -> None:
    with pytest.raises(ValueError, match=f"rotary_dim must be even and from 0 to head_dim 64, got {rotary_dim}"):
        rope_pairs(64, rotary_dim=rotary_dim)


def test_a_wrong_pairing_is_refused() -> None:
    with pytest.raises(ValueError, match="pairing must be 'half' or 'interleaved', got 'none'"):
        rope_pairs(64, "none")  # type: ignore[arg-type]
