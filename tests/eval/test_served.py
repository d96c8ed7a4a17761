"""A served model gives what the same model and cache give in this process, and failures end in one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_vllm import FakeVllm, Refused, serving
from kvturbo.eval import retrieval
from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.kl_bound import kl_lower_bound
from kvturbo.eval.metrics.kl import kl_divergence
from kvturbo.eval.model import LoadedModel, embedded_folder, load_model
from kvturbo.eval.registry import SERVED_TASKS, TASKS
from kvturbo.eval.runner import Evaluation
from kvturbo.eval.served.frequent import ServedFrequentWords
from kvturbo.eval.served.generation import ServedGeneration
from kvturbo.eval.served.retrieval import ServedRetrieval
from kvturbo.eval.served.text import ServedText
from kvturbo.eval.served_model import ServedModel
from kvturbo.eval.server import Server, ServerError
from kvturbo.eval.tasks.frequent import FrequentWordsTask
from kvturbo.eval.tasks.generation import GenerationTask
from kvturbo.eval.tasks.retrieval import RetrievalTask
from kvturbo.eval.tasks.text import TextTask
from tiny_model import LAYERS

K2V2 = CacheSpec("k2v2", recent=0, sink=0)
SIXTEEN = CacheSpec("16bit")
TEXT = {"texts": 2, "prefix": 64, "scored": 150, "chunk": 64}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def embedded() -> LoadedModel:
    if embedded_folder() is None:
        pytest.skip("the embedded model is not here")
    return load_model(device="cpu")


def served_by(loaded: LoadedModel, *urls: str, **options: Any) -> ServedModel:
    servers = [Server.connect(url) for url in urls]
    return ServedModel(loaded.name, loaded.tokenizer, loaded.folder, None, servers, **options)


def both(
    loaded: LoadedModel,
    task: Any,
    spec: CacheSpec,
    first: int,
    out: Path | None = None,
    chunk: int = 1 << 20,
    **options: Any,
) -> dict[str, Any]:
    """Rows of a packed and a 16-bit server."""
    size = chunk or 1 << 20
    packed, plain = FakeVllm(loaded, spec, first, size, "turboquant"), FakeVllm(loaded, SIXTEEN, first, size)
    with serving(packed) as url, serving(plain) as reference:
        served = served_by(loaded, url, reference, chunk=chunk, **options)
        results = Evaluation(served, {"task": task}, served.specs).run()
    return results["tasks"]["task"]["caches"]


def local(loaded: LoadedModel, task: Any, spec: CacheSpec) -> dict[str, Any]:
    return Evaluation(loaded, {"task": task}, [SIXTEEN, spec]).run()["tasks"]["task"]["caches"]


def test_every_task_can_be_served() -> None:
    assert SERVED_TASKS.names() and set(SERVED_TASKS.names()) == set(TASKS.names())


def test_perplexity_and_the_bound_are_those_of_the_same_chunks_here(tiny: LoadedModel) -> None:
    """A server that reads 64 tokens at a time does what the task does here with a prefix and chunks of 64."""
    here = local(tiny, TextTask(**TEXT), K2V2)
    there = both(tiny, ServedText(**TEXT), K2V2, 64, chunk=64, top=20)
    for name, row in (("16bit", "16bit"), ("k2v2", "turboquant")):
        assert there[row]["nll"] == pytest.approx(here[name]["nll"], abs=2e-6)
        assert there[row]["perplexity"] == pytest.approx(here[name]["perplexity"], rel=2e-6)
        assert there[row]["scored_tokens"] == 300
    packed = there["turboquant"]
    assert (
        packed["packed_tokens_read_per_layer"] * LAYERS
        == here["k2v2"]["packed_tokens_read"]
        == 2 * LAYERS * (64 + 128 + 192)
    )
    assert there["16bit"]["packed_tokens_read_per_layer"] == 0
    assert packed["same_top1"] == here["k2v2"]["same_top1"] < 1
    assert 0 < packed["kl_lower_bound_mean"] < here["k2v2"]["kl_mean"]
    assert packed["kl_lower_bound_p99.9"] <= here["k2v2"]["kl_p99.9"]
    assert there["16bit"]["kl_lower_bound_mean"] == 0 and there["16bit"]["same_top1"] == 1
    (source,) = packed["sources"]
    assert source["vllm"] == "0.33.0" and source["model"] == "served/model" and source["kv_cache_dtype"] == "turboquant"
    assert "--max-num-batched-tokens 64 --no-enable-prefix-caching" in source["assumes"]


def test_the_bound_is_near_the_divergence_of_a_trained_model(embedded: LoadedModel) -> None:
    """Its distributions are peaked, so twenty tokens hold most of what differs."""
    options = {"texts": 1, "prefix": 128, "scored": 200, "chunk": 128}
    here = local(embedded, TextTask(**options), K2V2)["k2v2"]
    there = both(embedded, ServedText(**options), K2V2, 128, chunk=128)["turboquant"]
    assert 0.6 * here["kl_mean"] < there["kl_lower_bound_mean"] < here["kl_mean"]
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-4)


def test_with_all_tokens_the_bound_is_the_divergence(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    here = local(tiny, TextTask(**TEXT), K2V2)["k2v2"]
    vocab = tiny.retrieval_vocab.size
    original = FakeVllm.__post_init__
    monkeypatch.setattr(
        FakeVllm, "__post_init__", lambda self: (setattr(self, "max_logprobs", vocab), original(self))[1]
    )
    there = both(tiny, ServedText(**TEXT), K2V2, 64, chunk=64, top=vocab)["turboquant"]
    assert there["kl_lower_bound_mean"] == pytest.approx(here["kl_mean"], rel=1e-3, abs=1e-6)
    assert there["top_logprobs"] == vocab


def test_the_bound_is_below_the_divergence() -> None:
    generator = torch.Generator().manual_seed(3)
    p = torch.randn(200, 50, generator=generator, dtype=torch.float64).mul(3)
    q = p + 0.3 * torch.randn(200, 50, generator=generator, dtype=torch.float64)
    exact = kl_divergence(p, q).tolist()
    for top in (1, 5, 20):
        bounds = []
        for a, b in zip(p.log_softmax(-1), q.log_softmax(-1), strict=True):
            sides = [{str(i): row[i].item() for i in row.topk(top).indices.tolist()} for row in (a, b)]
            bounds.append(kl_lower_bound(*sides))
        assert all(bound <= value + 2e-6 for bound, value in zip(bounds, exact, strict=True))
        assert top < 20 or sum(bounds) > 0.8 * sum(exact)
    assert kl_lower_bound({"1": 0.0}, {"1": 0.0}) == 0
    assert kl_lower_bound({"1": math.log(0.5)}, {"1": math.log(0.25)}) == pytest.approx(
        0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    )


def test_continuations_agree_as_long_as_here(tiny: LoadedModel) -> None:
    options = {"texts": 3, "prefix": 150, "new": 12}
    here = local(tiny, GenerationTask(**options), K2V2)
    there = both(tiny, ServedGeneration(**options), K2V2, 149)
    assert there["turboquant"]["agreed_tokens"] == here["k2v2"]["agreed_tokens"] < 12
    assert there["16bit"]["agreed_tokens"] == 12 and there["16bit"]["identical"] == 1
    assert there["turboquant"]["packed_tokens_read_per_layer"] == 3 * sum(range(150, 161))


def test_frequent_words_are_those_found_here(embedded: LoadedModel) -> None:
    options = {"length": 400, "common": 3, "repeats": 8, "rare": 10, "prompts": 3}
    here = local(embedded, FrequentWordsTask(**options), K2V2)
    there = both(embedded, ServedFrequentWords(**options), K2V2, 400)
    assert 0 < here["16bit"]["accuracy"] < 1
    for name, row in (("16bit", "16bit"), ("k2v2", "turboquant")):
        assert there[row]["accuracy"] == here[name]["accuracy"]
    assert there["turboquant"]["packed_tokens_read_per_layer"] == 3 * 400
    assert there["turboquant"]["difference"] == pytest.approx(here["k2v2"]["accuracy"] - here["16bit"]["accuracy"])


@pytest.mark.parametrize(
    "setting",
    [
        retrieval.Setting("multikey", 512, records=20, questions=4, key_tokens=4, value_tokens=4, family=10),
        retrieval.Setting("hops", 512, records=40, questions=3, key_tokens=4, value_tokens=4, family=20, hops=2),
        retrieval.Setting("copy", 512, records=8, questions=2, key_tokens=4, value_tokens=12),
    ],
    ids=lambda setting: setting.task,
)
def test_answers_are_those_given_here(
    embedded: LoadedModel, setting: retrieval.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(retrieval.SETTINGS, "small", setting)
    options = {"setting": "small", "prompts": 2}
    task, served = RetrievalTask(**options), ServedRetrieval(**options)
    first = setting.length - setting.questions * setting.question_length
    records = [task.measure(embedded, i, [SIXTEEN])["16bit"]["correct"] for i in range(2)]
    fake = FakeVllm(embedded, SIXTEEN, first)
    with serving(fake) as url:
        model = served_by(embedded, url)
        asked = [served.ask(model, model.specs[0], i) for i in range(2)]
    assert [record["correct"] for record in asked] == records
    assert any(any(row) for row in records)
    assert len(fake.requests) == 2 * setting.questions * setting.hops
    assert {body["max_tokens"] for body in fake.requests} == {setting.value_tokens}


def test_wrong_answers_count_as_wrong_and_are_paired(embedded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bits lose an answer that 16 bits find; reads are those of generated tokens after the first."""
    setting = retrieval.Setting("hops", 640, records=50, questions=4, key_tokens=4, value_tokens=4, family=25, hops=2)
    monkeypatch.setitem(retrieval.SETTINGS, "small", setting)
    first = setting.length - setting.questions * setting.question_length
    rows = both(embedded, ServedRetrieval(setting="small", prompts=1, seed=1), K2V2, first)
    packed, plain = rows["turboquant"], rows["16bit"]
    assert packed["accuracy"] < plain["accuracy"] and packed["questions"] == 4
    assert packed["difference"] == pytest.approx(packed["accuracy"] - plain["accuracy"])
    assert (packed["lost"] - packed["gained"]) / 4 == pytest.approx(-packed["difference"])
    begins = [first + 16 * question + place for question in range(4) for place in (6, 11)]
    assert setting.question_length == 16
    assert packed["packed_tokens_read_per_layer"] == sum(sum(range(begin, begin + 3)) for begin in begins)


