"""What a plan's cache takes is what the cache that is made with it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hf.models import feed, prompt, tiny
from kvturbo.guard import Plan, make_plan
from kvturbo.hf import TurboCache
from kvturbo.hf.calibration import moments_of_model
from kvturbo.hf.sizes import bits_per_element, cache_bytes, sixteen_bit_bytes


@pytest.mark.parametrize("tokens", [3, 20, 33, 100])
@pytest.mark.parametrize("first", ["k4v4", "k3v2-o16", "k2v2"])
def test_bytes_are_those_of_the_live_cache(first: str, tokens: int) -> None:
    model = tiny("llama")
    planned = make_plan(moments_of_model(model)).layers
    plan = Plan({0: replace(planned[0], format=first), 1: replace(planned[1], format="k3v2", sink=4, recent=32)})
    model = tiny("llama").bfloat16()  # windows and pages are then all there is
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, plan=plan)
    feed(model, cache, prompt(1, tokens), [tokens])
    assert cache_bytes(plan, tokens) == cache.bytes_used
    assert sixteen_bit_bytes(plan, tokens) == cache.sixteen_bit_nbytes()
    assert bits_per_element(plan, tokens) == 16 * cache.bytes_used / cache.sixteen_bit_nbytes()


def test_a_layer_in_16_bits_counts_whole() -> None:
    plan = Plan({i: replace(x, format="16bit") for i, x in make_plan(moments_of_model(tiny("llama"))).layers.items()})
    assert cache_bytes(plan, 77) == sixteen_bit_bytes(plan, 77) == 2 * 77 * 2 * 64 * 4
