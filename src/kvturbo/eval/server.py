"""A vLLM server's completions API: token ids in, token ids and log probabilities out. The standard library does the talking."""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

SIXTEEN_BIT_DTYPES = ("auto", "bfloat16", "float16")
TIMEOUT = 600.0
"""Of a request, in seconds."""
TOP_LOGPROBS = 20
"""vLLM's own limit, unless --max-logprobs raises it."""
CONCURRENCY = 16
"""Requests that a server has to answer at once."""
KEY_VARIABLE = "VLLM_API_KEY"
_MOST_SHOWN = 500
_NONE = -9999.0  # what vLLM writes for the logarithm of zero, which JSON lacks

# Spelled out, since a server takes what is missing from the model's generation_config.json.
_GREEDY: dict[str, Any] = {
    "n": 1, "stream": False, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "return_token_ids": True,
    "skip_special_tokens": False,
}  # fmt: skip


class ServerError(RuntimeError):
    """A server can't be reached, refuses a request, or answers something else than was asked for; one line."""


def greedy_body(model: str, ids: list[int], count: int) -> dict[str, Any]:
    """A request for `count` greedy tokens after token ids."""
    return _GREEDY | {"model": model, "prompt": ids, "max_tokens": count}


def prompt_logprobs_body(model: str, ids: list[int], top: int) -> dict[str, Any]:
    """A request for log probabilities of a prompt's own tokens and of the `top` likeliest at each place."""
    return greedy_body(model, ids, 1) | {"prompt_logprobs": top}


def after_forced_body(model: str, ids: list[int], forced: int, top: int) -> dict[str, Any]:
    """A request for the `top` likeliest tokens after a token that follows the prompt and is generated, so decoded, not read."""
    wanted = {"allowed_token_ids": [forced], "logprobs": top, "return_tokens_as_token_ids": True}
    return greedy_body(model, ids, 2) | wanted


