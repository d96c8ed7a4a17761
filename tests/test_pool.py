"""The page pool: who owns which page, and how many are missing."""

from __future__ import annotations

import pytest

from kvturbo import OutOfPagesError
from kvturbo.pool import PagePool


def test_pages_are_handed_out_as_sequences_grow_and_slots_follow_one_another() -> None:
    pool = PagePool(6, 16)
    a, b = pool.new_sequence(), pool.new_sequence()
    slots, copies = pool.append([a, b], [17, 3])
    assert copies == [] and pool.num_free == 3
    assert slots[:16] == list(range(pool.table(a)[0] * 16, pool.table(a)[0] * 16 + 16))
    assert slots[16] == pool.table(a)[1] * 16
    assert slots[17:] == [pool.table(b)[0] * 16 + i for i in range(3)]
    more, _ = pool.append([b, a], [1, 2])
    assert more == [pool.table(b)[0] * 16 + 3, pool.table(a)[1] * 16 + 1, pool.table(a)[1] * 16 + 2]
    assert pool.num_free == 3 and pool.length(a) == 19 and pool.length(b) == 4


def test_crop_and_free_give_back_exactly_the_pages_that_nobody_uses() -> None:
    pool = PagePool(4, 16)
    a = pool.new_sequence()
    pool.append([a], [50])
    assert pool.num_free == 0
    pool.crop(a, 33)
    assert pool.num_free == 1 and len(pool.table(a)) == 3
    b = pool.fork(a)
    pool.crop(a, 0)
    assert pool.num_free == 1 and pool.table(a) == [], "the fork still uses them"
    pool.free(b)
    assert pool.num_free == 4
    pool.free(a)
    assert pool.num_free == 4 and not pool.tables


def test_only_the_writers_of_a_shared_page_that_are_not_its_last_user_copy_it() -> None:
    pool = PagePool(5, 16)
    a = pool.new_sequence()
    pool.append([a], [5])
    b, c = pool.fork(a), pool.fork(a)
    shared = pool.table(a)[0]
    _, copies = pool.append([a, b, c], [1, 1, 1])
    assert [old for old, _ in copies] == [shared, shared] and pool.table(c) == [shared]
    assert pool.num_free == 2 and len({pool.table(s)[0] for s in (a, b, c)}) == 3


def test_both_forks_fit_where_one_page_is_left() -> None:
    pool = PagePool(2, 16)
    a = pool.new_sequence()
    pool.append([a], [5])
    b = pool.fork(a)
    pool.append([a, b], [2, 2])
    assert pool.num_free == 0


def test_full_shared_pages_are_never_copied() -> None:
    pool = PagePool(4, 16)
    a = pool.new_sequence()
    pool.append([a], [32])
    b = pool.fork(a)
    assert pool.append([b], [1])[1] == [] and pool.table(b)[:2] == pool.table(a)
    pool.crop(b, 20)
    assert pool.append([b], [1])[1] == [(pool.table(a)[1], pool.table(b)[1])]


def test_out_of_pages_says_how_many_are_missing_and_changes_nothing() -> None:
    pool = PagePool(3, 16)
    a = pool.new_sequence()
    pool.append([a], [20])
    b = pool.fork(a)
    before = (dict(pool.tables), pool.length(a), pool.num_free)
    message = "out of pages: 3 needed, 1 of 3 free, 2 missing"
    with pytest.raises(OutOfPagesError, match=message) as caught:
        pool.append([a, b], [13, 13])  # one copy, and a page more for each
    assert caught.value.missing == 2
    assert before == (dict(pool.tables), pool.length(a), pool.num_free)


def test_growing_adds_free_pages_and_keeps_ids() -> None:
    pool = PagePool(1, 16)
    a = pool.new_sequence()
    pool.append([a], [16])
    table = list(pool.table(a))
    pool.grow(3)
    assert pool.num_free == 2 and pool.num_pages == 3 and pool.table(a) == table
    pool.append([a], [32])
    assert sorted(pool.table(a)) == [0, 1, 2]
    with pytest.raises(ValueError, match="num_pages must be at least the present 3, got 2"):
        pool.grow(2)


def test_adopted_tables_share_pages_and_wrong_ones_change_nothing() -> None:
    pool = PagePool(5, 16)
    a, b = pool.adopt([([0, 2], 20), ([0], 16)])
    assert pool.num_free == 3 and pool.length(a) == 20
    pool.free(a)
    assert pool.num_free == 4
    pool.free(b)
    assert pool.num_free == 5
    for table, length in (([0, 5], 20), ([0, -1], 20), ([0], 20), ([0, 1], 16)):
        with pytest.raises(ValueError, match=f"do not hold {length} tokens"):
            pool.adopt([([3], 4), (table, length)])
    assert pool.num_free == 5 and not pool.tables


def test_a_large_pool_is_adopted_in_linear_time() -> None:
    pool = PagePool(200_000, 16)
    pool.adopt([(range(200_000), 200_000 * 16)])
    assert pool.num_free == 0


def test_bad_arguments_name_the_value_and_change_nothing() -> None:
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        PagePool(0, 16)
    pool = PagePool(4, 16)
    a = pool.new_sequence()
    pool.append([a], [5])
    for sequences, counts, message in [
        ([a, a], [1, 1], r"no sequence twice, got \[0, 0\]"),
        ([a], [1, 1], r"one count per sequence.*\[0\] and \[1, 1\]"),
        ([a], [-1], r"counts must not be negative, got \[-1\]"),
        ([a], [1.5], r"counts must be whole, got \[1.5\]"),
        ([a, 7], [1, 1], "no sequence 7; live sequences: 0"),
        ([7], [0], "no sequence 7"),
    ]:
        with pytest.raises(ValueError, match=message):
            pool.append(sequences, counts)
    for length in (-1, 6):
        with pytest.raises(ValueError, match=f"length must be from 0 to 5, got {length}"):
            pool.crop(a, length)
    with pytest.raises(ValueError, match=r"length must be whole, got \[2.5\]"):
        pool.crop(a, 2.5)  # type: ignore[arg-type]
    for call in (pool.fork, pool.free, pool.length, pool.table):
        with pytest.raises(ValueError, match="no sequence 3; live sequences: 0"):
            call(3)
    assert pool.length(a) == 5 and pool.num_free == 3
    pool.free(a)
    with pytest.raises(ValueError, match="live sequences: none"):
        pool.free(a)
