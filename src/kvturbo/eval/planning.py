"""Plans within a budget of bytes: how much each layer suffers from each choice is measured, then the best sum is taken.

A layer's *loss* with a choice (format and 16-bit windows) is the mean KL divergence to the 16-bit cache when this layer alone
is packed that way. Losses of layers are taken to add up, so the plan with the least sum within the budget is a knapsack with
one choice per layer. It is then measured as a whole, next to the same choice for all layers, and the best of them is taken:
the sum is only an estimate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.metrics.kl import kl_divergence
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.retrieval import Sample, Setting, make_sample
from kvturbo.eval.scoring import Run, chunks, feed
from kvturbo.guard.merit import LIMIT, candidates
from kvturbo.guard.plan import SIXTEEN_BIT, LayerPlan, Plan, plan_path, read_plan
from kvturbo.hf import TurboCache
from kvturbo.hf.sizes import cache_bytes, layer_bytes, windows_of_layer

CALIBRATION_SEED = 1_000_003
"""Retrieval prompts of a calibration are drawn with it, apart from those of every evaluation."""
BUCKETS = 50_000
"""Parts that the budget is divided into; a layer's bytes are rounded up to whole ones."""


@dataclass(frozen=True)
class Choice:
    """What a layer may get: a format, and tokens that stay in 16 bits, first and last."""

    format: str
    sink: int = 0
    recent: int = 0

    def of(self, layer: LayerPlan) -> LayerPlan:
        """The layer with this choice."""
        return replace(layer, format=self.format, sink=self.sink, recent=self.recent)

    def __str__(self) -> str:
        return self.format + (f", windows {self.sink} + {self.recent}" if self.sink + self.recent else "")


CHOICES = (
    Choice(SIXTEEN_BIT),
    Choice("k8v4"),
    *(Choice(name) for name in ("k4v4", "k4v3", "k4v2")),
    *(Choice(name, 4, recent) for name in ("k4v2", "k3v3", "k3v2", "k2v2") for recent in (32, 128)),
)
"""16-bit windows are for keys below 4 bits, and on trial for 2-bit values."""


