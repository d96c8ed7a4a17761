"""Questions and rows of the retrieval benchmark; engines need a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvturbo.bench.vllm_retrieval import SETTINGS, questions, rows_of
from kvturbo.eval.retrieval import RetrievalVocab, get_setting

MODEL = Path(__file__).parents[2] / "models" / "kvturbo-12m"


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_question_ends_where_its_answer_begins(setting: str) -> None:
    facts, vocab = get_setting(setting), RetrievalVocab.load(MODEL)
    asked = questions(setting, 2 * facts.questions, MODEL)
    assert len(asked) == 2 * facts.questions
    for question in asked:
        assert question.prompt[0] == vocab.bos and question.prompt[-1] == vocab.val
        assert question.prompt[-2 - facts.key_tokens] in (vocab.ask, vocab.hop)
        assert len(question.prompt) + len(question.answer) <= facts.length
        assert sum(question.scored) == facts.hops * facts.value_tokens and question.scored[0] and question.scored[-1]
        assert vocab.end not in question.answer
    same = [question.prompt[:100] == asked[0].prompt[:100] for question in asked]
    assert same == [True] * facts.questions + [False] * facts.questions


def test_the_answer_follows_its_key_in_the_context() -> None:
    question = questions("multikey-4k", 16, MODEL)[3]
    key, text = question.prompt[-4:], question.prompt[:-5]
    places = [i for i in range(len(text)) if text[i : i + 4] == key]
    assert [text[i + 4 : i + 7] for i in places] == [question.answer]


def test_only_tokens_that_count_must_be_right() -> None:
    question = questions("hard-4k", 16, MODEL)[0]
    unscored = question.scored.index(False)
    other = [token + (i == unscored) for i, token in enumerate(question.answer)]
    assert question.right(question.answer) and question.right(other)
    assert not question.right([token + (i == 0) for i, token in enumerate(question.answer)])
    assert not question.right(question.answer[:-1])


def test_questions_come_by_context() -> None:
    with pytest.raises(ValueError, match="a positive multiple of 16 for hard-4k, got 20"):
        questions("hard-4k", 20, MODEL)


def test_rows_are_paired_with_16_bits() -> None:
    right = {"auto": [True, True, False, True], "turboquant": [True, False, True, False]}
    rows = rows_of({("hard-4k", 512, name): found for name, found in right.items()})
    assert rows[1]["right"] == 2 and rows[1]["accuracy"] == 0.5 and rows[1]["difference_points"] == -25
    assert (rows[1]["only_16bit_right"], rows[1]["only_this_right"]) == (2, 1)
    assert rows_of({("hard-4k", 512, "auto"): [True], ("hard-4k", 8192, "fp8"): [True]})[1]["difference_points"] is None
