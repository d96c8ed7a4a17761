"""Codecs of other projects against what their papers and code say: bytes, and a property that a wrong one would not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvturbo.eval.affine import round_to_nearest
from kvturbo.eval.baselines.kivi import GROUP, WINDOW
from kvturbo.eval.baselines.kvarn import CHANNELS, TILE, TOKENS, evened
from kvturbo.eval.codec import Codec
from kvturbo.eval.hadamard import hadamard, inverse_hadamard, lloyd_max
from kvturbo.eval.registry import BASELINES

D = 128
BYTES = {
    "fp8": 256,
    "vllm-k8v4": 196,
    "vllm-4bit_nc": 134,
    "vllm-k3v4_nc": 118,
    "vllm-3bit_nc": 102,
    "pr38280": 190,
    "pr38280-repaired": 208,
    "kivi2": 96,
    "kivi4": 160,
    "kvarn-k4v2": 108,
    "quarot-int4": 136,
}
"""Of a token's key and value with head_dim 128: vLLM's slots before rounding up, twice pull request 38280's slot of 95, and
KVarN's tile of 13,824 bytes over 128 tokens."""


def codec_of(name: str) -> Codec:
    codec = BASELINES.get(name).codec
    assert codec is not None
    return codec


def normal(tokens: int = 1024, heads: int = 2) -> Tensor:
    return torch.randn(1, heads, tokens, D, generator=torch.Generator().manual_seed(1))


def error(codec: Codec, x: Tensor, side: str) -> float:
    """Relative squared error of a side."""
    return ((codec.restore(x, side, 0) - x).square().sum() / x.square().sum()).item()  # type: ignore[arg-type]


def test_every_baseline_has_its_bytes() -> None:
    simulated = {name for name in BASELINES.names() if BASELINES.get(name).codec is not None}
    assert simulated == set(BYTES)
    assert {name: codec_of(name).bytes_per_token(D) for name in simulated} == BYTES


@pytest.mark.parametrize("name", list(BYTES))
@pytest.mark.parametrize("side", ["k", "v"])
def test_shapes_and_inputs_stay(name: str, side: str) -> None:
    x = normal(tokens=200)
    before = x.clone()
    back = codec_of(name).restore(x, side, 0)  # type: ignore[arg-type]
    assert back.shape == x.shape and back.dtype == torch.float32 and torch.equal(x, before)
    assert not torch.equal(back, x) and torch.isfinite(back).all()


def test_fp8_has_three_bits_of_mantissa_under_one_scale() -> None:
    x = normal()
    back = codec_of("fp8").restore(x, "k", 0)
    large = x.abs() > 2**-6 * x.abs().amax()
    assert ((back - x).abs() / x.abs())[large].max() <= 2**-4 * 1.001
    x[0, 0, 0, 0] = 1e7  # one scale: the rest falls below e4m3's smallest step
    assert (codec_of("fp8").restore(x, "k", 0)[0, 1] == 0).all()


@pytest.mark.parametrize("name, bits", [("vllm-4bit_nc", 4), ("vllm-k3v4_nc", 3), ("vllm-3bit_nc", 3)])
def test_vllm_keys_are_lloyd_max_with_the_norm_kept(name: str, bits: int) -> None:
    """Norm correction: |k^| = |k| to fp16. The error is that of norm-preserving Lloyd-Max on 128 channels."""
    x = normal()
    back = codec_of(name).restore(x, "k", 0)
    torch.testing.assert_close(back.norm(dim=-1), x.norm(dim=-1), rtol=1e-3, atol=0)
    assert error(codec_of(name), x, "k") == pytest.approx({3: 0.0339, 4: 0.0092}[bits], rel=0.03)


@pytest.mark.parametrize("name, bits", [("vllm-4bit_nc", 4), ("vllm-3bit_nc", 3)])
def test_vllm_values_are_uniform_between_smallest_and_largest_and_not_rotated(name: str, bits: int) -> None:
    """Both ends are met; one large channel widens the step of its own vector, as it would not after a rotation."""
    x = normal()
    back = codec_of(name).restore(x, "v", 0)
    for end in (torch.amin, torch.amax):
        torch.testing.assert_close(end(back, -1), end(x, -1), rtol=2e-3, atol=2e-3)
    assert error(codec_of(name), x, "v") == pytest.approx({3: 0.046, 4: 0.0100}[bits], rel=0.05)
    x[..., 0] = 100.0
    rest = (codec_of(name).restore(x, "v", 0) - x)[..., 1:].square().mean()
    assert rest > 10 * (back - x)[..., 1:].square().mean()


def test_vllm_k8v4_keys_are_plain_e4m3() -> None:
    x = normal() * 300
    assert x.abs().max() > 448
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(codec_of("vllm-k8v4").restore(x, "k", 0), expected)