def test_servers_may_come_one_after_another(tiny: LoadedModel, tmp_path: Path) -> None:
    """The rows of two runs into one file are those of one run with both servers."""
    task, out = ServedText(**TEXT), tmp_path / "out.json"
    for dtype, spec in (("auto", SIXTEEN), ("turboquant", K2V2)):
        with serving(FakeVllm(tiny, spec, 64, 64, dtype)) as url:
            served = served_by(tiny, url, chunk=64)
            results = Evaluation(served, {"task": task}, served.specs, out, earlier=True).run()
    rows = results["tasks"]["task"]["caches"]
    together = both(tiny, task, K2V2, 64, chunk=64)
    for name in ("16bit", "turboquant"):
        assert without_sources(rows[name]) == without_sources(together[name])
    assert json.loads(out.read_text())["tasks"] == results["tasks"]


def without_sources(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "sources"}


def test_without_a_reference_there_is_no_comparison(tiny: LoadedModel) -> None:
    with serving(FakeVllm(tiny, K2V2, 64, 64, "turboquant")) as url:
        served = served_by(tiny, url, chunk=64)
        row = Evaluation(served, {"text": ServedText(**TEXT)}, served.specs).run()["tasks"]["text"]["caches"][
            "turboquant"
        ]
    assert set(row) == {"nll", "perplexity", "scored_tokens", "prompts", "packed_tokens_read_per_layer", "sources"}


