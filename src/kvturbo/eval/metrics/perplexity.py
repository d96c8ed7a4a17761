"""Perplexity of the text itself. With chunks of one token this is what decoding sees."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import cross_entropy

from kvturbo.eval.registry import METRICS, Metric


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats: logits [n, V], next tokens [n] int64 -> [n] float64."""
    return cross_entropy(logits.double(), targets, reduction="none")


METRICS.register("nll")(
    Metric(
        lambda _, logits, targets: nll(logits, targets),
        lambda values: {"nll": values.mean().item(), "perplexity": math.exp(min(values.mean().item(), 700.0))},
    )
)
