"""Perplexity of a text and a bound of the divergence, from servers' log probabilities of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kvturbo.eval.kl_bound import kl_lower_bound
from kvturbo.eval.metrics.kl import quantiles
from kvturbo.eval.registry import METRICS, SERVED_TASKS, Record
from kvturbo.eval.served_model import ServedModel, ServerSpec
from kvturbo.eval.tasks.text import TextTask

_DIGITS = 6  # of log probabilities that are kept: finer than what fp32 gives


@SERVED_TASKS.register("text")
@dataclass(frozen=True)
class ServedText(TextTask):
    """Perplexity on held-out text; with a 16-bit server's, agreement and a lower bound of the KL divergence to it.

    A server reads a prompt in chunks. A token sees its own chunk as it is and only what lies before it as the cache gives it back,
    so a prompt that is read at once measures nothing of the cache. The server must be started with `--max-num-batched-tokens N`
    (so `--max-num-seqs` at most N), N well below the prefix, and `--no-enable-prefix-caching`, and have no other users meanwhile;
    prompts are sent one after another. N is stated by the user (`--server-chunk`), since a server does not tell it, and is the
    task's `chunk`. Chunks begin at multiples of N from the start of a prompt, not at the end of the prefix.

    The API gives the likeliest tokens of each place, not a distribution, so the divergence is bounded from below: `kl_bound`.
    """

    alone = True

    def check_served(self, served: ServedModel) -> None:
        if served.chunk is None:
            raise ValueError(
                "task text needs --server-chunk N, the --max-num-batched-tokens that the server was started with: "
                "a prompt that is read at once reads nothing packed"
            )
        if self.chunk != served.chunk:
            raise ValueError(f"chunk is what --server-chunk says, {served.chunk}, got {self.chunk}")
        if self.chunk > self.prefix:
            raise ValueError(
                f"chunk must be at most prefix = {self.prefix}, or the first scored tokens read nothing packed, "
                f"got {self.chunk}"
            )
        for server in served.servers:
            if server.prefix_caching:
                raise ValueError(f"{server.url} has prefix caching on: start it with --no-enable-prefix-caching")
        served.check_length(self.prefix + self.scored + 2, "prefix + scored with a target and a generated token")

    def ask(self, served: ServedModel, spec: ServerSpec, index: int) -> Record:
        ids = self._passage(served, index).tolist()
        places = spec.server.prompt_logprobs(ids, served.top, self.prefix + 1)
        top = [{str(token): round(value, _DIGITS) for token, value in likely.items()} for _, likely in places]
        figures = {"nll": [-own for own, _ in places], "top": top, "asked": served.top}
        assumes = f"prompts one by one, --max-num-batched-tokens {self.chunk} --no-enable-prefix-caching"
        return spec.record(self._starts(), figures, assumes)

    def summarise(self, records: list[Record]) -> dict[str, Any]:
        nll = [value for record in records for value in record["nll"]]
        return METRICS.get("nll").summarise(torch.tensor(nll, dtype=torch.float64)) | {"scored_tokens": len(nll)}

    def compare(self, pairs: list[tuple[Record, Record]]) -> dict[str, Any]:
        places = [place for pair in pairs for place in zip(*(record["top"] for record in pair), strict=True)]
        bounds = torch.tensor([kl_lower_bound(*place) for place in places], dtype=torch.float64)
        figures = {name.replace("kl_", "kl_lower_bound_"): value for name, value in quantiles(bounds).items()}
        same = [max(reference, key=reference.__getitem__) == max(top, key=top.__getitem__) for reference, top in places]
        asked = min(record["asked"] for pair in pairs for record in pair)
        return figures | {"same_top1": sum(same) / len(same), "compared_tokens": len(places), "top_logprobs": asked}

    def _starts(self) -> list[int]:
        """Where chunks begin that hold places which predict a scored token."""
        first = self.prefix // self.chunk * self.chunk
        return list(range(first, self.prefix + self.scored, self.chunk))