def test_pr38280_loses_what_it_trims() -> None:
    """Of 128 coefficients 19 are cut; on the 109 channels that is 19/128 of the energy less what padding put there, and the
    paper's 4-bit error beside it. With all codes stored only the latter is left."""
    x = normal(tokens=4096, heads=1)
    order = x.flatten(0, -2).var(dim=0).argsort(descending=True)

    def channels_error(name: str, channels: Tensor) -> float:
        part = x[..., channels]
        return ((codec_of(name).restore(x, "k", 0)[..., channels] - part).square().sum() / part.square().sum()).item()

    assert channels_error("pr38280", order[19:]) == pytest.approx(0.134, rel=0.03)
    assert channels_error("pr38280-repaired", order[19:]) == pytest.approx(0.0080, rel=0.05)
    assert channels_error("pr38280", order[:19]) < 2**-16


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_keys_are_immune_to_a_large_channel_and_values_to_a_large_token(bits: int) -> None:
    codec = codec_of(f"kivi{bits}")
    x = normal(tokens=8 * GROUP)
    plain = {side: error(codec, x, side) for side in ("k", "v")}
    wide, tall = x.clone(), x.clone()
    wide[..., 5] *= 50
    tall[:, :, 5] *= 50
    for side, data in (("k", wide), ("v", tall)):
        assert error(codec, data, side) == pytest.approx(plain[side], rel=0.35)
    rest = [i for i in range(D) if i // GROUP == 0 and i != 5]
    missed = {side: (codec.restore(wide, side, 0) - wide)[..., rest].square().mean() for side in ("k", "v")}  # type: ignore[arg-type]
    assert missed["v"] > 20 * missed["k"]


def test_kivi_leaves_its_window_and_incomplete_groups() -> None:
    codec = codec_of("kivi2")
    assert codec.packed_range(WINDOW + 3 * GROUP + 5) == (0, 3 * GROUP)
    x = normal(tokens=GROUP + 7)
    assert torch.equal(codec.restore(x, "k", 0)[:, :, GROUP:], x[:, :, GROUP:])


def test_kvarn_evens_out_tokens_and_channels() -> None:
    """Rows and columns of very different size come out with nearly equal deviations, which two passes of one axis would not."""
    generator = torch.Generator().manual_seed(2)
    spread = torch.randn(TILE, 1, generator=generator).exp() * torch.randn(1, D, generator=generator).exp()
    tile = torch.randn(TILE, D, generator=generator) * spread
    token, channel = evened(tile[None])
    even = tile / token[0] / channel[0]
    for dim in (TOKENS, CHANNELS):
        deviations = even.std(dim=dim)
        assert deviations.max() / deviations.min() < 1.05
        assert tile.std(dim=dim).max() / tile.std(dim=dim).min() > 30


def test_kvarn_keeps_its_first_tile_and_is_better_on_uneven_tokens() -> None:
    """Its point: tokens of very different size share a channel's step and keep their own precision."""
    codec = codec_of("kvarn-k4v2")
    assert codec.packed_range(3 * TILE + 17) == (TILE, 3 * TILE)
    x = normal(tokens=4 * TILE)
    uneven = x * torch.randn(4 * TILE, 1, generator=torch.Generator().manual_seed(3)).exp()

    def by_token(restored: Tensor) -> float:
        return ((restored - uneven).square().sum(-1) / uneven.square().sum(-1)).mean().item()

    one_range = inverse_hadamard(round_to_nearest(hadamard(uneven.unflatten(2, (-1, TILE))), 4, TOKENS)).flatten(2, 3)
    assert by_token(codec.restore(uneven, "k", 0)) < 0.2 * by_token(one_range)
    assert error(codec, x, "k") == pytest.approx(error(codec, uneven, "k"), rel=0.25)


def test_kvarn_stays_finite_with_constant_and_huge_channels() -> None:
    x = normal(tokens=2 * TILE) * 1e-2
    x[..., 3], x[..., 7] = 500.0, 0.0
    for side in ("k", "v"):
        assert torch.isfinite(codec_of("kvarn-k4v2").restore(x, side, 0)).all()
        assert error(codec_of("kvarn-k4v2"), x, side) < 0.05


def test_quarot_spreads_large_channels_and_clips() -> None:
    codec = codec_of("quarot-int4")
    spiky = normal() * (2 * torch.randn(D, generator=torch.Generator().manual_seed(4))).exp()
    rounded = round_to_nearest(spiky, 4, -1, clip=0.95)
    assert error(codec, spiky, "v") < 0.2 * ((rounded - spiky).square().sum() / spiky.square().sum()).item()
    turned = hadamard(codec.restore(normal(), "k", 0))
    assert (turned.amax(-1) / hadamard(normal()).amax(-1)).median() == pytest.approx(0.95, abs=0.01)


def test_affine_rounding_is_within_half_a_step_and_keeps_constants() -> None:
    x = normal(tokens=8)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / 15
    assert ((round_to_nearest(x, 4, -1) - x).abs() <= step * 0.52).all()
    constant = torch.full((2, 8), 0.5)
    assert torch.equal(round_to_nearest(constant, 2, -1), constant)


def test_published_levels_are_lloyd_max() -> None:
    """Their distortion on a normal variable is Max's."""
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    for bits, expected in ((2, 0.1175), (3, 0.03455), (4, 0.00950)):
        assert (lloyd_max(x, bits) - x).square().mean().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("d", [64, 128, 192])
def test_the_hadamard_matrix_is_orthonormal_and_undone(d: int) -> None:
    x = torch.randn(5, d)
    torch.testing.assert_close(inverse_hadamard(hadamard(x)), x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hadamard(x).norm(dim=-1), x.norm(dim=-1))