@dataclass(frozen=True)
class Server:
    """A vLLM server and what it says of itself.

    Attributes:
        url: without a path, such as http://localhost:8000.
        model: the served model's name.
        version: vLLM's.
        max_model_len: most tokens of a prompt and what is generated, None if it does not say.
        cache_dtype: its `--kv-cache-dtype`; cache_dtype_from: "/metrics" or "stated".
        prefix_caching: whether it is on; None if the server does not say.
        timeout: of a request, in seconds.
    """

    url: str
    model: str
    version: str
    max_model_len: int | None
    cache_dtype: str
    cache_dtype_from: str
    prefix_caching: bool | None
    timeout: float = TIMEOUT

    @classmethod
    def connect(
        cls, url: str, model: str | None = None, cache_dtype: str | None = None, timeout: float = TIMEOUT
    ) -> Server:
        """Asks a server what it is.

        Args:
            url: http or https; a trailing /v1 is taken off.
            model: a served model's name; None: the first.
            cache_dtype: what its `--kv-cache-dtype` is stated to be, needed only where /metrics does not say.
            timeout: of every request, in seconds.

        Raises:
            ValueError: the URL is none, the server serves no such model, or its cache dtype is unknown or another than stated.
            ServerError: it can't be reached or does not answer as vLLM does.
        """
        url = _checked_url(url)
        version = _field(url, "/version", _json(url, "/version", timeout=timeout), "version")
        card = _chosen(url, _field(url, "/v1/models", _json(url, "/v1/models", timeout=timeout), "data"), model)
        told, prefix_caching = _cache_facts(url, timeout)
        dtype = told or cache_dtype
        if dtype is None:
            raise ValueError(f"{url}/metrics does not say which --kv-cache-dtype the server has: state it")
        if cache_dtype not in (None, dtype) and not {cache_dtype, dtype} <= set(SIXTEEN_BIT_DTYPES):
            raise ValueError(f"{url} has --kv-cache-dtype {dtype}, not {cache_dtype}, as its /metrics says")
        source = "stated" if told is None else "/metrics"
        return cls(url, card["id"], version, card.get("max_model_len"), dtype, source, prefix_caching, timeout)

    @property
    def packed(self) -> bool:
        """Whether keys and values are in fewer than 16 bits."""
        return self.cache_dtype not in SIXTEEN_BIT_DTYPES

    def facts(self) -> dict[str, Any]:
        """What a record says of where it is from."""
        return {
            "server": self.url,
            "model": self.model,
            "vllm": self.version,
            "kv_cache_dtype": self.cache_dtype,
            "kv_cache_dtype_from": self.cache_dtype_from,
        }

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Greedy continuation of a prompt: exactly `count` token ids, an end-of-text token among them or not.

        Raises:
            ServerError: as the class says.
        """
        return self._written(self._complete(greedy_body(self.model, ids, count)), ids, count)

    def prompt_logprobs(self, ids: list[int], top: int, begin: int) -> list[tuple[float, dict[int, float]]]:
        """How likely a prompt's tokens are.

        Args:
            ids: the prompt.
            top: so many likeliest tokens, at most the server's `--max-logprobs`.
            begin: the first token that is looked at; at least 1.

        Returns:
            For every token from `begin` on its own log probability, and those of the likeliest by token id, in nats.

        Raises:
            ServerError: as the class says.
        """
        choice = self._complete(prompt_logprobs_body(self.model, ids, top))
        self._written(choice, ids, 1)
        places = choice.get("prompt_logprobs")
        if not isinstance(places, list) or len(places) != len(ids):
            raise ServerError(f"{self.url} gave no prompt_logprobs for the {len(ids)} tokens of a prompt")
        found = []
        for token, place in zip(ids[begin:], places[begin:], strict=True):
            try:
                likely = {int(key): float(entry["logprob"]) for key, entry in place.items()}
                found.append((likely[token], likely))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ServerError(f"{self.url} gave prompt_logprobs without those of token {token}") from error
        return found

    def after_forced(self, ids: list[int], forced: int, top: int) -> list[int]:
        """The `top` likeliest tokens after a prompt and one more token, which is decoded: it reads the prompt from the cache.

        Raises:
            ServerError: as the class says.
        """
        choice = self._complete(after_forced_body(self.model, ids, forced, top))
        self._written(choice, ids, 2)
        try:
            likely = choice["logprobs"]["top_logprobs"][1]
            found = {int(key.removeprefix("token_id:")): float(value) for key, value in likely.items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(f"{self.url} gave no logprobs of a generated token by token id") from error
        best = sorted(found, key=lambda token: -found[token])[:top]
        if len(best) < top or found[best[-1]] <= _NONE:
            raise ServerError(f"{self.url} must give {top} logprobs from before sampling: --logprobs-mode raw_logprobs")
        return best

    def _complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        choices = _field(self.url, "/v1/completions", _json(self.url, "/v1/completions", body, self.timeout), "choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise ServerError(f"{self.url}/v1/completions gave no single choice")
        return choices[0]

    def _written(self, choice: dict[str, Any], ids: list[int], count: int) -> list[int]:
        if choice.get("prompt_token_ids") != ids:
            raise ServerError(f"{self.url} did not read the {len(ids)} token ids of a prompt as they are")
        written = choice.get("token_ids")
        if not isinstance(written, list) or len(written) != count:
            got = len(written) if isinstance(written, list) else None
            raise ServerError(
                f"{self.url} wrote {got} tokens instead of {count} (finish_reason {choice.get('finish_reason')!r})"
            )
        return written


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise ValueError(f"a server must be a URL such as http://localhost:8000, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def _chosen(url: str, cards: Any, model: str | None) -> dict[str, Any]:
    names = [card["id"] for card in cards if isinstance(card, dict) and "id" in card] if isinstance(cards, list) else []
    if not names:
        raise ServerError(f"{url}/v1/models lists no model")
    if model not in (None, *names):
        raise ValueError(f"{url} serves no model {model!r}; it serves: {', '.join(names)}")
    return next(card for card in cards if card["id"] == (model or names[0]))


def _cache_facts(url: str, timeout: float) -> tuple[str | None, bool | None]:
    """The cache dtype and whether prefix caching is on, as a server's metrics tell; None for what they don't."""
    try:
        text = _request(url, "/metrics", None, timeout).decode(errors="replace")
    except _HttpError:  # a server may be started without metrics
        return None, None
    line = re.search(r"^vllm:cache_config_info\{(.*)\}", text, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="([^"]*)"', line[1])) if line else {}
    caching = {"True": True, "False": False}.get(labels.get("enable_prefix_caching", ""))
    return labels.get("cache_dtype"), caching


class _HttpError(ServerError):
    """A server answered with an error."""


def _json(url: str, path: str, body: Mapping[str, Any] | None = None, timeout: float = TIMEOUT) -> Any:
    answer = _request(url, path, body, timeout)
    try:
        return json.loads(answer)
    except ValueError as error:
        raise ServerError(f"{url}{path} answered no JSON: {_short(answer)}") from error


def _field(url: str, path: str, answer: Any, name: str) -> Any:
    if not isinstance(answer, dict) or name not in answer:
        raise ServerError(f"{url}{path} has no {name!r}: is it a vLLM server?")
    return answer[name]


def _request(url: str, path: str, body: Mapping[str, Any] | None, timeout: float) -> bytes:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers), timeout=timeout) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        raise _HttpError(f"{url}{path}: HTTP {error.code}: {_message(error)}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise ServerError(f"{url}{path}: no answer within {timeout:g} s") from error
        raise ServerError(f"{url} can't be reached: {reason or type(reason).__name__}") from error


def _message(error: urllib.error.HTTPError) -> str:
    """The message of vLLM's error body, else the body's beginning."""
    try:
        body = error.read()
        return _short(json.loads(body)["error"]["message"].encode())
    except (ValueError, KeyError, TypeError, AttributeError):
        return _short(body) or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _short(text: bytes) -> str:
    return " ".join(text.decode(errors="replace").split())[:_MOST_SHOWN]
