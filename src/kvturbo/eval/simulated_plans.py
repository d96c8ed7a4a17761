"""Plans compared through codecs in place of caches: many rows in one pass, on any device, with the losses of `planning`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvturbo.eval.codec import Codec, plan_codec
from kvturbo.eval.measure import check_reads, layers_of, packed_tokens
from kvturbo.eval.metrics.kl import kl_divergence
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.planning import (
    Choice,
    Scored,
    calibration_samples,
    choices_of,
    mean_loss,
    measure_losses,
    plans_within,
)
from kvturbo.eval.retrieval import Setting
from kvturbo.eval.simulation import Simulation, run
from kvturbo.guard.plan import Plan
from kvturbo.hf import sizes


class SimulatedRows:
    """Rows that a model reads in one pass.

    Args:
        model: a causal language model.
        ids: [rows, tokens] int64.
        make: what reads them through a codec; with None, as 16 bits.
        start: tokens before it are not scored.
    """

    def __init__(self, model: Any, ids: Tensor, make: Callable[[Codec | None], Simulation], start: int = 0) -> None:
        self.model, self.ids, self.make, self.start = model, ids, make, start
        self.reference = run(model, ids, make(None), start)

    def loss(self, plan: Plan) -> float:
        """Mean KL divergence in nats per token to the 16-bit cache.

        Raises:
            PackedReadsError: the pass read another number of packed tokens than its chunks ask for.
        """
        codec = plan_codec(plan)
        simulation = self.make(codec)
        logits = run(self.model, self.ids, simulation, self.start)
        offset = 0 if simulation.prefix is None else next(iter(simulation.prefix.values()))[0].shape[2]
        starts = [offset + begin for begin, _ in simulation.bounds(self.ids.shape[1])]
        expected = sum(packed_tokens(codec, start, layers_of(self.model)) for start in starts)
        check_reads(simulation, len(self.ids) * expected)
        return float(kl_divergence(self.reference, logits).mean())


def text_rows(model: Any, ids: Tensor, prefix: int, chunk: int) -> SimulatedRows:
    """Text [rows, tokens] after a prefix that is not scored, in chunks."""
    return SimulatedRows(model, ids, lambda codec: Simulation(codec, first=prefix, chunk=chunk), prefix)


def question_rows(loaded: LoadedModel, setting: Setting, count: int) -> SimulatedRows:
    """Questions about contexts that are read once with raw keys and values."""
    drawn = list(calibration_samples(loaded, setting, count))
    contexts, questions = (
        torch.from_numpy(np.stack(arrays)).to(loaded.device)
        for arrays in ([sample.context for sample in drawn], [sample.questions for sample in drawn])
    )
    read = Simulation(keep=True)
    run(loaded.model, contexts, read, start=contexts.shape[1] - 1)
    return SimulatedRows(loaded.model, questions, lambda codec: Simulation(codec, prefix=read.kept))


@dataclass(frozen=True)
class PlanSearch:
    """Plans as `kvturbo plan` looks for them; what layers lose is measured once.

    Attributes:
        rows: what plans are compared on.
        base: shapes and outlier channels of the layers.
    """

    rows: Sequence[Scored]
    base: Plan

    @cached_property
    def losses(self) -> dict[int, dict[Choice, float]]:
        """By layer index and choice, the layer alone."""
        return measure_losses(self.rows, self.base, {i: choices_of(layer) for i, layer in self.base.layers.items()})

    def find(self, bits: float, tokens: int) -> Plan:
        """The best plan of at most so many bits per element of `tokens` tokens, everything counted.

        Raises:
            ValueError: no plan has so few bits.
        """
        budget = int(bits / 16 * sizes.sixteen_bit_bytes(self.base, tokens))
        found = plans_within(self.base, self.losses, budget, tokens)
        if not found:
            raise ValueError(f"no plan takes at most {bits:g} bits per element at {tokens} tokens")
        return min(found.values(), key=lambda plan: mean_loss(self.rows, plan))
