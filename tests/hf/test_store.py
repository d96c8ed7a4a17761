"""Rows, windows and pages against lists of tokens: whatever happens, every token is where it belongs, once."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvturbo import KVFormat, dequantize, quantize
from kvturbo.hf.geometry import PackedSpec
from kvturbo.hf.group import Group
from kvturbo.hf.store import PackedStore

FMT = KVFormat.from_name("k4v4", 64)
VECTORS = torch.randn(4096, 2, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
PACKED = dequantize(quantize(VECTORS, FMT, "k"), FMT, "k")

appends = st.tuples(st.just("append"), st.integers(1, 40), st.lists(st.integers(0, 40), min_size=3, max_size=3))
crops = st.tuples(st.just("crop"), st.integers(1, 30), st.just([]))
selects = st.tuples(st.just("select"), st.just(0), st.lists(st.integers(0, 2), min_size=3, max_size=3))


class Model:
    """The same in lists: tokens of each row, how many are in the sink and how many left the recent window."""

    def __init__(self, sink: int, recent: int) -> None:
        self.sizes = sink, recent
        self.columns: list[list[int | None]] = [[], [], []]
        self.fill = [(0, 0)] * 3

    def tokens(self, row: int) -> list[int]:
        return [x for x in self.columns[row] if x is not None]

    def settle(self, row: int) -> None:
        sink, packed = self.fill[row]
        total = len(self.tokens(row))
        sink = min(self.sizes[0], total)
        self.fill[row] = sink, max(min(packed, total - sink), total - sink - self.sizes[1])


@settings(deadline=None, max_examples=40)
@given(
    sink=st.sampled_from([0, 3]),
    recent=st.sampled_from([0, 7]),
    events=st.lists(st.one_of(appends, appends, crops, selects), min_size=1, max_size=7),
)
def test_every_token_is_where_it_belongs(sink: int, recent: int, events: list[tuple[str, int, list[int]]]) -> None:
    group = Group(
        PackedSpec(FMT, 2, sink, recent), [0], page_size=16, max_tokens=None, outlier_channels=None, backend="auto"
    )
    store, model, next_id = PackedStore([group]), Model(sink, recent), 0
    for kind, count, numbers in events:
        if kind == "append":
            ids = torch.arange(next_id, next_id + 3 * count).view(3, count)
            next_id += 3 * count
            new = torch.arange(count) >= torch.tensor(numbers)[:, None]  # left padding of the chunk
            for row in range(3):
                model.columns[row] += [int(x) if shown else None for x, shown in zip(ids[row], new[row], strict=True)]
            mask = torch.tensor([[x is not None for x in columns] for columns in model.columns])
            store.begin(3, count, torch.device("cpu"), mask)
            vectors = VECTORS[ids].transpose(1, 2)
            group.store(0, vectors, vectors)
        elif kind == "crop":
            store.crop(count)
            model.columns = [columns[: max(0, len(columns) - count)] for columns in model.columns]
        else:
            store.select(numbers)
            model.columns = [list(model.columns[i]) for i in numbers]
            model.fill = [model.fill[i] for i in numbers]
        for row in range(3):
            model.settle(row)
        check(store, group, model)


def check(store: PackedStore, group: Group, model: Model) -> None:
    if not store.batch:
        return
    assert store.lengths() == [len(model.tokens(row)) for row in range(3)]
    windows = group.windows[0]
    for row in range(3):
        tokens, (sink, packed) = model.tokens(row), model.fill[row]
        assert group.lengths()[row] == packed
        k, _ = group.pages.gather(0, group.sequences[row], 0, packed, dtype=torch.float32)
        torch.testing.assert_close(k, PACKED[tokens[sink : sink + packed]].view(-1, 2, 64))
        if windows is not None:
            recent = len(tokens) - sink - packed
            assert torch.equal(windows.sink[0, row, :sink], VECTORS[tokens[:sink]].view(-1, 2, 64).bfloat16())
            assert torch.equal(
                windows.recent[1, row, :recent], VECTORS[tokens[sink + packed :]].view(-1, 2, 64).bfloat16()
            )
