"""What `kvturbo eval --server` sends and reads, held against vLLM's own request, response and metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import FakeVllm, serving
from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import load_model
from kvturbo.eval.server import (
    SIXTEEN_BIT_DTYPES,
    TOP_LOGPROBS,
    Server,
    after_forced_body,
    greedy_body,
    prompt_logprobs_body,
)
from tiny_model import save_tiny_model

pytestmark = pytest.mark.usefixtures("vllm_python")
ROOT = Path(__file__).parents[2]
IDS = [1, 20, 30, 40]
NAME = "served/model"
OF_A_MODEL = {
    "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05, "presence_penalty": 0.5,
    "frequency_penalty": 0.5, "skip_special_tokens": True,
}  # fmt: skip


def parameters(body: dict[str, Any]) -> Any:
    """What vLLM makes of a body, with a model whose generation_config.json says otherwise."""
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    request = CompletionRequest(**json.loads(json.dumps(body)))
    assert request.model_extra == {} and request.prompt == IDS and request.return_token_ids
    return request.to_sampling_params(request.max_tokens, OF_A_MODEL)


def test_requests_are_greedy_whatever_the_model_says() -> None:
    sampling = parameters(greedy_body("m", IDS, 5))
    assert (sampling.temperature, sampling.max_tokens, sampling.n, sampling.ignore_eos) == (0, 5, 1, True)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
    assert (sampling.top_p, sampling.min_p) == (1, 0) and sampling.top_k in (0, -1)
    assert not sampling.stop_token_ids and sampling.min_tokens == 0 and sampling.prompt_logprobs is None


def test_prompt_logprobs_never_come_from_the_prefix_cache() -> None:
    sampling = parameters(prompt_logprobs_body("m", IDS, 20))
    assert (sampling.prompt_logprobs, sampling.max_tokens, sampling.skip_reading_prefix_cache) == (20, 1, True)


def test_a_forced_token_is_the_only_one_allowed() -> None:
    sampling = parameters(after_forced_body("m", IDS, 7, 4))
    assert (sampling.allowed_token_ids, sampling.logprobs, sampling.max_tokens) == ([7], 4, 2)


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeVllm:
    loaded = load_model(str(save_tiny_model(tmp_path_factory.mktemp("tiny"))), device="cpu")
    return FakeVllm(loaded, CacheSpec("16bit"), 1 << 20)


@pytest.fixture
def url(fake: FakeVllm, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(fake) as address:
        yield address


@pytest.mark.parametrize(
    "body",
    [greedy_body(NAME, IDS, 3), prompt_logprobs_body(NAME, IDS, 4), after_forced_body(NAME, IDS, 7, 4)],
    ids=["greedy", "prompt_logprobs", "after_forced"],
)
def test_the_stand_in_answers_as_vllm_does(fake: FakeVllm, body: dict[str, Any]) -> None:
    """vLLM's own model reads its answer and would write the same JSON."""
    from vllm.entrypoints.openai.completion.protocol import CompletionResponse

    answer = json.loads(json.dumps(fake.answer(body)))
    response = CompletionResponse.model_validate(answer)
    assert json.loads(json.dumps(response.model_dump())) == answer


