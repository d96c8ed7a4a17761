"""Questions and rows of the retrieval benchmark; engines need a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench_scripts import load_script
from kvturbo.bench import vllm_recent
from kvturbo.bench.vllm_recent import sizes_of
from kvturbo.bench.vllm_retrieval import CACHE_DTYPES, SETTINGS, Job, jobs, questions, rows_of
from kvturbo.eval.retrieval import RetrievalVocab, get_setting
from kvturbo.vllm import rings

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
    rows = rows_of({Job("hard-4k", 512, name): found for name, found in right.items()})
    assert rows[1]["right"] == 2 and rows[1]["accuracy"] == 0.5 and rows[1]["difference_points"] == -25
    assert (rows[1]["only_16bit_right"], rows[1]["only_this_right"]) == (2, 1)
    unpaired = rows_of({Job("hard-4k", 512, "auto"): [True], Job("hard-4k", 8192, "fp8"): [True]})
    assert unpaired[1]["difference_points"] is None


def test_packed_caches_alone_have_an_engine_for_every_size_of_rings() -> None:
    sizes = sizes_of("16,0")
    found = jobs(["hard-4k"], [512], CACHE_DTYPES, sizes)
    assert [(job.cache_dtype, job.recent) for job in found] == [
        ("auto", None), ("fp8", None), ("turboquant", 16), ("turboquant", 0), ("kvturbo_k4v4-o16", 16), ("kvturbo_k4v4-o16", 0),
    ]  # fmt: skip
    rows = rows_of({job: [job.recent == 16, True] for job in found})
    assert [row["recent"] for row in rows] == [None, None, 16, 0, 16, 0]
    assert [row["difference_points"] for row in rows] == [0, 0, 50, 0, 50, 0]


def test_an_engine_is_not_told_what_was_not_asked_for() -> None:
    untold = jobs(["hard-4k"], [512], ["auto", "turboquant"])
    assert [vllm_recent.options(job.recent) for job in untold] == [{}, {}]
    assert vllm_recent.options(0) == {"additional_config": {"kvturbo": {"recent": 0}}}
    assert rows_of({untold[1]: [True]})[0]["recent"] == rings.DEFAULT
    assert rings.ring_size(vllm_recent.options(16)["additional_config"]) == 16


@pytest.mark.parametrize("text, got", [("16,7", "7"), ("x", "x"), ("", ""), ("16,", "")])
def test_sizes_of_rings_are_those_that_exist(text: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"^recent must be among 0, 8, 16, 32, got '{got}'$"):
        sizes_of(text)


def test_unknown_settings_and_empty_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="setting must be one of .*got 'x'"):
        jobs(["hard-4k", "x"], [512], ["auto"])
    with pytest.raises(ValueError, match="chunks must have at least 1 token, got 512, 0"):
        jobs(["hard-4k"], [512, 0], ["auto"])


FAKE = """
import json, pathlib, sys, time
job = json.loads(sys.argv[sys.argv.index("--one") + 1])
if job["cache_dtype"] == "fp8":
    sys.exit("out of memory")
time.sleep(job["chunk"] / 1000)
pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps([True, job["recent"] == 16]))
"""
"""Answers instead of an engine; small chunks end first."""


def test_results_are_written_as_engines_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, fake, out = load_script("vllm_retrieval"), tmp_path / "fake.py", tmp_path / "out.json"
    fake.write_text(FAKE)
    monkeypatch.setattr(script, "__file__", str(fake))
    monkeypatch.setattr(script.running, "checked_commit", lambda given: "0123456789ab")
    files: list[dict[str, Any]] = []
    write = script.report.write

    def written(path: Path, *arguments: Any, **facts: Any) -> None:
        write(path, *arguments, **facts)
        files.append(json.loads(path.read_text()))

    monkeypatch.setattr(script.report, "write", written)
    options = {"settings": "hard-4k", "dtypes": "auto,fp8,turboquant", "chunks": "1000,1", "recent": "16,0", "out": out}
    monkeypatch.setattr("sys.argv", ["x", *(f"--{name}={value}" for name, value in options.items())])
    assert script.main() == 1
    assert [len(file["rows"]) + len(file["failed"]) for file in files] == list(range(1, 9))
    assert [(row["chunk"], row["kv_cache_dtype"], row["recent"]) for row in files[-1]["rows"]] == [
        (chunk, *cache) for chunk in (1000, 1) for cache in (("auto", None), ("turboquant", 16), ("turboquant", 0))
    ]
    assert sorted(files[-1]["failed"]) == ["hard-4k 1 fp8", "hard-4k 1000 fp8"]
    assert all("out of memory" in text for text in files[-1]["failed"].values())


def test_bad_sizes_of_rings_end_the_script_before_any_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("vllm_retrieval")
    monkeypatch.setattr(script.running, "checked_commit", lambda given: "0123456789ab")
    monkeypatch.setattr(script, "measure", lambda *arguments: pytest.fail("an engine was begun"))
    monkeypatch.setattr("sys.argv", ["x", "--recent=12", f"--out={tmp_path / 'out.json'}"])
    assert script.main() == 2 and not (tmp_path / "out.json").exists()
    assert capsys.readouterr().err == "recent must be among 0, 8, 16, 32, got '12'\n"
