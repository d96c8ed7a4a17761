"""What PagedKVCache keeps between the layers of a step, and between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import PagedKVCache, ops
from kvturbo.cache import MOST_BATCHES
from small_cache import LAYERS, extend, make, vectors
from support import BACKENDS_UNDER_TEST, device_of, relative_error


def decoded_alone(cache: PagedKVCache, layer: int, q: Tensor, sequences: list[int], **options: Any) -> Tensor:
    """By the reference, with a block table, lengths and nothing else that is made for this call."""
    q_lens = options.pop("q_lens", None)
    counts = None if q_lens is None else torch.tensor(q_lens, dtype=torch.int32, device=cache.device)
    table, lens = cache.block_table(sequences), cache.seq_lens(sequences)
    return ops.decode(q, cache.pages[layer], table, lens, fmt=cache.fmt, q_lens=counts, backend="reference", **options)[
        0
    ]


@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
def test_layers_share_tables_and_a_plan_and_steps_do_not(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change of lengths or pages between two decodes, at the end of a block of 128 tokens."""
    cache = make(backend="reference", num_pages=40, device=device_of(backend))
    cache.backend = backend  # stores by the reference: what is tested is decode
    a, b = cache.new_sequence(), cache.new_sequence()

    def more(sequence: int, count: int, seed: int) -> None:
        cache.backend = "reference"
        extend(cache, sequence, *vectors(count, seed))
        cache.backend = backend

    def check(sequences: list[int], **options: Any) -> None:
        rows = sum(options.get("q_lens", [1] * len(sequences)))
        tables: set[int] = set()
        with monkeypatch.context() as patch:
            decode = ops.decode
            patch.setattr(
                ops, "decode", lambda q, pages, *args, **o: tables.add(id(args[0])) or decode(q, pages, *args, **o)
            )
            got = []
            for layer in range(LAYERS):
                q = torch.randn(rows, 4, 64, generator=torch.Generator().manual_seed(layer)).to(cache.device)
                got.append((q, cache.decode(layer, q, sequences, scale=0.2, **options)[0]))
        assert len(tables) == 1
        for layer, (q, out) in enumerate(got):
            assert relative_error(out, decoded_alone(cache, layer, q, sequences, scale=0.2, **options)) <= 1e-3

    more(a, 127, 1), more(b, 20, 2)
    check([a, b])
    more(a, 3, 3)
    check([a, b])
    for sequences in ([b, a], [a]):
        check(sequences)
    for q_lens in ([2, 1], [1, 2]):
        check([a, b], q_lens=q_lens)
    check([a, b], window=5)
    cache.crop(a, 100)
    check([a, b])
    c = cache.fork(a)
    more(c, 40, 4)
    check([a, c])
    check([a, b])
    cache.free(b)
    with pytest.raises(ValueError, match=f"no sequence {b}"):
        cache.decode(0, torch.zeros(2, 4, 64, device=cache.device), [a, b], scale=0.2)
    more(a, 40, 5)  # into b's pages
    check([a, c])
    cache.grow(60)
    more(a, 1, 6)
    check([a, c])


def test_only_a_steps_tables_are_kept() -> None:
    cache = make(num_pages=300)
    sequences = [cache.new_sequence() for _ in range(MOST_BATCHES + 5)]
    slots = cache.append(sequences, [1] * len(sequences))
    cache.store(0, *vectors(len(sequences)), slots)
    for sequence in sequences:
        cache.decode(0, torch.zeros(1, 4, 64), [sequence], scale=1.0)
        assert len(cache._batches) <= MOST_BATCHES
    cache.append(sequences, [1] * len(sequences))
    cache.decode(0, torch.zeros(1, 4, 64), [0], scale=1.0)
    assert len(cache._batches) == 1