class TestParsing:
    """Answers made by vLLM's code from an engine's output."""

    def test_prompt_logprobs(self, fake: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.entrypoints.openai.completion.protocol import CompletionResponse, CompletionResponseChoice
        from vllm.entrypoints.serve.engine.protocol import UsageInfo
        from vllm.logprobs import Logprob

        places = [None, *({token: Logprob(-2.5, 3, "x"), 9: Logprob(-0.25, 1, "y")} for token in IDS[1:])]
        choice = CompletionResponseChoice(
            index=0, text="", prompt_logprobs=places, prompt_token_ids=IDS, token_ids=[5], finish_reason="length"
        )
        response = CompletionResponse(model=NAME, choices=[choice], usage=UsageInfo())
        monkeypatch.setattr(fake, "answer", lambda _: response.model_dump())
        found = Server.connect(url).prompt_logprobs(IDS, 1, 2)
        assert found == [(-2.5, {30: -2.5, 9: -0.25}), (-2.5, {40: -2.5, 9: -0.25})]

    def test_logprobs_of_generated_tokens(self, fake: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.entrypoints.openai.completion.protocol import (
            CompletionRequest,
            CompletionResponse,
            CompletionResponseChoice,
        )
        from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
        from vllm.entrypoints.serve.engine.protocol import UsageInfo
        from vllm.logprobs import Logprob

        request = CompletionRequest(**after_forced_body(NAME, IDS, 7, 2))
        serving_completion = object.__new__(OpenAIServingCompletion)
        rows = [{7: Logprob(-9.0, 50, "q"), 3: Logprob(-0.5, 1, "a"), 4: Logprob(-1.5, 2, "b")}] * 2
        logprobs = serving_completion._create_completion_logprobs(
            token_ids=[7, 7], top_logprobs=rows, num_output_top_logprobs=request.logprobs, tokenizer=None,
            return_as_token_id=request.return_tokens_as_token_ids,
        )  # fmt: skip
        choice = CompletionResponseChoice(
            index=0, text="", logprobs=logprobs, prompt_token_ids=IDS, token_ids=[7, 7], finish_reason="length"
        )
        response = CompletionResponse(model=NAME, choices=[choice], usage=UsageInfo())
        monkeypatch.setattr(fake, "answer", lambda _: response.model_dump())
        assert Server.connect(url).after_forced(IDS, 7, 2) == [3, 4]

    def test_metrics_say_what_the_cache_is(self, fake: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The gauge as vLLM's logger sets it, written by the client library that vLLM uses."""
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
        from vllm.config import CacheConfig

        for dtype, caching in (("turboquant", True), ("auto", False)):
            config = CacheConfig(cache_dtype=dtype, enable_prefix_caching=caching)
            labels = config.metrics_info() | {"engine": "0"}
            registry = CollectorRegistry()
            name = "vllm:cache_config_info"
            Gauge(name, "cache", labelnames=labels.keys(), registry=registry).labels(**labels).set(1)
            monkeypatch.setattr(fake, "metrics", lambda registry=registry: generate_latest(registry).decode())
            server = Server.connect(url)
            assert (server.cache_dtype, server.prefix_caching, server.cache_dtype_from) == (dtype, caching, "/metrics")

    def test_model_cards_and_errors(self) -> None:
        from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, ModelCard

        assert {"id", "max_model_len"} <= ModelCard.model_fields.keys()
        error = ErrorResponse(error=ErrorInfo(message="no", type="BadRequestError", code=400)).model_dump()
        assert error["error"]["message"] == "no"


def test_servers_can_be_started_as_the_documents_say() -> None:
    """The options of docs/vllm.md, read by vLLM's own parser."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    text = (ROOT / "docs" / "vllm.md").read_text()
    commands = re.findall(r"^vllm serve (\S+) (.*--max-num-batched-tokens.*?)(?: &)?$", text, re.MULTILINE)
    assert len(commands) == 2
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    for model, options in commands:
        engine_options = re.sub(r"--port \d+ ?", "", options).split()
        arguments = parser.parse_args(["--model", model, *engine_options])
        assert arguments.enable_prefix_caching is False and arguments.logprobs_mode == "raw_logprobs"
        assert arguments.max_num_batched_tokens == arguments.max_num_seqs == 256
        assert arguments.max_logprobs == TOP_LOGPROBS


def test_the_16_bit_dtypes_are_vllms() -> None:
    from typing import get_args

    from vllm.config.cache import CacheDType

    assert set(SIXTEEN_BIT_DTYPES) <= set(get_args(CacheDType))


def test_the_tokenizers_folder_is_all_that_is_loaded(tmp_path: Path) -> None:
    from kvturbo.eval.served_model import load_served

    folder = save_tiny_model(tmp_path)
    (folder / "model.safetensors").unlink()
    served = load_served(str(folder), [], chunk=None, top=1, concurrency=1)
    assert served.retrieval_vocab.size == 266 and len(served.text) > 100
