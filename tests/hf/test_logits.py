"""Logits with TurboCache equal those of the same model over a raw cache that is quantised and dequantised.

Sums are taken in another order, which in fp32 moves a value across a quantiser's threshold now and then, on one processor and
not on another; so the models compute in fp64. Equal means: the rms difference is at most 1 % of what quantisation itself changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf.models import FAMILIES, fake_cache, feed, prompt, tiny
from kvturbo.hf import TurboCache
from kvturbo.hf.outliers import channels_from_weights

CHUNKS = [19, 1, 1, 5, 12, 1, 8, 9, 1]


def compare(
    family: str, name: str, sizes: list[int] = CHUNKS, *, sink: int = 0, recent: int = 0, channels: Any = None
) -> None:
    """Passes the same chunks through both caches and compares."""
    model = tiny(family).double()
    ids = prompt(2, sum(sizes))
    model.set_attn_implementation("sdpa")
    raw = feed(model, DynamicCache(config=model.config), ids, sizes)
    want = feed(model, fake_cache(model.config, name, sink, recent, channels), ids, sizes)
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, name, sink=sink, recent=recent, outlier_channels=channels)
    got = feed(model, cache, ids, sizes)
    assert rms(got - want) <= 0.01 * rms(want - raw) + 1e-5


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_fake_quantisation(family: str) -> None:
    compare(family, "k4v4")


@pytest.mark.parametrize("name", ["k8v4", "k3v2", "lite4", "tq2.5", "qjl3"])
def test_every_kind_of_format_equals_fake_quantisation(name: str) -> None:
    compare("llama", name)


def test_outlier_formats_equal_fake_quantisation() -> None:
    channels = channels_from_weights(tiny("qwen2"), "k4v2-o16")
    compare("qwen2", "k4v2-o16", channels=channels)


@pytest.mark.parametrize("sink, recent", [(2, 5), (0, 16), (3, 0), (30, 40)])
def test_windows_stay_raw(sink: int, recent: int) -> None:
    compare("qwen3", "k2v2", sink=sink, recent=recent)


def test_layers_can_have_formats_of_their_own() -> None:
    model = tiny("llama")
    ids = prompt(2, sum(CHUNKS))
    model.set_attn_implementation("sdpa")
    expected = fake_cache(model.config, "k4v4")
    expected.layers[1] = DynamicCache(config=model.config).layers[1]
    want = feed(model, expected, ids, CHUNKS)
    model.set_attn_implementation("kvturbo")
    got = feed(model, TurboCache(model.config, ["k4v4", "16bit"]), ids, CHUNKS)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    mixed = TurboCache(model.config, {0: "k4v4", 1: "k2v2"})
    feed(model, mixed, ids, CHUNKS)
    assert [layer.group.spec.fmt.name for layer in mixed.layers] == ["k4v4", "k2v2"]


@pytest.mark.parametrize("name, sink, recent", [("k4v4", 0, 0), ("k2v2", 2, 5)])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_reads_the_same_cache_dequantised(
    implementation: str, name: str, sink: int, recent: int
) -> None:
    """Its new tokens are raw, so chunks of more than 8 tokens make both the same."""
    model, sizes = tiny("gemma3"), [19, 9, 10, 9]
    ids = prompt(2, sum(sizes))
    model.set_attn_implementation("sdpa")
    want = feed(model, fake_cache(model.config, name, sink, recent), ids, sizes)
    model.set_attn_implementation(implementation)
    cache = TurboCache(model.config, name, sink=sink, recent=recent)
    got = feed(model, cache, ids, sizes)
    torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    assert cache.packed_tokens_read > 0


def test_other_attention_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    from kvturbo.hf.layer import tell_once

    tell_once.cache_clear()
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    for _ in range(2):
        feed(model, TurboCache(model.config, "k4v4"), prompt(1, 6), [4, 2])
    assert len([record for record in caplog.records if "dequantises" in record.message]) == 1


def test_stock_caches_work_under_the_attention_implementation() -> None:
    for family in ("llama", "gemma3"):
        model, ids = tiny(family), prompt(2, 40)
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        logits = []
        for implementation in ("sdpa", "kvturbo"):
            model.set_attn_implementation(implementation)
            logits.append(feed(model, DynamicCache(config=model.config), ids, [19, 1, 12, 8], mask))
        real = mask.bool()
        torch.testing.assert_close(logits[1][real], logits[0][real], atol=1e-5, rtol=1e-5)
