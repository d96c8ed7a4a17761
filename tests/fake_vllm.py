"""A server on 127.0.0.1 that speaks the part of vLLM 0.33's API that `kvturbo eval --server` uses, a transformers model behind it.

`tests/vllm/test_server_api.py` holds its answers against vLLM's own response models.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.scoring import Run, chunks, feed, start

KNOWN = {
    "model", "prompt", "max_tokens", "n", "stream", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "ignore_eos", "return_token_ids", "skip_special_tokens", "prompt_logprobs",
    "logprobs", "allowed_token_ids", "return_tokens_as_token_ids",
}  # fmt: skip


_ONE_PASS = threading.Lock()
"""Held by a forward pass: servers in one process may share a model, and each cache sets the model's attention for a while."""


class Refused(Exception):
    """An answer with an error: HTTP status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class FakeVllm:
    """A model behind a server.

    Attributes:
        loaded, spec: the model, and its cache under this server's `cache_dtype`.
        first, chunk: a prompt's first `first` tokens are read at once and raw, then `chunk` at a time; new tokens one by one.
        cache_dtype, prefix_caching: as its metrics say; cache_dtype None: no metrics.
        max_model_len, max_logprobs: as vLLM's options.
        refuse: request number -> how it is refused; requests are counted from 1.
        requests: bodies so far; most_at_once: of requests; keys: what came as authorization when it was asked what it is.
    """

    loaded: LoadedModel
    spec: CacheSpec
    first: int
    chunk: int = 1 << 20
    cache_dtype: str | None = "auto"
    prefix_caching: bool = False
    max_model_len: int = 8192
    max_logprobs: int = 20
    version: str = "0.33.0"
    model: str = "served/model"
    refuse: dict[int, Refused] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    keys: list[str | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._counting, self._now = threading.Lock(), 0

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """What `POST /v1/completions` gives."""
        with self._counting:
            self.requests.append(body)
            number, self._now = len(self.requests), self._now + 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            if number in self.refuse:
                raise self.refuse[number]
            self._check(body)
            with _ONE_PASS:
                return self._completion(body)
        finally:
            with self._counting:
                self._now -= 1

    def _check(self, body: dict[str, Any]) -> None:
        if unknown := body.keys() - KNOWN:
            raise Refused(400, f"unknown fields {sorted(unknown)}")
        if body["model"] != self.model:
            raise Refused(404, f"The model `{body['model']}` does not exist.")
        assert body["temperature"] == 0 and body["ignore_eos"] and body["n"] == 1 and not body["stream"]
        if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
            raise Refused(400, f"This model's maximum context length is {self.max_model_len} tokens.")
        wanted = body.get("prompt_logprobs") or 0
        if wanted > self.max_logprobs:
            text = f"Requested prompt logprobs of {wanted}, which is greater than max allowed: {self.max_logprobs}"
            raise Refused(400, text)

    @torch.inference_mode()
    def _completion(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = np.array(body["prompt"], dtype=np.int64)
        run, logits = self._read(ids)
        written, places = self._write(run, logits[-1], body["max_tokens"], body.get("allowed_token_ids"))
        logprobs = None if body.get("logprobs") is None else _logprobs(written, places, body["logprobs"])
        choice = {
            "index": 0, "text": self.loaded.tokenizer.decode(written), "logprobs": logprobs, "finish_reason": "length",
            "stop_reason": None, "token_ids": written, "prompt_token_ids": body["prompt"], "routed_experts": None,
            "weight_versions": None,
            "prompt_logprobs": self._prompt_logprobs(ids, logits, body.get("prompt_logprobs")),
        }  # fmt: skip
        tokens = {"prompt_tokens": len(ids), "completion_tokens": len(written), "total_tokens": len(ids) + len(written)}
        tokens |= dict.fromkeys(["prompt_tokens_details", "completion_tokens_details"])
        return {
            "id": "cmpl-1", "object": "text_completion", "created": 1, "model": self.model, "choices": [choice],
            "service_tier": None, "system_fingerprint": None, "usage": tokens,
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip

    def _read(self, ids: np.ndarray) -> tuple[Run, Tensor]:
        """A prompt [P] through the cache: what comes after it can be fed on, and the logits [P, V]."""
        first = min(self.first, len(ids))
        raw = self.loaded.model(torch.from_numpy(ids[:first])[None]).logits[0].float()
        (run,) = start(self.loaded, ids[:first], [self.spec])
        rest = ids[first:]
        return run, torch.cat([raw, *(feed(self.loaded, run, rest[a:b]) for a, b in chunks(len(rest), self.chunk))])

    def _write(self, run: Run, last: Tensor, count: int, allowed: list[int] | None) -> tuple[list[int], list[Tensor]]:
        written, places = [], [last]
        for i in range(count):
            written.append(int(last.argmax()) if allowed is None else allowed[int(last[allowed].argmax())])
            if i + 1 < count:
                last = feed(self.loaded, run, np.array(written[-1:]))[-1]
                places.append(last)
        return written, places

    def _prompt_logprobs(self, ids: np.ndarray, logits: Tensor, top: int | None) -> list[Any] | None:
        if top is None:
            return None
        places: list[Any] = [None]
        for token, row in zip(ids[1:].tolist(), logits[:-1].log_softmax(-1), strict=True):
            best = row.topk(top).indices.tolist()
            ranks = {token: int((row > row[token]).sum()) + 1} | {t: i + 1 for i, t in enumerate(best) if t != token}
            decoded = {t: self.loaded.tokenizer.decode([t]) for t in ranks}
            places.append({
                str(t): {"logprob": row[t].item(), "rank": rank, "decoded_token": decoded[t]} for t, rank in ranks.items()
            })  # fmt: skip
        return places

    def metrics(self) -> str:
        return (
            "# TYPE vllm:cache_config_info gauge\n"
            f'vllm:cache_config_info{{block_size="32",cache_dtype="{self.cache_dtype}",'
            f'enable_prefix_caching="{self.prefix_caching}",engine="0"}} 1.0\n'
        )


def _logprobs(written: list[int], places: list[Tensor], top: int) -> dict[str, Any]:
    """Log probabilities of generated tokens: the token that was written first, then the likeliest ones."""
    rows = [place.log_softmax(-1) for place in places]
    best = [dict.fromkeys([token, *row.topk(top).indices.tolist()]) for token, row in zip(written, rows, strict=True)]
    return {
        "text_offset": [0] * len(written),
        "tokens": [f"token_id:{token}" for token in written],
        "token_logprobs": [row[token].item() for token, row in zip(written, rows, strict=True)],
        "top_logprobs": [
            {f"token_id:{t}": row[t].item() for t in tokens} for tokens, row in zip(best, rows, strict=True)
        ],
    }


@contextmanager
def serving(fake: Any) -> Iterator[str]:
    """Runs a server; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.keys.append(self.headers["Authorization"])
            card = {"id": fake.model, "object": "model", "max_model_len": fake.max_model_len}
            answers = {
                "/version": {"version": fake.version} if fake.version else {},
                "/v1/models": {"object": "list", "data": [card]},
            }
            if self.path == "/metrics" and fake.cache_dtype is not None:
                self._send(200, fake.metrics().encode())
            elif self.path in answers:
                self._send(200, json.dumps(answers[self.path]).encode())
            else:
                self._send(404, b'{"detail":"Not Found"}')

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                assert self.path == "/v1/completions"
                self._send(200, json.dumps(fake.answer(body)).encode())
            except Refused as refused:
                error = {"message": refused.message, "type": "BadRequestError", "param": None, "code": refused.status}
                self._send(refused.status, json.dumps({"error": error}).encode())

        def _send(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