def test_a_failure_keeps_what_came_and_a_new_run_asks_for_the_rest(tiny: LoadedModel, tmp_path: Path) -> None:
    task, out = ServedGeneration(texts=4, prefix=100, new=4), tmp_path / "out.json"
    fake = FakeVllm(tiny, K2V2, 99, cache_dtype="turboquant", refuse={3: Refused(500, "EngineCore\n died")})
    with serving(fake) as url:
        served = served_by(tiny, url, concurrency=1)
        evaluation = Evaluation(served, {"task": task}, served.specs, out, earlier=True)
        with pytest.raises(ServerError, match=r"/v1/completions: HTTP 500: EngineCore died$"):
            evaluation.run()
        assert json.loads(out.read_text())["tasks"]["task"]["caches"]["turboquant"]["prompts"] == 2
        assert len(fake.requests) == 3
        done: list[str] = []
        again = Evaluation(served, {"task": task}, served.specs, out, earlier=True).run(done.append)
    assert again["tasks"]["task"]["caches"]["turboquant"]["prompts"] == 4
    assert len(fake.requests) == 5 and len(done) == 4


def test_requests_are_bounded_and_text_goes_one_by_one(tiny: LoadedModel) -> None:
    fake = FakeVllm(tiny, K2V2, 64, 64, "turboquant")
    with serving(fake) as url:
        served = served_by(tiny, url, chunk=64, concurrency=3)
        Evaluation(served, {"task": ServedGeneration(texts=9, prefix=100, new=4)}, served.specs).run()
        assert 1 < fake.most_at_once <= 3
        fake.most_at_once = 0
        Evaluation(served, {"task": ServedText(**TEXT | {"texts": 4})}, served.specs).run()
        assert fake.most_at_once == 1


