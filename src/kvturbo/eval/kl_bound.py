"""What the likeliest tokens alone say of two distributions' divergence."""

from __future__ import annotations

import math
from collections.abc import Mapping

_SMALLEST_REST = 1e-6  # sums of probabilities that came as fp32 logarithms are no closer to 1


def kl_lower_bound(reference: Mapping[str, float], other: Mapping[str, float]) -> float:
    """KL(reference || other) in nats is at least this.

    Tokens that both lists have count one by one, all others of the vocabulary as one: what a token has that only one list
    names is not known on the other side. Merging outcomes never raises a divergence, so this is a lower bound, up to about 1e-6.

    Args:
        reference, other: log probabilities of some tokens, by token.
    """
    shared = reference.keys() & other.keys()
    terms = [math.exp(reference[token]) * (reference[token] - other[token]) for token in shared]
    rest, other_rest = (
        max(1.0 - math.fsum(math.exp(logs[token]) for token in shared), _SMALLEST_REST) for logs in (reference, other)
    )
    return max(0.0, math.fsum([*terms, rest * math.log(rest / other_rest)]))
