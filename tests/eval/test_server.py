"""The client of vLLM's API: what a server says of itself, and failures that end in one line."""

from __future__ import annotations

import http.client
import io
import socket
import urllib.error
from dataclasses import replace
from typing import Any

import pytest

from fake_vllm import FakeVllm, serving
from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.server import Server, ServerError, _message, greedy_body

K2V2 = CacheSpec("k2v2", recent=0, sink=0)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_cache_dtypes_are_told_or_stated(tiny: LoadedModel) -> None:
    fake = FakeVllm(tiny, K2V2, 64, cache_dtype=None)
    with serving(fake) as url:
        with pytest.raises(ValueError, match="/metrics does not say which --kv-cache-dtype"):
            Server.connect(url)
        stated = Server.connect(url + "/v1/", cache_dtype="kvturbo_k2v2")
        assert (stated.url, stated.cache_dtype, stated.cache_dtype_from) == (url, "kvturbo_k2v2", "stated")
        fake.cache_dtype = "turboquant"
        assert Server.connect(url).facts()["kv_cache_dtype_from"] == "/metrics"
        with pytest.raises(ValueError, match="has --kv-cache-dtype turboquant, not auto"):
            Server.connect(url, cache_dtype="auto")


def test_failures_are_one_line(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(tiny, K2V2, 64, 64, "turboquant", max_logprobs=5)
    ids = tiny.text[:80].tolist()
    with serving(fake) as url:
        server = Server.connect(url)
        with pytest.raises(ValueError, match="serves no model 'other'; it serves: served/model"):
            Server.connect(url, "other")
        with pytest.raises(ServerError, match="HTTP 404: The model `other` does not exist"):
            replace(server, model="other").generate(ids, 2)
        with pytest.raises(ServerError, match="HTTP 400: Requested prompt logprobs of 6, .* max allowed: 5"):
            server.prompt_logprobs(ids, 6, 1)
        fake.max_model_len = 81
        with pytest.raises(ServerError, match="HTTP 400: This model's maximum context length is 81"):
            server.generate(ids, 2)
        answer = fake.answer(greedy_body(server.model, ids, 1))
        for change, message in (
            ({"prompt_logprobs": None}, "gave no prompt_logprobs for the 80 tokens"),
            ({"token_ids": []}, "wrote 0 tokens instead of 1"),
            ({"prompt_token_ids": None}, "did not read the 80 token ids"),
        ):
            changed = {**answer, "choices": [answer["choices"][0] | change]}
            monkeypatch.setattr(fake, "answer", lambda _, changed=changed: changed)
            with pytest.raises(ServerError, match=message):
                server.prompt_logprobs(ids, 5, 1)
    with pytest.raises(ServerError, match="can't be reached: .*refused"):
        server.generate(ids, 2)
    with pytest.raises(ValueError, match="a URL such as http://localhost:8000, got 'localhost:8000'"):
        Server.connect("localhost:8000")


def test_a_server_that_does_not_answer_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"/version: no answer within 0\.2 s"):
            Server.connect(url, timeout=0.2)


def test_logprobs_after_sampling_are_refused(tiny: LoadedModel) -> None:
    """With processed logprobs only the one allowed token has any."""
    fake = FakeVllm(tiny, K2V2, 64, cache_dtype="turboquant")
    original = fake.answer

    def processed(body: dict[str, Any]) -> dict[str, Any]:
        answer = original(body)
        for place in answer["choices"][0]["logprobs"]["top_logprobs"]:
            place.update({key: -9999.0 for key in place if key != f"token_id:{body['allowed_token_ids'][0]}"})
        return answer

    fake.answer = processed  # type: ignore[method-assign]
    with serving(fake) as url, pytest.raises(ServerError, match="--logprobs-mode raw_logprobs"):
        Server.connect(url).after_forced(tiny.text[:80].tolist(), tiny.retrieval_vocab.copy, 3)


@pytest.mark.parametrize(
    "body, message",
    [
        (b'{"error": {"message": "too\\n long", "code": 400}}', "too long"),
        (b'{"error": "Unauthorized"}', '{"error": "Unauthorized"}'),
        (b"<html>\n Bad gateway</html>", "<html> Bad gateway</html>"),
        (b"", "Some Reason"),
        (b"x" * 9999, "x" * 500),
    ],
)
def test_the_message_is_found_in_the_body(body: bytes, message: str) -> None:
    error = urllib.error.HTTPError("http://h", 502, "Some Reason", http.client.HTTPMessage(), io.BytesIO(body))
    assert _message(error) == message


def test_another_kind_of_server_is_recognised(tiny: LoadedModel) -> None:
    fake = FakeVllm(tiny, K2V2, 64, version="")
    with serving(fake) as url, pytest.raises(ServerError, match="/version has no 'version': is it a vLLM server"):
        Server.connect(url)


def test_a_key_in_the_environment_is_sent(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVllm(tiny, K2V2, 64)
    with serving(fake) as url:
        Server.connect(url)
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        Server.connect(url)
    assert fake.keys == [None] * 3 + ["Bearer secret"] * 3
