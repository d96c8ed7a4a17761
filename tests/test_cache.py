"""PagedKVCache against a list of tokens, its files, and what it refuses."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from torch import Tensor

from kvturbo import KVFormat, OutOfPagesError, PagedKVCache
from kvturbo.ops import backends
from small_cache import HEADS, LAYERS, contents, extend, make, same_contents, vectors
from support import (
    BACKENDS_UNDER_TEST,
    attention_oracle,
    channels_for,
    device_of,
    relative_error,
    same_bits,
    through_codec,
)


@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
@pytest.mark.parametrize("name", ["k4v4", "k3v2-o16"])
def test_a_ragged_step_decodes_what_was_stored(backend: str, name: str) -> None:
    cache = make(name, backend=backend, device=device_of(backend))
    a, b = cache.new_sequence(), cache.new_sequence()
    counts, raw = [20, 7], [vectors(20), vectors(7, 1)]
    slots = cache.append([b, a], counts[::-1])
    k, v = (torch.cat((raw[1][i], raw[0][i])).to(cache.device) for i in range(2))
    for layer in range(LAYERS):
        cache.store(layer, k * (layer + 1), v, slots)
    q = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(2))
    for layer in range(LAYERS):
        out, lse = cache.decode(layer, q.to(cache.device), [a, b], scale=0.2, q_lens=[2, 1], window=15)
        channels = None if cache.outlier_channels is None else cache.outlier_channels[layer].cpu()
        row = 0
        for n, (rows_k, rows_v) in zip((2, 1), raw, strict=True):
            keys = through_codec(rows_k * (layer + 1), cache.fmt, "k", channels)
            values = through_codec(rows_v, cache.fmt, "v", channels)
            rows = slice(row, row + n)
            row += n
            wanted = attention_oracle(q[rows], keys, values, scale=0.2, first=len(keys) - n, window=15)
            assert relative_error(out[rows], wanted[0]) <= 1e-4 and relative_error(lse[rows], wanted[1]) <= 1e-4


@pytest.mark.parametrize("stored_first", [False, True])
def test_prefix_attention_sees_the_packed_prefix_and_the_raw_chunk(stored_first: bool) -> None:
    cache = make()
    a = cache.new_sequence()
    k, v = vectors(30)
    extend(cache, a, k[:23], v[:23])
    slots = cache.append([a], [7])
    if stored_first:
        cache.store(0, k[23:], v[23:], slots)
    q = torch.randn(7, 4, 64)
    out, lse = cache.prefix_attention(0, q, k[23:], v[23:], [a], scale=0.2, q_lens=[7], soft_cap=3.0)
    keys = torch.cat((through_codec(k[:23], cache.fmt, "k"), k[23:].double()))
    values = torch.cat((through_codec(v[:23], cache.fmt, "v"), v[23:].double()))
    wanted, wanted_lse = attention_oracle(q, keys, values, scale=0.2, first=23, soft_cap=3.0)
    assert relative_error(out, wanted) <= 1e-5 and relative_error(lse, wanted_lse) <= 1e-5


def test_a_fork_never_sees_what_the_other_writes() -> None:
    cache = make(page_size=32)
    a = cache.new_sequence()
    extend(cache, a, *vectors(40))
    b = cache.fork(a)
    before, free = contents(cache, a), cache.num_free_pages
    assert same_contents(before, contents(cache, b))
    pages = cache.block_table([a])[0].long()
    raw = [layer[pages].clone() for layer in cache.pages]
    extend(cache, b, *vectors(3, 1))
    assert cache.num_free_pages == free - 1, "the shared last page is copied, the full one is not"
    assert all(same_bits(old, layer[pages]) for old, layer in zip(raw, cache.pages, strict=True))
    assert same_contents([x[:40] for x in contents(cache, b)], before)
    extend(cache, a, *vectors(5, 2))
    assert same_contents([x[:40] for x in contents(cache, a)], before)
    assert not torch.equal(contents(cache, a)[0][40:43], contents(cache, b)[0][40:])


@pytest.mark.parametrize("name", ["k4v4", "k2v2-o16", "tq2.5"])
def test_nbytes_is_what_was_allocated(name: str) -> None:
    cache = make(name)
    channels = LAYERS * HEADS * cache.fmt.channel_count * 8
    assert cache.nbytes() == LAYERS * 8 * HEADS * 16 * cache.fmt.bytes_per_token + channels
    tensors = [x for x in vars(cache).values() if isinstance(x, Tensor)] + cache.pages
    assert cache.nbytes() == sum(x.untyped_storage().nbytes() for x in tensors)
    extend(cache, cache.new_sequence(), *vectors(9))
    assert cache.nbytes() == sum(x.untyped_storage().nbytes() for x in tensors)


def test_outlier_channels_are_the_caches_own() -> None:
    wide = torch.stack([channels_for(KVFormat.from_name("k4v4-o16", 64), 2 * HEADS) for _ in range(LAYERS)])
    given = wide[:, :HEADS]
    cache = make("k4v4-o16", outlier_channels=given)
    before = cache.outlier_channels.clone()
    wide.zero_()
    assert torch.equal(cache.outlier_channels, before)
    assert cache.outlier_channels.untyped_storage().nbytes() == before.numel() * 8


def test_growing_keeps_every_byte() -> None:
    cache = make(num_pages=2)
    a = cache.new_sequence()
    extend(cache, a, *vectors(32))
    before = contents(cache, a)
    cache.grow(5)
    assert cache.num_pages == 5 and cache.num_free_pages == 3
    assert same_contents(before, contents(cache, a))
    assert cache.nbytes() == LAYERS * 5 * HEADS * 16 * cache.fmt.bytes_per_token
    extend(cache, a, *vectors(40, 1))
    assert same_contents([x[:32] for x in contents(cache, a)], before)


def test_growth_that_runs_out_of_memory_leaves_a_working_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(num_pages=2)
    a = cache.new_sequence()
    extend(cache, a, *vectors(32))
    before, allocate = contents(cache, a), cache._new_pages
    calls = itertools.count()

    def second_fails(num_pages: int) -> Tensor:
        if next(calls):
            raise MemoryError
        return allocate(num_pages)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_new_pages", second_fails)
        with pytest.raises(MemoryError):
            cache.grow(5)
    assert cache.num_pages == 2 and same_contents(before, contents(cache, a))
    with pytest.raises(OutOfPagesError):
        cache.append([a], [1])


def test_out_of_pages_leaves_lengths_tables_and_bytes_alone() -> None:
    cache = make(num_pages=3)
    a, b = cache.new_sequence(), cache.new_sequence()
    extend(cache, a, *vectors(20))
    before = contents(cache, a)
    with pytest.raises(OutOfPagesError, match="out of pages: 4 needed, 1 of 3 free, 3 missing") as caught:
        cache.append([b, a], [33, 20])
    assert caught.value.missing == 3
    assert cache.length(a) == 20 and cache.length(b) == 0 and cache.num_free_pages == 1
    assert same_contents(before, contents(cache, a))


@pytest.mark.parametrize("num_pages", [None, 20])
@pytest.mark.parametrize("name", ["k4v4", "k3v2-o16"])
def test_a_saved_cache_comes_back_with_its_forks_and_room(tmp_path: Path, name: str, num_pages: int | None) -> None:
    cache = make(name)
    dropped, a = cache.new_sequence(), cache.new_sequence()
    extend(cache, dropped, *vectors(20, 3))
    extend(cache, a, *vectors(40))
    b, empty = cache.fork(a), cache.new_sequence()
    extend(cache, b, *vectors(3, 1))
    cache.free(dropped)
    cache.save(tmp_path / "cache")
    loaded = PagedKVCache.load(tmp_path / "cache", num_pages=num_pages)
    assert loaded.fmt == cache.fmt and loaded.sequences == [0, 1, 2] and loaded.page_size == cache.page_size
    assert (loaded.num_pages, loaded.num_free_pages) == ((4, 0) if num_pages is None else (20, 16))
    for old, new in zip((a, b, empty), (0, 1, 2), strict=True):
        assert loaded.length(new) == cache.length(old)
        assert same_contents(contents(loaded, new), contents(cache, old))
    shared = loaded.block_table([0])[0, :2].tolist()
    assert loaded.block_table([1])[0, :2].tolist() == shared, "shared pages stay shared"
    if num_pages:
        before = contents(loaded, 1)
        extend(loaded, 0, *vectors(9, 5))
        assert same_contents(before, contents(loaded, 1))


def test_a_cache_without_tokens_can_be_saved(tmp_path: Path) -> None:
    make().save(tmp_path / "cache")
    loaded = PagedKVCache.load(tmp_path / "cache")
    assert loaded.sequences == [] and loaded.num_pages == 1


def test_loading_into_too_few_pages_or_with_an_unknown_backend_is_refused(tmp_path: Path) -> None:
    cache = make()
    extend(cache, cache.new_sequence(), *vectors(40))
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="num_pages must be at least the 3 pages that are stored, got 2"):
        PagedKVCache.load(tmp_path / "cache", num_pages=2)
    with pytest.raises(ValueError, match="'auto' or one of"):
        PagedKVCache.load(tmp_path / "cache", backend="cudnn")


CONSTRUCTOR: dict[str, tuple[dict[str, Any], str]] = {
    "format": ({"fmt": "k4v4"}, "fmt must be a KVFormat such as .*, got 'k4v4'"),
    "pages": ({"num_pages": 0}, "num_pages must be at least 1, got 0"),
    "page-size": ({"page_size": 24}, "page_size must be one of 16, 32, 64, got 24"),
    "layers": ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    "heads": ({"num_kv_heads": -1}, "num_kv_heads must be at least 1, got -1"),
    "backend": ({"backend": "fast"}, f"'auto' or one of {', '.join(backends.BACKENDS)}, got 'fast'"),
    "missing-outliers": ({"fmt": KVFormat.from_name("k4v4-o16", 64)}, r"'k4v4-o16' needs outlier_channels \[2, 2, 16\], got None"),
    "outlier-shape": (
        {"fmt": KVFormat.from_name("k4v4-o16", 64), "outlier_channels": torch.zeros(2, 2, 8).long()},
        r"outlier_channels must be int64 \[2, 2, 16\], got \[2, 2, 8\]",
    ),
    "outlier-range": (
        {"fmt": KVFormat.from_name("k4v4-o16", 64), "outlier_channels": torch.arange(56, 72).expand(2, 2, 16)},
        "outlier_channels must be distinct and from 0 to 63, got",
    ),
    "outliers-of-a-plain-format": ({"outlier_channels": torch.zeros(2, 2, 16).long()}, r"int64 \[2, 2, 0\], got \[2, 2, 16\]"),
}  # fmt: skip


@pytest.mark.parametrize("change,message", CONSTRUCTOR.values(), ids=CONSTRUCTOR.keys())
def test_a_cache_that_cannot_be(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"num_layers": LAYERS, "num_kv_heads": HEADS, "num_pages": 4, "page_size": 16} | change
    with pytest.raises(ValueError, match=message):
        PagedKVCache(arguments.pop("fmt", KVFormat.from_name("k4v4", 64)), **arguments)


CALLS: dict[str, tuple[Callable[[PagedKVCache], Any], str]] = {
    "layer-high": (lambda c: c.decode(2, torch.zeros(1, 4, 64), [0], scale=1.0), "layer must be from 0 to 1, got 2"),
    "layer-low": (lambda c: c.store(-1, *vectors(1), torch.tensor([0])), "layer must be from 0 to 1, got -1"),
    "gather-layer": (lambda c: c.gather(5, 0, 0, 1), "layer must be from 0 to 1, got 5"),
    "sequence": (lambda c: c.decode(0, torch.zeros(1, 4, 64), [4], scale=1.0), "no sequence 4; live sequences: 0"),
    "gather-sequence": (lambda c: c.gather(0, 4, 0, 1), "no sequence 4; live sequences: 0"),
    "gather-beyond": (lambda c: c.gather(0, 0, 0, 21), "0 <= start <= stop <= 20, got start 0, stop 21"),
    "gather-backwards": (lambda c: c.gather(0, 0, 4, 3), "0 <= start <= stop <= 20, got start 4, stop 3"),
    "append-unknown": (lambda c: c.append([0, 9], [1, 1]), "no sequence 9; live sequences: 0"),
    "append-twice": (lambda c: c.append([0, 0], [1, 1]), r"no sequence twice, got \[0, 0\]"),
    "append-negative": (lambda c: c.append([0], [-2]), r"counts must not be negative, got \[-2\]"),
    "append-fraction": (lambda c: c.append([0], [1.5]), r"counts must be whole, got \[1.5\]"),
    "crop-longer": (lambda c: c.crop(0, 21), "length must be from 0 to 20, got 21"),
    "fork-unknown": (lambda c: c.fork(3), "no sequence 3; live sequences: 0"),
    "free-unknown": (lambda c: c.free(3), "no sequence 3; live sequences: 0"),
    "shrink": (lambda c: c.grow(7), "num_pages must be at least the present 8, got 7"),
    "chunk-longer": (
        lambda c: c.prefix_attention(0, torch.zeros(21, 4, 64), *vectors(21), [0], scale=1.0, q_lens=[21]),
        "prefix_lens must be from 0 to 32, got -1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("call,message", CALLS.values(), ids=CALLS.keys())
def test_what_a_cache_refuses_changes_nothing(call: Callable[[PagedKVCache], Any], message: str) -> None:
    cache = make()
    extend(cache, cache.new_sequence(), *vectors(20))
    before = contents(cache, 0)
    with pytest.raises(ValueError, match=message):
        call(cache)
    assert cache.sequences == [0] and cache.num_free_pages == 6 and cache.num_pages == 8
    assert same_contents(before, contents(cache, 0))


BANK = 40
BANK_K, BANK_V = vectors(BANK, 9)
BANK_CONTENTS = [
    through_codec(x, KVFormat.from_name("k4v4", 64), side).float()  # type: ignore[arg-type]
    for x, side in ((BANK_K, "k"), (BANK_V, "v"), (BANK_K * 2, "k"), (BANK_V, "v"))
]


class CacheMachine(RuleBasedStateMachine):
    """The model holds every sequence as a list of tokens, and as a list of names of pages to count how many are in use.

    A sequence goes by a handle; `ids` has its id in the cache, which a load changes.
    """

    sequences = Bundle("sequences")

    @initialize()
    def start(self) -> None:
        self.cache = make(num_pages=5)
        self.ids: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}
        self.pages: dict[int, list[int]] = {}
        self.fresh = itertools.count()

    def _enter(self, id_in_cache: int, tokens: list[int], pages: list[int]) -> int:
        assert id_in_cache not in self.ids.values()
        handle = next(self.fresh)
        self.ids[handle], self.tokens[handle], self.pages[handle] = id_in_cache, list(tokens), list(pages)
        return handle

    @rule(target=sequences)
    def new(self) -> int:
        return self._enter(self.cache.new_sequence(), [], [])

    @rule(target=sequences, old=sequences)
    def fork(self, old: int) -> int:
        return self._enter(self.cache.fork(self.ids[old]), self.tokens[old], self.pages[old])

    @rule(
        chosen=st.lists(sequences, min_size=1, max_size=3, unique=True),
        counts=st.lists(st.integers(0, 24), min_size=3, max_size=3),
    )
    def append(self, chosen: list[int], counts: list[int]) -> None:
        counts = counts[: len(chosen)]
        pages = {handle: list(names) for handle, names in self.pages.items()}
        for handle, count in zip(chosen, counts, strict=True):
            self._extend(pages, handle, count)
        ids = [self.ids[handle] for handle in chosen]
        missing = len(set(itertools.chain(*pages.values()))) - self.cache.num_pages
        if missing > 0:
            with pytest.raises(OutOfPagesError) as caught:
                self.cache.append(ids, counts)
            assert caught.value.missing == missing
            return
        self.pages = pages
        added = [next(self.fresh) % BANK for _ in range(sum(counts))]
        slots = self.cache.append(ids, counts)
        for layer in range(LAYERS):
            self.cache.store(layer, BANK_K[added] * (layer + 1), BANK_V[added], slots)
        for handle, count in zip(chosen, counts, strict=True):
            self.tokens[handle] += added[:count]
            added = added[count:]

    def _extend(self, pages: dict[int, list[int]], handle: int, count: int) -> None:
        mine, length = pages[handle], len(self.tokens[handle])
        others = set(itertools.chain(*(names for other, names in pages.items() if other != handle)))
        if count and length % 16 and mine[-1] in others:
            mine[-1] = next(self.fresh)
        while len(mine) * 16 < length + count:
            mine.append(next(self.fresh))

    @rule(handle=sequences, fraction=st.floats(0, 1))
    def crop(self, handle: int, fraction: float) -> None:
        length = round(len(self.tokens[handle]) * fraction)
        self.cache.crop(self.ids[handle], length)
        del self.tokens[handle][length:]
        del self.pages[handle][-(-length // 16) :]

    @rule(handle=consumes(sequences))
    def free(self, handle: int) -> None:
        self.cache.free(self.ids[handle])
        del self.ids[handle], self.tokens[handle], self.pages[handle]

    @rule(more=st.integers(0, 2))
    def grow(self, more: int) -> None:
        self.cache.grow(min(9, self.cache.num_pages + more))

    @rule(room=st.integers(0, 2))
    def save_and_load(self, room: int) -> None:
        used = len(set(itertools.chain(*self.pages.values())))
        with tempfile.TemporaryDirectory() as folder:
            self.cache.save(Path(folder) / "cache")
            self.cache = PagedKVCache.load(Path(folder) / "cache", num_pages=max(1, used + room))
        self.ids = {handle: i for i, handle in enumerate(self.ids)}

    @invariant()
    def the_cache_holds_the_models_tokens(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        assert cache.sequences == list(self.ids.values())
        used = len(set(itertools.chain(*self.pages.values())))
        assert cache.num_free_pages == cache.num_pages - used
        assert cache.nbytes() == LAYERS * cache.num_pages * HEADS * 16 * cache.fmt.bytes_per_token
        for handle, tokens in self.tokens.items():
            assert cache.length(self.ids[handle]) == len(tokens)
            for got, bank in zip(contents(cache, self.ids[handle]), BANK_CONTENTS, strict=True):
                assert same_bits(got, bank[tokens])


CacheMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
test_a_cache_behaves_like_lists_of_tokens = CacheMachine.TestCase