def test_another_version_is_not_mixed_in(tiny: LoadedModel, tmp_path: Path) -> None:
    fake = FakeVllm(tiny, K2V2, 99, cache_dtype="turboquant")
    task = ServedGeneration(texts=1, prefix=100, new=4)
    with serving(fake) as url:
        served = served_by(tiny, url)
        Evaluation(served, {"task": task}, served.specs, tmp_path / "out.json").run()
        fake.version = "0.34.0"
        served = served_by(tiny, url)
        with pytest.raises(ValueError, match="vllm was '0.33.0', is '0.34.0'"):
            Evaluation(served, {"task": task}, served.specs, tmp_path / "out.json")


@pytest.mark.parametrize(
    "change, task, message",
    [
        ({}, ServedText(**TEXT | {"chunk": 32}), "chunk is what --server-chunk says, 64, got 32"),
        ({}, ServedText(**TEXT | {"prefix": 63}), "chunk must be at most prefix = 63"),
        (
            {"prefix_caching": True},
            ServedText(**TEXT),
            "has prefix caching on: start it with --no-enable-prefix-caching",
        ),
        ({"max_model_len": 215}, ServedText(**TEXT), "takes 216 tokens, more than the server's max_model_len of 215"),
        ({"max_model_len": 300}, ServedFrequentWords(length=299), "takes 301 tokens"),
        ({"max_model_len": 300}, ServedGeneration(prefix=299, new=2), "at most the model's context of 300, got 301"),
        ({"max_model_len": 1000}, ServedRetrieval("multikey-1k"), "more than the model's context of 1000"),
        ({}, ServedGeneration(new=1), "new must be at least 2"),
    ],
)
def test_what_can_not_be_measured_is_refused(tiny: LoadedModel, change: Any, task: Any, message: str) -> None:
    fake = replace(FakeVllm(tiny, K2V2, 64, 64, "turboquant"), **change)
    with serving(fake) as url:
        served = served_by(tiny, url, chunk=64)
        with pytest.raises(ValueError, match=message):
            Evaluation(served, {"task": task}, served.specs)
        with pytest.raises(ValueError, match="task text needs --server-chunk N"):
            Evaluation(replace(served, chunk=None), {"task": ServedText(**TEXT)}, served.specs)
    assert fake.requests == []


def test_two_servers_must_make_a_comparison(tiny: LoadedModel) -> None:
    packed, plain = (
        FakeVllm(tiny, K2V2, 64, cache_dtype="turboquant"),
        FakeVllm(tiny, SIXTEEN, 64, cache_dtype="bfloat16"),
    )
    with serving(packed) as url, serving(plain) as reference:
        for pair in ((url, url), (reference, reference), (reference, url)):
            with pytest.raises(ValueError, match="a packed cache and its reference one in 16 bits"):
                served_by(tiny, *pair)
        plain.version = "0.34.0"
        with pytest.raises(ValueError, match="one vLLM version"):
            served_by(tiny, url, reference)
        with pytest.raises(ValueError, match="concurrency must be at least 1, got 0"):
            served_by(tiny, url, concurrency=0)


def test_scored_runs_cover_what_is_scored(tiny: LoadedModel) -> None:
    from kvturbo.eval.served.retrieval import scored_runs

    sample = next(retrieval.samples("hops-4k", 1, np.tile(tiny.text, 2), tiny.retrieval_vocab))
    covered = np.zeros_like(sample.answer_positions)
    for begin, stop in scored_runs(sample):
        assert not covered[begin:stop].any()
        covered[begin:stop] = True
    assert (covered == sample.answer_positions).all()