@dataclass(frozen=True)
class PlanSpec(CacheSpec):
    """A cache by a plan, to be measured as one by a format.

    Attributes:
        plan: of every full-attention layer; `recent` and `sink` count instead of its windows if they are given.
    """

    plan: Plan = field(default_factory=lambda: Plan({}), compare=False)

    @classmethod
    def read(cls, path: Path, recent: int | None = None, sink: int | None = None) -> PlanSpec:
        """The cache of a plan file, or of the one in a folder, named by the file and the first digits of its sha256.

        Raises:
            FileNotFoundError, ValueError: as `read_plan`.
        """
        path = plan_path(path)
        plan = read_plan(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        return cls(f"{path.name}@{digest}", recent, sink, plan)

    def new(self, loaded: LoadedModel) -> TurboCache:
        return TurboCache(loaded.model.config, plan=self.plan, recent=self.recent, sink=self.sink)

    def from_raw(self, loaded: LoadedModel, raw: Any) -> TurboCache:
        return TurboCache.from_cache(loaded.model.config, raw, plan=self.plan, recent=self.recent, sink=self.sink)

    def packed_tokens(self, config: Any, tokens: int) -> int:
        given = {name: value for name in ("recent", "sink") if (value := getattr(self, name)) is not None}
        packed = (replace(layer, **given) for layer in self.plan.layers.values() if layer.format != SIXTEEN_BIT)
        return sum(max(0, tokens - sum(windows_of_layer(layer))) for layer in packed)


class Scored(Protocol):
    """Text or questions on which plans are compared."""

    def loss(self, plan: Plan) -> float:
        """Mean KL divergence in nats per token to a cache that is not packed at all."""


class Passage:
    """Token ids that are prefilled once, and those that every cache is scored on.

    Args:
        loaded: the model.
        prefix, scored: token ids [P] and [S].
        chunk: tokens per forward pass of the scored part.
    """

    def __init__(self, loaded: LoadedModel, prefix: np.ndarray, scored: np.ndarray, chunk: int) -> None:
        self.loaded, self.scored, self.chunk = loaded, scored, chunk
        self.raw = _raw(loaded, prefix)
        self.tokens = len(prefix)
        whole = TurboCache.from_cache(loaded.model.config, self.raw, SIXTEEN_BIT)  # the model's own dtype, as in a plan
        self.reference = torch.cat(list(self._logits(Run(CacheSpec(SIXTEEN_BIT), whole, self.tokens, whole.nbytes()))))

    def loss(self, plan: Plan) -> float:
        """Mean KL divergence in nats per token to a cache that is not packed at all."""
        spec = PlanSpec("plan", plan=plan)
        cache = spec.from_raw(self.loaded, self.raw)
        run = Run(spec, cache, self.tokens, cache.nbytes())
        pieces = zip(self.reference.split(self.chunk), self._logits(run), strict=True)
        return float(torch.cat([kl_divergence(wanted, logits) for wanted, logits in pieces]).mean())

    def _logits(self, run: Run) -> Iterator[Tensor]:
        for begin, stop in chunks(len(self.scored), self.chunk):
            yield feed(self.loaded, run, self.scored[begin:stop])


@torch.inference_mode()
def _raw(loaded: LoadedModel, ids: np.ndarray) -> DynamicCache:
    raw = DynamicCache(config=loaded.model.config)
    row = torch.from_numpy(np.ascontiguousarray(ids))[None].to(loaded.device)
    loaded.model(row, past_key_values=raw, use_cache=True, logits_to_keep=1)
    return raw


def text_passages(loaded: LoadedModel, count: int, prefix: int, scored: int, chunk: int) -> Iterator[Passage]:
    """Passages evenly spaced over the model's text.

    Raises:
        ValueError: the text or the model's context is too short.
    """
    length = prefix + scored
    if len(loaded.text) < length or (loaded.context is not None and loaded.context < length):
        raise ValueError(
            f"text and context must have at least prefix + scored = {length} tokens, got {len(loaded.text)} and {loaded.context}"
        )
    for i in range(count):
        begin = i * (len(loaded.text) - length) // max(1, count - 1)
        ids = loaded.text[begin : begin + length].copy()
        if loaded.tokenizer.bos_token_id is not None:
            ids[0] = loaded.tokenizer.bos_token_id
        yield Passage(loaded, ids[:prefix], ids[prefix:], chunk)


def retrieval_passages(loaded: LoadedModel, setting: Setting, count: int, chunk: int) -> Iterator[Passage]:
    """Retrieval prompts: the context is packed, and the questions with their answers are scored.

    Args:
        loaded: a model with `retrieval.json`.
        setting: which.
        count, chunk: prompts, and tokens per forward pass.
    """
    for sample in calibration_samples(loaded, setting, count):
        yield Passage(loaded, sample.context, sample.questions, chunk)


def calibration_samples(loaded: LoadedModel, setting: Setting, count: int) -> Iterator[Sample]:
    """Retrieval samples that no evaluation draws."""
    for i in range(count):
        rng = np.random.default_rng([CALIBRATION_SEED, i])
        yield make_sample(setting, loaded.text, loaded.retrieval_vocab, rng)


def choices_of(layer: LayerPlan, choices: Sequence[Choice] = CHOICES, limit: float = LIMIT) -> list[Choice]:
    """Choices for a layer: with outlier channels as well where its keys have an excess."""
    found = list(choices)
    if layer.key_excess is not None and layer.key_excess > limit:
        extra = [name for name in candidates("k4v4", layer.head_dim) if "-o" in name]
        found += [Choice(name) for name in extra]
    return found


def measure_losses(
    passages: Sequence[Scored],
    plan: Plan,
    choices: Mapping[int, Sequence[Choice]],
    progress: Callable[[], None] = lambda: None,
) -> dict[int, dict[Choice, float]]:
    """Every layer's loss with each of its choices: mean over passages, all other layers in 16 bits.

    Args:
        passages: what is scored.
        plan: shapes and outlier channels of the layers.
        choices: by layer index.
        progress: called after every measurement.
    """
    whole = {i: Choice(SIXTEEN_BIT).of(layer) for i, layer in plan.layers.items()}
    losses: dict[int, dict[Choice, float]] = {}
    for i, own in choices.items():
        losses[i] = {}
        for choice in own:
            if choice.format == SIXTEEN_BIT:
                losses[i][choice] = 0.0
                continue
            losses[i][choice] = mean_loss(passages, Plan(whole | {i: choice.of(plan.layers[i])}))
            progress()
    return losses


def mean_loss(passages: Sequence[Scored], plan: Plan) -> float:
    """A plan's loss, mean over passages."""
    return sum(passage.loss(plan) for passage in passages) / len(passages)


def best_within(plan: Plan, losses: Mapping[int, Mapping[Choice, float]], budget: int, tokens: int) -> Plan | None:
    """The plan with the least sum of losses whose cache of `tokens` tokens takes at most `budget` bytes; None: there is none.

    Args:
        plan: shapes and outlier channels of the layers.
        losses: by layer index and choice.
        budget: in bytes.
        tokens: in the cache.
    """
    unit = max(1, budget // BUCKETS)
    size = budget // unit + 1
    least = np.zeros(size)
    taken: list[tuple[int, list[Choice], np.ndarray]] = []
    for i, own in losses.items():
        options = list(own)
        sums = np.full((len(options), size), np.inf)
        for row, choice in enumerate(options):
            cost = -(-layer_bytes(choice.of(plan.layers[i]), tokens) // unit)
            if cost < size:
                sums[row, cost:] = least[: size - cost] + own[choice]
        taken.append((i, options, sums.argmin(0)))
        least = sums.min(0)
    if not np.isfinite(least[-1]):
        return None
    chosen, place = {}, size - 1
    for i, options, rows in reversed(taken):
        choice = options[int(rows[place])]
        chosen[i] = choice.of(plan.layers[i])
        place -= -(-layer_bytes(chosen[i], tokens) // unit)
    return Plan(dict(sorted(chosen.items())), plan.source)


def uniform_plans(plan: Plan, losses: Mapping[int, Mapping[Choice, float]]) -> dict[str, Plan]:
    """The same choice for all layers, for every choice that all layers have, by name."""
    shared = [choice for choice in next(iter(losses.values())) if all(choice in own for own in losses.values())]
    return {
        str(choice): Plan({i: choice.of(layer) for i, layer in plan.layers.items()}, plan.source) for choice in shared
    }


def plans_within(plan: Plan, losses: Mapping[int, Mapping[Choice, float]], budget: int, tokens: int) -> dict[str, Plan]:
    """What to measure as a whole, by name: the same choice for all layers, and the best sum by layer.

    Args:
        plan, losses, budget, tokens: as for `best_within`.
    """
    uniform = uniform_plans(plan, losses)
    found = {name: other for name, other in uniform.items() if cache_bytes(other, tokens) <= budget}
    by_layer = best_within(plan, losses, budget, tokens)
    return found if by_layer is None else found | {"by layer": by_layer}
