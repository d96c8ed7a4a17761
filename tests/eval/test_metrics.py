"""Metrics have the values that closed forms give."""

from __future__ import annotations

import math

import pytest
import torch

from kvturbo.eval.metrics.kl import kl_divergence, quantiles, same_top1
from kvturbo.eval.metrics.perplexity import nll
from kvturbo.eval.registry import METRICS


def test_kl_of_equal_logits_is_zero_whatever_is_added_to_all() -> None:
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0)) * 5
    assert kl_divergence(logits, logits).max() == 0
    assert kl_divergence(logits, logits + 7.5).max() < 1e-12


@pytest.mark.parametrize("delta", [-3.0, -0.01, 0.01, 2.0])
def test_kl_of_one_raised_logit_is_the_closed_form(delta: float) -> None:
    vocabulary = 64
    raised = torch.zeros(3, vocabulary, dtype=torch.float64)
    raised[:, 5] = delta
    expected = math.log((vocabulary - 1 + math.exp(delta)) / vocabulary) - delta / vocabulary
    assert kl_divergence(torch.zeros_like(raised), raised).tolist() == pytest.approx([expected] * 3, rel=1e-9)


def test_kl_is_not_symmetric_and_starts_from_the_reference() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    )
    assert kl_divergence(q.log(), p.log()).item() == pytest.approx(
        0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    )


def test_nan_logits_are_neither_close_nor_in_agreement() -> None:
    reference, broken = torch.zeros(2, 8), torch.zeros(2, 8)
    broken[1, 3] = torch.nan
    assert kl_divergence(reference, broken).isnan().tolist() == [False, True]
    assert same_top1(reference, broken).tolist() == [True, False]


def test_quantiles_of_a_ramp() -> None:
    figures = quantiles(torch.arange(1001, dtype=torch.float64))
    assert figures == pytest.approx({"kl_mean": 500, "kl_p99": 990, "kl_p99.9": 999})


def test_perplexity_of_uniform_logits_is_the_vocabulary() -> None:
    targets = torch.arange(6)
    assert nll(torch.zeros(6, 32), targets).tolist() == pytest.approx([math.log(32)] * 6)
    figures = METRICS.get("nll").summarise(nll(torch.zeros(6, 32), targets))
    assert figures["perplexity"] == pytest.approx(32)
