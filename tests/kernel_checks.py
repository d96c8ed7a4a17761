"""What must hold of a store and of a gather kernel, wherever it runs: on a GPU or, thread by thread, in `emulator`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvturbo import KVFormat, Packed
from kvturbo.config import SIDES, Side
from kvturbo.layout import PageLayout
from kvturbo.ops.gather.reference import gather as reference_gather
from kvturbo.ops.store.reference import store as reference_store
from kvturbo.quantizer import has_rotated_form
from near_codes import explained
from support import FIELDS, channels_for, same_bits

Operation = Callable[..., None]
EQUAL_CODES = 0.999

# A prefill that begins inside an octet and ends inside another, skipped tokens, single slots of one octet in any order.
SLOTS_OF_ONE_PAGE = [*range(5, 16), -1, -1, 19, 16, -1, 17, 31, 24]


def mixed_slots(page_size: int) -> Tensor:
    """`SLOTS_OF_ONE_PAGE` on pages 0 and 2, and two whole octets of page 1, as slot_mapping."""
    two_pages = [slot + (page_size if page_size == 16 and slot >= 16 else 0) for slot in SLOTS_OF_ONE_PAGE]
    return torch.tensor(
        [*two_pages, *range(3 * page_size, 3 * page_size + 16), 3 * page_size + 17 % page_size + page_size]
    )


def random_pages(fmt: KVFormat, page_size: int, count: int, heads: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, heads, fmt.page_bytes(page_size)), dtype=torch.uint8, generator=generator)


def vectors(fmt: KVFormat, tokens: int, heads: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Normal keys and values of many sizes, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(tokens, heads, fmt.head_dim, generator=generator) for _ in SIDES)
    sizes = torch.tensor([1.0, 3.0, 100.0, 0.01, 3e4, 1e-7])
    k, v = (x * sizes[torch.arange(tokens) % len(sizes)][:, None, None] for x in (k, v))
    k[::37] = 0
    v[5::41] = 0
    return k, v


def check_store(
    store: Operation, fmt: KVFormat, page_size: int, slots: Tensor, k: Tensor, v: Tensor, device: torch.device | str
) -> None:
    """The kernel's codes are the reference's but for roundings, and every other slot keeps its bits."""
    heads = k.shape[1]
    channels = channels_for(fmt, heads)
    before = random_pages(fmt, page_size, int(slots.max()) // page_size + 2, heads)
    wanted, got = before.clone(), before.to(device)
    reference_store(k, v, wanted, slots, fmt=fmt, outlier_channels=channels)
    on_device = None if channels is None else channels.to(device)
    for _ in range(2):  # the second time over its own codes: the same bits again
        store(k.to(device), v.to(device), got, slots.to(device), fmt=fmt, outlier_channels=on_device)
        check_pages(fmt, page_size, slots, before, wanted, got.cpu(), {"k": k, "v": v}, channels)


def check_recent_copies(
    store: Operation, fmt: KVFormat, page_size: int, slots: Tensor, k: Tensor, v: Tensor, device: torch.device | str
) -> None:
    """Tokens with a place in a ring lie there as they are, the rest of the rings and the pages are as without rings."""
    tokens, heads, size = len(slots), k.shape[1], {16: 8, 32: 16, 64: 32}[page_size]
    k, v = k.clone(), v.clone()
    k[2, :, 3] = torch.nan
    v[4].view(torch.uint8).fill_(0xFF)  # a NaN that no computation gives
    places = torch.randperm(3 * tokens, generator=torch.Generator().manual_seed(2))[:tokens]
    places[1::3] = -1
    assert ((slots < 0) & (places >= 0)).any(), "a token without a slot has none in a ring"
    rings = -(-3 * tokens // size)
    rows = torch.full((rings, heads, 2, size, fmt.head_dim), 7, dtype=k.dtype)
    channels = channels_for(fmt, heads)
    plain, got = (random_pages(fmt, page_size, int(slots.max()) // page_size + 1, heads).to(device) for _ in range(2))
    options = {"fmt": fmt, "outlier_channels": None if channels is None else channels.to(device)}
    args = [with_gaps(x.to(device)) for x in (k, v)]
    store(*args, plain, slots.to(device), **options)
    got_rows = rows.to(device, copy=True)
    store(*args, got, slots.to(device), recent_rows=got_rows, recent_slots=places.to(device), **options)
    for token, (slot, place) in enumerate(zip(slots.tolist(), places.tolist(), strict=True)):
        if min(slot, place) >= 0:
            rows[place // size, :, 0, place % size], rows[place // size, :, 1, place % size] = k[token], v[token]
    assert same_bits(got_rows, rows)
    assert same_bits(got, plain)


def with_gaps(x: Tensor) -> Tensor:
    """The same [n, heads, d], whose rows and heads do not follow one another."""
    room = torch.full((x.shape[0], x.shape[1] + 1, x.shape[2] + 4), torch.nan, dtype=x.dtype, device=x.device)
    room[:, :-1, :-4] = x
    return room[:, :-1, :-4]


def check_pages(
    fmt: KVFormat,
    page_size: int,
    slots: Tensor,
    before: Tensor,
    wanted: Tensor,
    got: Tensor,
    x: dict[Side, Tensor],
    channels: Tensor | None,
) -> None:
    layout = PageLayout.of(fmt, page_size)
    stored = slots[slots >= 0]
    others = torch.ones(before.shape[0], page_size, dtype=torch.bool)
    others.view(-1)[stored] = False
    for side in SIDES:
        old, a, b = (by_slot(layout.read(pages, side)) for pages in (before, wanted, got))
        for name in FIELDS:
            left, right = getattr(old, name), getattr(b, name)
            assert left is None or same_bits(left[others], right[others]), f"{side}.{name} of another slot"
        mine = stored // page_size, stored % page_size
        check_vectors(fmt, side, pick(a, mine), pick(b, mine), x[side][slots >= 0].float(), channels)


def by_slot(packed: Packed) -> Packed:
    """Fields [pages, heads, page_size, ...] as [pages, page_size, heads, ...]."""
    fields = (getattr(packed, name) for name in FIELDS)
    return Packed(*(None if f is None else f.transpose(1, 2).contiguous() for f in fields))  # type: ignore[arg-type]


def pick(packed: Packed, index: tuple[Tensor, ...]) -> Packed:
    fields = (getattr(packed, name) for name in FIELDS)
    return Packed(*(None if f is None else f[index] for f in fields))  # type: ignore[arg-type]


def check_vectors(fmt: KVFormat, side: Side, wanted: Packed, got: Packed, x: Tensor, channels: Tensor | None) -> None:
    """Vectors [n, heads]: NaN in the same places, the same codes for 99.9 %, and for the rest codes that rounding explains."""
    nan = wanted.scales.isnan().any(-1)
    assert torch.equal(got.scales.isnan().any(-1), nan)
    equal = (wanted.codes == got.codes).all(-1) | nan
    if wanted.outliers is not None:
        assert torch.equal(wanted.outlier_scale.isnan(), got.outlier_scale.isnan())
        equal &= (wanted.outliers == got.outliers).all(-1) | wanted.outlier_scale.isnan()
        assert_close_scales(wanted.outlier_scale, got.outlier_scale)
    assert_close_scales(wanted.scales[equal & ~nan], got.scales[equal & ~nan])
    assert (~equal).sum() <= max(1, (1 - EQUAL_CODES) * equal.numel()), (
        f"{int((~equal).sum())} of {equal.numel()} differ"
    )
    if equal.all():
        return
    token, head = (~equal).nonzero().unbind(-1)  # one head each, so that every vector brings its own channels
    own = None if channels is None or side == "v" else channels[head].unsqueeze(1)
    good = explained(pick(got, (token, head, None)), x[token, head].unsqueeze(1), fmt, side, own).squeeze(1)
    assert good.all(), f"vectors {(~equal).nonzero()[~good].tolist()} of side {side}: no rounding explains their codes"


def assert_close_scales(wanted: Tensor, got: Tensor) -> None:
    """At most one unit in the last place apart, and hardly ever that."""
    ulps = (wanted.view(torch.int16).int() - got.contiguous().view(torch.int16).int()).abs()
    ulps = torch.where(wanted.isnan(), 0, ulps)
    assert ulps.max() <= 1
    assert (ulps > 0).sum() <= max(2, 0.002 * ulps.numel())


def check_not_finite(
    store: Operation, fmt: KVFormat, page_size: int, tokens: int, device: torch.device | str, seed: int = 0
) -> None:
    """A NaN, an infinity or an overflow makes its own vector NaN, on its own side, and no other one."""
    heads = 2
    generator = torch.Generator().manual_seed(seed)
    bad = [float("nan"), float("inf"), -float("inf"), 3e38]
    for side in SIDES:
        k, v = (torch.randn(tokens, heads, fmt.head_dim, generator=generator) for _ in SIDES)
        x = k if side == "k" else v
        for i, value in enumerate(bad):
            x[(3 * i + 1) % tokens, i % heads, -1] = value
        check_store(store, fmt, page_size, torch.arange(tokens), k, v, device)


def check_gather(
    gather: Operation,
    fmt: KVFormat,
    page_size: int,
    ranges: Sequence[tuple[int, int]],
    device: torch.device | str,
    *,
    rotated: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The kernel's copies are the reference's up to the rounding of dtype; a NaN scale is NaN."""
    heads, count = 2, 5
    channels = channels_for(fmt, heads)
    pages = random_pages(fmt, page_size, count, heads, seed=1)
    k, v = vectors(fmt, 4 * page_size, heads, seed=2)
    reference_store(k, v, pages, torch.arange(4 * page_size), fmt=fmt, outlier_channels=channels)
    table = torch.tensor([[3, 0, 2**31 - 1], [1, 2, -1]], dtype=torch.int32)
    on_device = None if channels is None else channels.to(device)
    for start, stop in ranges:
        shape = (2, stop - start, heads, fmt.head_dim)
        wanted = tuple(torch.empty(shape, dtype=dtype) for _ in SIDES)
        got = tuple(torch.full(shape, float("nan"), dtype=dtype, device=device) for _ in SIDES)
        reference_gather(pages, table, start, stop, wanted, fmt=fmt, rotated=rotated, outlier_channels=channels)
        gather(
            pages.to(device), table.to(device), start, stop, got, fmt=fmt, rotated=rotated, outlier_channels=on_device
        )
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(b.cpu(), a, rtol=2 * torch.finfo(dtype).eps, atol=_spread(a), equal_nan=True)


def _spread(x: Tensor) -> float:
    """An absolute tolerance: sums of d terms, each rounded to fp32, of the largest vector."""
    return float(x.float().nan_to_num(0).norm(dim=-1).amax()) * 1e-6 if x.numel() else 0.0


def rotations(fmt: KVFormat) -> tuple[bool, ...]:
    return (False, True) if has_rotated_form(fmt.k) else (False,)
