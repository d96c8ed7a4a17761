"""How far a cache's next-token distributions are from those of the 16-bit cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kvturbo.eval.registry import METRICS, Metric


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference || other) of the two softmax distributions in nats: logits [..., V] -> [...] float64.

    Computed in float64, since the divergences of interest are far below fp32's rounding of a sum over a vocabulary.
    """
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


def same_top1(reference: Tensor, logits: Tensor) -> Tensor:
    """Whether both have the same most likely token: logits [..., V] -> [...] bool. NaN logits never agree."""
    same = reference.argmax(-1) == logits.argmax(-1)
    return same & ~logits.isnan().any(-1) & ~reference.isnan().any(-1)


def quantiles(values: Tensor) -> dict[str, float]:
    """Mean, 99 % and 99.9 % quantile; NaN if any value is."""
    p99, p999 = torch.quantile(values, values.new_tensor([0.99, 0.999])).tolist()
    return {"kl_mean": values.mean().item(), "kl_p99": p99, "kl_p99.9": p999}


METRICS.register("kl")(Metric(lambda reference, logits, _: kl_divergence(reference, logits), quantiles))
METRICS.register("same_top1")(
    Metric(
        lambda reference, logits, _: same_top1(reference, logits).double(),
        lambda values: {"same_top1": values.mean().item()},
    )
)
