"""Formats: names, sizes in bytes, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from kvturbo import KVFormat, format_names
from kvturbo.config import HEAD_DIMS, PAGE_SIZES, check_head_dim

# Bytes of one token's key and value in one KV head, typed in; 0 where the format is not offered.
BYTES_PER_TOKEN = {
    # head_dim    64   80   96  112  128  192  256
    "k4v4": (68, 84, 100, 116, 132, 196, 260),
    "k4v3": (60, 74, 88, 102, 116, 172, 228),
    "k4v2": (52, 64, 76, 88, 100, 148, 196),
    "k3v3": (52, 64, 76, 88, 100, 148, 196),
    "k3v2": (44, 54, 64, 74, 84, 124, 164),
    "k2v2": (36, 44, 52, 60, 68, 100, 132),
    "k8v4": (100, 124, 148, 172, 196, 292, 388),
    "lite4": (68, 84, 100, 116, 132, 196, 260),
    "tq3.5": (60, 0, 0, 0, 112, 0, 216),
    "tq2.5": (44, 0, 0, 0, 80, 0, 152),
    "qjl4": (70, 86, 102, 118, 134, 198, 262),
    "qjl3": (62, 76, 90, 104, 118, 174, 230),
    "k4v4-o16": (86, 102, 118, 134, 150, 214, 278),
    "k4v3-o16": (78, 92, 106, 120, 134, 190, 246),
    "k4v2-o16": (70, 82, 94, 106, 118, 166, 214),
    "k3v3-o16": (70, 82, 94, 106, 118, 166, 214),
    "k3v2-o16": (62, 72, 82, 92, 102, 142, 182),
    "k2v2-o16": (54, 62, 70, 78, 86, 118, 150),
    "k4v4-o32": (0, 0, 0, 0, 166, 230, 294),
    "k4v3-o32": (0, 0, 0, 0, 150, 206, 262),
    "k4v2-o32": (0, 0, 0, 0, 134, 182, 230),
    "k3v3-o32": (0, 0, 0, 0, 134, 182, 230),
    "k3v2-o32": (0, 0, 0, 0, 118, 158, 198),
    "k2v2-o32": (0, 0, 0, 0, 102, 134, 166),
    "turboquant": (68, 84, 100, 116, 132, 196, 260),
}


@pytest.mark.parametrize("name", BYTES_PER_TOKEN)
def test_bytes_per_token(name: str) -> None:
    for head_dim, expected in zip(HEAD_DIMS, BYTES_PER_TOKEN[name], strict=True):
        if expected:
            fmt = KVFormat.from_name(name, head_dim)
            assert fmt.bytes_per_token == expected, head_dim
            assert [fmt.page_bytes(size) for size in PAGE_SIZES] == [16 * expected, 32 * expected, 64 * expected]
        else:
            with pytest.raises(ValueError, match="unknown format"):
                KVFormat.from_name(name, head_dim)


def test_every_format_is_in_the_table_of_bytes() -> None:
    for column, head_dim in enumerate(HEAD_DIMS):
        offered = {name for name, row in BYTES_PER_TOKEN.items() if row[column]}
        assert set(format_names(head_dim)) == offered
        assert format_names(head_dim)[0] == "k4v4", "the default comes first"
        assert len(format_names(head_dim)) == len(offered), "no name twice"


def test_bits_per_element_and_compression_count_everything_stored() -> None:
    assert KVFormat.from_name("k4v4", 128).compression == pytest.approx(512 / 132)
    assert KVFormat.from_name("k4v4", 128).bits_per_element == 4.125
    assert KVFormat.from_name("k2v2-o16", 64).bits_per_element == 54 * 8 / 128
    assert KVFormat.from_name("qjl4", 80).compression == pytest.approx(320 / 86)


def test_turboquant_is_k4v4() -> None:
    assert KVFormat.from_name("turboquant", 96) == KVFormat.from_name("k4v4", 96)
    assert KVFormat.from_name("turboquant", 96).name == "k4v4"


def test_what_the_formats_are() -> None:
    fmt = KVFormat.from_name("k3v2-o32", 192)
    assert (fmt.outliers, fmt.channel_count, fmt.v.outliers) == (32, 32, 0)
    assert [(p.channels, p.bits, p.rule, p.search) for p in fmt.k.parts] == [(192, 3, "unbiased", True)]
    assert [(p.channels, p.bits, p.rule, p.search) for p in fmt.v.parts] == [(192, 2, "unbiased", False)]
    tq = KVFormat.from_name("tq2.5", 64)
    assert (tq.outliers, tq.channel_count) == (0, 16)
    assert (
        [(p.channels, p.bits) for p in tq.k.parts] == [(p.channels, p.bits) for p in tq.v.parts] == [(16, 3), (48, 2)]
    )
    assert KVFormat.from_name("k8v4", 64).k.parts[0].rule == "amax"
    assert KVFormat.from_name("qjl4", 64).k.parts[0].rule == "rms"
    for name in format_names(64):
        form = KVFormat.from_name(name, 64)
        keys_differ = name.startswith(("k8", "qjl"))
        assert {part.rule for part in form.v.parts + (() if keys_differ else form.k.parts)} == {"unbiased"}
    assert [KVFormat.from_name(name, 64).k.rotate for name in ("k4v4", "k8v4", "qjl3", "lite4")] == [True] * 3 + [False]
    assert KVFormat.from_name("qjl3", 64).k.qjl
    assert not KVFormat.from_name("qjl3", 64).v.qjl


def test_formats_are_frozen_values() -> None:
    fmt = KVFormat.from_name("k4v4", 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.seed = 3  # type: ignore[misc]
    assert fmt == KVFormat.from_name("k4v4", 64)
    assert hash(fmt) == hash(KVFormat.from_name("k4v4", 64))
    assert fmt != KVFormat.from_name("k4v4", 64, seed=1)


@pytest.mark.parametrize("name", ["", "k4", "K4V4", "k5v5", "k4v4-o8", "k4v4-o", "lite4-o16", "k8v4-o16", "tq3.5-o16"])
def test_an_unknown_format_is_refused_with_the_valid_names(name: str) -> None:
    with pytest.raises(ValueError, match="unknown format") as refused:
        KVFormat.from_name(name, 128)
    assert repr(name) in str(refused.value)
    for valid in format_names(128):
        assert valid in str(refused.value)


def test_a_format_of_other_head_dims_is_refused_with_the_names_for_this_one() -> None:
    with pytest.raises(
        ValueError, match=r"unknown format 'k4v4-o32' for head_dim 64; valid formats: k4v4, k4v3"
    ) as refused:
        KVFormat.from_name("k4v4-o32", 64)
    assert "-o32" not in str(refused.value).split(";")[1]


@pytest.mark.parametrize("head_dim", [100, 1, 72, -63])
def test_a_head_dim_that_is_no_multiple_of_16_is_refused(head_dim: int) -> None:
    with pytest.raises(ValueError, match=rf"must be a multiple of 16, got {head_dim}; supported: 64, 80, .*256"):
        KVFormat.from_name("k4v4", head_dim)


@pytest.mark.parametrize("head_dim", [0, 16, 32, 48, 144, 160, 176, 208, 224, 240, 272, 512])
def test_other_multiples_of_16_are_refused_with_the_valid_ones(head_dim: int) -> None:
    with pytest.raises(ValueError, match=rf"one of 64, 80, 96, 112, 128, 192, 256, got {head_dim}$"):
        check_head_dim(head_dim)


@pytest.mark.parametrize("side", ["q", "K", "", None])
def test_a_wrong_side_is_refused(side: str) -> None:
    with pytest.raises(ValueError, match=f"side must be 'k' or 'v', got {side!r}"):
        KVFormat.from_name("k4v4", 64).side(side)  # type: ignore[arg-type]
