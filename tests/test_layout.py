"""The page against docs/page.md: a scalar implementation of that document, golden bytes, and what must hold for any layout."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from golden import page_fields, page_spec
from golden.make import cases, key
from kvturbo import KVFormat, Packed, PageLayout, format_names, quantize
from kvturbo.config import HEAD_DIMS, PAGE_SIZES
from kvturbo.layout import word_order

ROOT = Path(__file__).parent
GOLDEN = json.loads((ROOT / "golden/pages.json").read_text())
PAGE_MD = (ROOT.parent / "docs/page.md").read_text()
SIDES = ("k", "v")


@cache
def _offsets(side: str, width: int, channels: int, page_size: int) -> np.ndarray:
    return np.array(page_spec.bit_offsets(side, width, channels, page_size))


def _field(packed: Packed, field: str) -> torch.Tensor:
    return getattr(packed, field[2:])


def _expected_page(name: str, head_dim: int, page_size: int, packed: dict[str, Packed]) -> bytes:
    """The page that docs/page.md asks for, from the bits of the fields."""
    whole = []
    for plane in page_spec.planes(name, head_dim):
        data = _field(packed[plane.side], plane.field).numpy()
        if plane.width == 16:
            whole.append((data[:, plane.part] if data.ndim == 2 else data).astype("<f2").tobytes())
            continue
        first = sum(channels for channels, _ in page_spec.parts(name, plane.side, head_dim)[: plane.part])
        codes = data[:, first : first + plane.channels, None] >> plane.low >> np.arange(plane.width) & 1
        bits = np.full(codes.size, 2, dtype=np.uint8)
        bits[_offsets(plane.side, plane.width, plane.channels, page_size)] = codes.reshape(-1)
        assert bits.max() < 2, "every bit of a plane is somebody's"
        whole.append(np.packbits(bits, bitorder="little").tobytes())
    return b"".join(whole)


def _random_packed(fmt: KVFormat, side: str, shape: tuple[int, ...], seed: int) -> Packed:
    rng, form = np.random.default_rng(seed), fmt.side(side)

    def codes(bits: int, channels: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 1 << bits, (*shape, channels), dtype=np.uint8))

    def scales(*tail: int) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(0.1, 100, (*shape, *tail)).astype(np.float16))

    packed = Packed(torch.cat([codes(p.bits, p.channels) for p in form.parts], -1), scales(len(form.parts)))
    if form.outliers:
        packed.outliers, packed.outlier_scale = codes(8, form.outliers), scales()
    if form.qjl:
        packed.residual_signs, packed.residual_norm = codes(1, fmt.head_dim), scales()
    return packed


def _assert_equal(a: Packed, b: Packed) -> None:
    for name in ("codes", "scales", "outliers", "outlier_scale", "residual_signs", "residual_norm"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        assert left is None or torch.equal(left, right), name


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_pages_of_every_format_are_those_of_the_document(head_dim: int, page_size: int) -> None:
    for name in page_spec.formats(head_dim):
        fmt = KVFormat.from_name(name, head_dim)
        layout = PageLayout.of(fmt, page_size)
        page = torch.full((layout.page_bytes,), 0xAA, dtype=torch.uint8)
        packed = {side: _random_packed(fmt, side, (page_size,), seed=head_dim) for side in SIDES}
        for side in SIDES:
            layout.write(page, side, packed[side])
        assert page.numpy().tobytes() == _expected_page(name, head_dim, page_size, packed), name
        for side in SIDES:
            _assert_equal(layout.read(page, side), packed[side])


def test_the_document_covers_every_format() -> None:
    for head_dim in HEAD_DIMS:
        assert sorted(page_spec.formats(head_dim)) == sorted(set(format_names(head_dim)) - {"turboquant"})


@pytest.mark.parametrize("case", cases(), ids=key)
def test_golden_bytes(case: tuple[str, int, int]) -> None:
    name, head_dim, page_size = case
    fmt = KVFormat.from_name(name, head_dim)
    layout = PageLayout.of(fmt, page_size)
    page = torch.zeros(layout.page_bytes, dtype=torch.uint8)
    for side in SIDES:
        layout.write(page, side, _golden_packed(fmt, side, page_size))
    data = page.numpy().tobytes()
    if key(case) in GOLDEN["hex"]:
        assert data.hex() == "".join(GOLDEN["hex"][key(case)])
    assert hashlib.sha256(data).hexdigest() == GOLDEN["sha256"][key(case)]


def _golden_packed(fmt: KVFormat, side: str, page_size: int) -> Packed:
    form = fmt.side(side)

    def codes(field: str) -> torch.Tensor:
        bits = page_fields.code_bits(fmt.name, field, fmt.head_dim)
        rows = [[page_fields.code(field, b, s, c) for c, b in enumerate(bits)] for s in range(page_size)]
        return torch.tensor(rows, dtype=torch.uint8)

    def scales(field: str, parts: int = 1) -> torch.Tensor:
        rows = [[page_fields.scale(field, s, part) for part in range(parts)] for s in range(page_size)]
        return torch.tensor(rows, dtype=torch.float16)

    packed = Packed(codes(f"{side}.codes"), scales(f"{side}.scales", len(form.parts)))
    if form.outliers:
        packed.outliers, packed.outlier_scale = codes("k.outliers"), scales("k.outlier_scale")[:, 0]
    if form.qjl:
        packed.residual_signs, packed.residual_norm = codes("k.residual_signs"), scales("k.residual_norm")[:, 0]
    return packed


def test_golden_hex_pages_have_their_hashes() -> None:
    assert len(GOLDEN["hex"]) == 8
    for name, lines in GOLDEN["hex"].items():
        assert hashlib.sha256(bytes.fromhex("".join(lines))).hexdigest() == GOLDEN["sha256"][name]


def _examples() -> list[tuple[str, tuple[int, ...]]]:
    rows = re.findall(r"^\| ([kv]) \|((?: \d+ \|){8})$", PAGE_MD, re.M)
    return [(side, tuple(map(int, re.findall(r"\d+", numbers)))) for side, numbers in rows]


def test_worked_examples_of_the_document() -> None:
    assert len(_examples()) >= 12
    for side, (width, channels, page_size, slot, channel, j, byte, bit) in _examples():
        assert page_spec.bit_offset(side, width, channels, page_size, slot, channel, j) == 8 * byte + bit


def test_plane_sizes_of_the_document() -> None:
    rows = re.findall(r"^\| (\d) \|((?: \d+ \|){7})$", PAGE_MD, re.M)
    table = {int(width): tuple(map(int, re.findall(r"\d+", sizes))) for width, sizes in rows}
    assert table == {width: tuple(d * width // 8 for d in HEAD_DIMS) for width in (1, 2, 4, 8)}
    for head_dim, index in zip(HEAD_DIMS, range(7), strict=True):
        planes = PageLayout.of(KVFormat.from_name("k8v4", head_dim), 16).planes
        assert planes["k.codes0.8"].nbytes == 16 * table[8][index]
        assert planes["v.codes0.4"].nbytes == 16 * table[4][index]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_planes_fill_the_page_in_multiples_of_16_bytes(head_dim: int) -> None:
    for name in page_spec.formats(head_dim):
        fmt = KVFormat.from_name(name, head_dim)
        for page_size in PAGE_SIZES:
            layout, end = PageLayout.of(fmt, page_size), 0
            for plane in layout.planes.values():
                assert plane.offset == end
                assert plane.nbytes % 16 == 0
                assert plane.nbytes > 0
                end = plane.end
            assert end == layout.page_bytes == page_size * fmt.bytes_per_token


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("side", SIDES)
def test_every_element_of_a_plane_has_one_place(side: str, width: int, head_dim: int) -> None:
    for page_size in PAGE_SIZES:
        order = word_order(side, width, head_dim, page_size)
        assert order.shape == (page_size, head_dim)
        assert np.array_equal(np.sort(order, axis=None), np.arange(page_size * head_dim))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_key_load_is_the_operand_of_the_matrix_instruction(head_dim: int) -> None:
    """Lane l of a warp finds b0 and b1 of every step and instruction in its own words, and its scores are slots 8t to 8t + 7."""
    order = word_order("k", 4, head_dim, 32) // 8
    whole = head_dim // 8
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        own = {o * 8 * whole + i for o in [lane >> 3] for i in _lane_words(whole, lane & 7)}
        for j in range(4):
            slot = 8 * (g >> 1) + 2 * j + (g & 1)
            channels = [c for c in range(head_dim) if c % 16 // 4 == t]
            assert {int(order[slot, c]) for c in channels} <= own
        assert sorted(8 * (c >> 1) + 2 * j + (c & 1) for j in range(4) for c in (2 * t, 2 * t + 1)) == list(
            range(8 * t, 8 * t + 8)
        )


def _lane_words(whole: int, lane: int) -> list[int]:
    words, first = [], 0
    for length in [4] * (whole // 4) + [2] * (whole % 4 // 2) + [1] * (whole % 2):
        words += [8 * first + lane * length + i for i in range(length)]
        first += length
    return words


@given(
    head_dim=st.sampled_from(HEAD_DIMS),
    page_size=st.sampled_from(PAGE_SIZES),
    index=st.integers(0, 99),
    leading=st.sampled_from([(), (1,), (3,), (2, 2)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_written_is_read_back(
    head_dim: int, page_size: int, index: int, leading: tuple[int, ...], seed: int
) -> None:
    names = format_names(head_dim)
    fmt = KVFormat.from_name(names[index % len(names)], head_dim)
    layout = PageLayout.of(fmt, page_size)
    pages = torch.full((*leading, layout.page_bytes), 0xFF, dtype=torch.uint8)
    packed = {side: _random_packed(fmt, side, (*leading, page_size), seed) for side in SIDES}
    for side in SIDES:
        layout.write(pages, side, packed[side])
    for side in SIDES:
        _assert_equal(layout.read(pages, side), packed[side])


def test_no_pages_are_fine() -> None:
    fmt = KVFormat.from_name("k4v4-o16", 64)
    pages = torch.empty(2, 0, fmt.page_bytes(16), dtype=torch.uint8)
    packed = quantize(torch.empty(2, 0, 16, 64), fmt, "k", torch.arange(16))
    PageLayout.of(fmt, 16).write(pages, "k", packed)
    _assert_equal(PageLayout.of(fmt, 16).read(pages, "k"), packed)


def test_writing_one_side_leaves_the_other_alone() -> None:
    for name in ("k4v4-o16", "k3v2", "tq3.5", "qjl3"):
        fmt = KVFormat.from_name(name, 64)
        layout = PageLayout.of(fmt, 16)
        for side, other in (SIDES, SIDES[::-1]):
            page = torch.full((layout.page_bytes,), 0x5C, dtype=torch.uint8)
            before = layout.read(page, other)
            layout.write(page, side, _random_packed(fmt, side, (16,), 1))
            _assert_equal(layout.read(page, other), before)


def test_nan_bytes_next_to_a_page_are_not_touched_and_do_not_matter() -> None:
    fmt = KVFormat.from_name("k3v3", 112)
    layout = PageLayout.of(fmt, 16)
    around = torch.full((3, layout.page_bytes), 0xFF, dtype=torch.uint8)
    packed = _random_packed(fmt, "k", (16,), 5)
    for side in SIDES:
        layout.write(around[1], side, packed)
    _assert_equal(layout.read(around[1], "v"), packed)
    assert (around[0] == 0xFF).all()
    assert (around[2] == 0xFF).all()


@pytest.mark.parametrize("page_size", [0, 8, 24, 48, 128, -16])
def test_other_page_sizes_are_refused_with_the_valid_ones(page_size: int) -> None:
    fmt = KVFormat.from_name("k4v4", 128)
    with pytest.raises(ValueError, match=rf"page_size must be one of 16, 32, 64, got {page_size}$"):
        PageLayout.of(fmt, page_size)
    with pytest.raises(ValueError, match=rf"16, 32, 64, got {page_size}$"):
        fmt.page_bytes(page_size)


def test_page_size_follows_from_bytes() -> None:
    for head_dim in HEAD_DIMS:
        for name in format_names(head_dim):
            fmt = KVFormat.from_name(name, head_dim)
            for page_size in PAGE_SIZES:
                assert PageLayout.page_size_of(fmt, fmt.page_bytes(page_size)) == page_size


@pytest.mark.parametrize("page_bytes", [0, 2111, 2113, 132, 24 * 132])
def test_bytes_of_no_page_are_refused_with_the_valid_ones(page_bytes: int) -> None:
    with pytest.raises(ValueError, match=rf"2112 \(page_size 16\), 4224 .*8448 .*got {page_bytes}$"):
        PageLayout.page_size_of(KVFormat.from_name("k4v4", 128), page_bytes)
