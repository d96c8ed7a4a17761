"""Retrieval samples are what they say, and the scorer counts only exact answers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from kvturbo.eval.retrieval import (
    ALIASES,
    HARD_LEVELS,
    SETTINGS,
    RetrievalVocab,
    Sample,
    Setting,
    get_setting,
    hard_setting,
    make_keys,
    make_sample,
    samples,
    score,
    wilson_interval,
)

VOCAB = RetrievalVocab(bos=1, key=3, val=4, ask=5, hop=6, mark=7, copy=8, end=9, first_content=10, size=1024)
TEXT = np.random.default_rng(7).integers(10, 1024, 20_000)
SMALL = {
    "multikey": Setting("multikey", 400, records=12, questions=5, key_tokens=3, value_tokens=4),
    "needle": Setting("needle", 400, records=12, questions=1, family=12),
    "hops": Setting("hops", 400, records=12, questions=4, hops=3),
    "copy": Setting("copy", 400, records=4, questions=3, key_tokens=4, value_tokens=8),
}


def perfect_logits(sample: Sample) -> torch.Tensor:
    """Logits whose argmax at row i is token i + 1 of the chunk."""
    logits = torch.zeros(len(sample.questions), VOCAB.size)
    logits[torch.arange(len(sample.questions) - 1), torch.from_numpy(sample.questions[1:])] = 1.0
    return logits


def records_of(sample: Sample, setting: Setting) -> list[list[int]]:
    return sample.context[sample.record_positions].reshape(-1, setting.record_length).tolist()


def table_of(sample: Sample, setting: Setting) -> dict[tuple[int, ...], list[int]]:
    """Key to value, read back from the context alone."""
    table = {}
    for row in records_of(sample, setting):
        assert row[0] == VOCAB.key and row[1 + setting.key_tokens] == VOCAB.val and row[-1] == VOCAB.end
        table[tuple(row[1 : 1 + setting.key_tokens])] = row[2 + setting.key_tokens : -1]
    return table


@pytest.mark.parametrize("setting", SMALL.values(), ids=SMALL.keys())
def test_context_and_questions_fill_exactly_the_length(setting: Setting) -> None:
    sample = make_sample(setting, TEXT, VOCAB, np.random.default_rng(0))
    assert len(sample.context) + len(sample.questions) == setting.length
    assert sample.context[0] == VOCAB.bos
    assert sample.record_positions.sum() == setting.records * setting.record_length
    assert sample.num_questions == setting.questions
    assert not sample.answer_positions[0]
    np.testing.assert_array_equal(sample.answer_positions, sample.question_index >= 0)


def test_text_between_records_is_an_unbroken_slice() -> None:
    sample = make_sample(SMALL["multikey"], np.arange(10, 1010), VOCAB, np.random.default_rng(3))
    text = sample.context[1:][~sample.record_positions[1:]]
    assert set(np.diff(text)) == {1}


@pytest.mark.parametrize("task", ["multikey", "needle"])
def test_every_answer_is_the_value_stored_in_the_context(task: str) -> None:
    setting = SMALL[task]
    for seed in range(20):
        sample = make_sample(setting, TEXT, VOCAB, np.random.default_rng(seed))
        table = table_of(sample, setting)
        rows = sample.questions.reshape(setting.questions, -1)
        asked = {tuple(row[1 : 1 + setting.key_tokens]) for row in rows}
        assert len(table) == setting.records and len(asked) == setting.questions
        for i, row in enumerate(rows):
            answer = sample.questions[sample.question_index == i].tolist()
            assert row[0] == VOCAB.ask and answer == table[tuple(row[1 : 1 + setting.key_tokens])]


def test_hops_follow_the_chain_link_by_link() -> None:
    setting = SMALL["hops"]
    sample = make_sample(setting, TEXT, VOCAB, np.random.default_rng(1))
    table = table_of(sample, setting)
    for i, row in enumerate(sample.questions.reshape(setting.questions, -1)):
        key, expected = tuple(row[1:4]), []
        for _ in range(setting.hops):
            value = table[key]
            expected += value
            key = tuple(value)
        assert row[0] == VOCAB.hop
        assert sample.questions[sample.question_index == i].tolist() == expected
        assert key not in table


def test_copy_scores_the_rest_of_a_planted_span() -> None:
    setting = SMALL["copy"]
    sample = make_sample(setting, TEXT, VOCAB, np.random.default_rng(1))
    spans = [row[1:-1] for row in records_of(sample, setting)]
    for i, row in enumerate(sample.questions.reshape(setting.questions, -1)):
        assert row[0] == VOCAB.copy and row[1:-1].tolist() in spans
        assert sample.questions[sample.question_index == i].tolist() == row[5:-1].tolist()


@pytest.mark.parametrize("count,tokens,family", [(300, 2, 8), (64, 3, 4), (63, 3, 63), (5, 1, 5), (40, 4, 1)])
def test_keys_are_distinct_and_families_differ_in_one_token(count: int, tokens: int, family: int) -> None:
    keys = make_keys(np.random.default_rng(0), count, tokens, family, VOCAB)
    assert keys.shape == (count, tokens) and len(np.unique(keys, axis=0)) == count
    assert keys.min() >= VOCAB.first_content and keys.max() < VOCAB.size
    if family > 1:
        differing = (keys[:, None] != keys[None]).sum(-1) + count * np.eye(count, dtype=int)
        assert (differing.min(1) == 1).mean() > 0.9


def test_samples_depend_on_seed_and_index_but_not_on_count() -> None:
    few = list(samples("multikey-1k", 2, TEXT, VOCAB, seed=5))
    many = list(samples("multikey-1k", 3, TEXT, VOCAB, seed=5))
    other = next(samples("multikey-1k", 1, TEXT, VOCAB, seed=6))
    np.testing.assert_array_equal(few[1].context, many[1].context)
    np.testing.assert_array_equal(few[1].questions, many[1].questions)
    assert not np.array_equal(many[0].context, many[1].context)
    assert not np.array_equal(many[0].context, other.context)


@pytest.mark.parametrize("alias,name", ALIASES.items())
def test_an_alias_makes_the_samples_of_its_setting(alias: str, name: str) -> None:
    assert get_setting(alias) is SETTINGS[name]
    aliased, named = next(samples(alias, 1, TEXT, VOCAB)), next(samples(name, 1, TEXT, VOCAB))
    np.testing.assert_array_equal(aliased.context, named.context)


@pytest.mark.parametrize("setting", SMALL.values(), ids=SMALL.keys())
def test_score_is_true_for_the_right_tokens_only(setting: Setting) -> None:
    sample = make_sample(setting, TEXT, VOCAB, np.random.default_rng(2))
    assert score(perfect_logits(sample), sample) == [True] * setting.questions
    assert score(perfect_logits(sample).numpy(), sample) == [True] * setting.questions
    for position in np.flatnonzero(sample.answer_positions):
        logits = perfect_logits(sample)
        logits[position - 1, VOCAB.end] = 2.0
        expected = [i != sample.question_index[position] for i in range(setting.questions)]
        assert score(logits, sample) == expected


def test_score_ignores_tokens_that_are_not_answers_and_the_last_row() -> None:
    sample = make_sample(SMALL["multikey"], TEXT, VOCAB, np.random.default_rng(2))
    logits = perfect_logits(sample)
    unscored = np.flatnonzero(~sample.answer_positions[1:])
    logits[torch.from_numpy(unscored)] = float("nan")
    logits[-1] = float("nan")
    assert all(score(logits, sample))


def test_score_counts_nan_as_wrong() -> None:
    sample = make_sample(SMALL["multikey"], TEXT, VOCAB, np.random.default_rng(2))
    assert not any(score(torch.full((len(sample.questions), VOCAB.size), float("nan")), sample))
    poisoned = torch.zeros(len(sample.questions), VOCAB.size)
    poisoned[torch.arange(len(sample.questions) - 1), torch.from_numpy(sample.questions[1:])] = float("nan")
    assert not any(score(poisoned, sample))


def test_score_rejects_logits_of_another_length() -> None:
    sample = make_sample(SMALL["multikey"], TEXT, VOCAB, np.random.default_rng(2))
    with pytest.raises(ValueError, match=r"logits must be \[50, vocabulary\], got \(49, 1024\)"):
        score(perfect_logits(sample)[1:], sample)


@pytest.mark.parametrize("name", SETTINGS)
def test_named_settings_make_samples_of_their_length(name: str) -> None:
    setting = get_setting(name)
    sample = next(samples(name, 1, TEXT, VOCAB))
    assert len(sample.context) + len(sample.questions) == setting.length
    assert setting.text_tokens >= 0.05 * setting.length


def test_hard_levels_ask_for_more_as_they_rise() -> None:
    for size in ("4k", "8k"):
        levels = [get_setting(f"hard-{size}-{level}") for level in HARD_LEVELS]
        for easy, hard in pairwise(levels):
            for field in ("records", "key_tokens", "family", "hops"):
                assert getattr(hard, field) >= getattr(easy, field)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"task": "sort"}, "task must be one of multikey, needle, hops, copy, got 'sort'"),
        ({"questions": 13}, "questions must be from 1 to 12"),
        ({"records": 0}, "records must be a positive multiple of hops = 1, got 0"),
        ({"length": 100}, "length must be at least 171 for its records, got 100"),
        ({"key_tokens": 7}, "key_tokens must be from 1 to 6, got 7"),
        ({"hops": 2}, "hops must be 1 for task multikey, got 2"),
    ],
)
def test_impossible_settings_are_refused_with_the_value(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL["multikey"], **change)


def test_short_text_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="text must have at least 230 tokens, got 50"):
        make_sample(SMALL["multikey"], TEXT[:50], VOCAB, np.random.default_rng(0))
    with pytest.raises(ValueError, match="setting must be one of multikey-1k.*, got 'nope'"):
        get_setting("nope")


def test_vocabulary_survives_its_file_and_refuses_another_shape(tmp_path: Path) -> None:
    VOCAB.save(tmp_path)
    assert RetrievalVocab.load(tmp_path) == VOCAB
    assert RetrievalVocab.load(tmp_path / "retrieval.json") == VOCAB
    (tmp_path / "retrieval.json").write_text(json.dumps({**asdict(VOCAB), "extra": 1}))
    with pytest.raises(ValueError, match="retrieval vocabulary needs exactly"):
        RetrievalVocab.load(tmp_path)
    (tmp_path / "retrieval.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"retrieval.json: retrieval vocabulary needs exactly .*, got \[1\]"):
        RetrievalVocab.load(tmp_path)
    (tmp_path / "retrieval.json").write_text('{"bos":')
    with pytest.raises(ValueError, match="retrieval.json is not JSON: "):
        RetrievalVocab.load(tmp_path)
    with pytest.raises(ValueError, match="ask must be below first_content = 10, got 99"):
        replace(VOCAB, ask=99)


def test_wilson_interval_matches_published_values() -> None:
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson_interval(500, 500)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 500)[0] == pytest.approx(0.0)
    with pytest.raises(ValueError, match="hits must be from 0 to count > 0, got 3 of 2"):
        wilson_interval(3, 2)


@pytest.mark.parametrize("level", HARD_LEVELS)
def test_the_hard_ladder_has_whole_chains_at_every_length(level: int) -> None:
    base = hard_setting(4096, level)
    for length in (4097, 5000, 7777):
        grown = hard_setting(length, level)
        assert grown.records % grown.hops == 0
        assert 0 <= base.records * length / 4096 - grown.records < 1 + grown.hops


def test_a_length_without_room_for_the_questions_is_refused() -> None:
    assert hard_setting(2048, 8).chains >= 16
    with pytest.raises(ValueError, match="length must be at least 1093 for 16 chains of records, got 1092"):
        hard_setting(1092, 8)
