"""A simulated cache gives what the packed cache gives, and reads what it says it reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvturbo.config import KVFormat, Side
from kvturbo.eval.baselines.sixteen_bit import SixteenBitCache
from kvturbo.eval.caches import CacheSpec
from kvturbo.eval.codec import (
    SIXTEEN_BIT,
    Codec,
    by_layer,
    centred,
    mixed,
    packed_codec,
    plan_codec,
    rescaled,
    scaled_keys,
)
from kvturbo.eval.metrics.kl import kl_divergence
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.planning import PlanSpec
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.scoring import feed, lock_step, start
from kvturbo.eval.simulation import Simulation, run
from kvturbo.guard import Plan, make_plan
from kvturbo.hf.calibration import moments_of_model
from kvturbo.hf.sizes import bits_per_element
from tiny_model import HEAD_DIM, KV_HEADS, LAYERS

PREFIX, SCORED, CHUNK = 200, 60, 16


def ids_of(loaded: LoadedModel, count: int = PREFIX + SCORED, begin: int = 0) -> Tensor:
    return torch.from_numpy(loaded.text[begin : begin + count])[None]


def packed_logits(loaded: LoadedModel, spec: CacheSpec) -> Tensor:
    ids = loaded.text[: PREFIX + SCORED + 1]
    runs = start(loaded, ids[:PREFIX], [spec])
    return torch.cat([rows[spec.name] for _, rows in lock_step(loaded, runs, ids[PREFIX:], CHUNK)])


def codec_of(loaded: LoadedModel, name: str) -> Codec:
    return packed_codec(KVFormat.from_name(name, HEAD_DIM), loaded.outlier_channels(name))


@pytest.mark.parametrize("name", ["k4v4", "k4v2", "k3v3", "k2v2", "k8v4", "lite4", "tq2.5", "qjl3", "k4v4-o16"])
def test_a_simulation_gives_the_logits_of_the_packed_cache(tiny: LoadedModel, name: str) -> None:
    """The rest is the 16-bit rounding of gathered pages, so its divergence is far below the format's own."""
    packed = packed_logits(tiny, CacheSpec(name, recent=0, sink=0))
    codec = replace(codec_of(tiny, name), recent=0, sink=0)
    simulation = Simulation(codec, first=PREFIX, chunk=CHUNK, raw_dtype=None)
    simulated = run(tiny.model, ids_of(tiny), simulation, start=PREFIX)[0]
    exact = run(tiny.model, ids_of(tiny), Simulation(raw_dtype=None), start=PREFIX)[0]
    between, lost = kl_divergence(packed, simulated).mean(), kl_divergence(exact, packed).mean()
    assert between < 0.01 * lost
    assert (packed - simulated).abs().max() < 0.05


@pytest.mark.parametrize("name", ["k3v3", "k2v2"])
def test_windows_of_a_simulation_are_those_of_the_packed_cache(tiny: LoadedModel, name: str) -> None:
    """Windows are rounded to 16 bits, raw keys and values of an fp32 model are not, so the bound is wider than without."""
    packed = packed_logits(tiny, CacheSpec(name))

    def simulated(codec: Codec) -> Tensor:
        return run(tiny.model, ids_of(tiny), Simulation(codec, first=PREFIX, chunk=CHUNK, raw_dtype=None), PREFIX)[0]

    codec = codec_of(tiny, name)
    lost = kl_divergence(run(tiny.model, ids_of(tiny), Simulation(raw_dtype=None), PREFIX)[0], packed).mean()
    assert (codec.sink, codec.recent) == (4, 128)
    right = kl_divergence(packed, simulated(codec)).mean()
    assert right < 0.05 * lost
    for other in (replace(codec, sink=0), replace(codec, recent=112)):
        assert kl_divergence(packed, simulated(other)).mean() > 2 * right


def test_a_simulation_reads_as_many_packed_tokens_as_the_packed_cache(tiny: LoadedModel) -> None:
    for name in ("k4v4", "k3v3"):
        ids = tiny.text[: PREFIX + SCORED + 1]
        runs = start(tiny, ids[:PREFIX], [CacheSpec(name)])
        for _ in lock_step(tiny, runs, ids[PREFIX:], CHUNK):
            pass
        simulation = Simulation(codec_of(tiny, name), first=PREFIX, chunk=CHUNK)
        run(tiny.model, ids_of(tiny), simulation)
        assert simulation.packed_tokens_read == runs[0].packed_tokens_read > 0


def test_without_a_codec_it_is_the_16_bit_cache(tiny: LoadedModel) -> None:
    simulated = run(tiny.model, ids_of(tiny), Simulation())[0]
    with torch.inference_mode():
        whole = tiny.model(ids_of(tiny), past_key_values=SixteenBitCache(config=tiny.model.config)).logits[0]
    torch.testing.assert_close(simulated, whole, atol=2e-4, rtol=2e-4)


def test_rows_of_a_batch_do_not_see_one_another(tiny: LoadedModel) -> None:
    rows = torch.cat([ids_of(tiny), ids_of(tiny, begin=500)])
    codec = codec_of(tiny, "k3v3")
    both = run(tiny.model, rows, Simulation(codec, first=PREFIX, chunk=CHUNK))
    alone = run(tiny.model, rows[1:], Simulation(codec, first=PREFIX, chunk=CHUNK))
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["k3v3", "kivi4", "kvarn-k4v2"])
def test_a_kept_prefix_is_the_same_context(tiny: LoadedModel, name: str) -> None:
    """Questions after a context that was read before: what one pass over both gives."""
    codec = BASELINES.get(name).codec if name in BASELINES.names() else codec_of(tiny, name)
    ids = ids_of(tiny)
    whole = run(tiny.model, ids, Simulation(codec, first=PREFIX), start=PREFIX)
    context = Simulation(keep=True)
    run(tiny.model, ids[:, :PREFIX], context)
    questions = Simulation(codec, prefix=context.kept)
    again = run(tiny.model, ids[:, PREFIX:], questions)
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)
    assert questions.packed_tokens_read == LAYERS * np.diff(codec.packed_range(PREFIX))[0]


def test_a_chunk_sees_its_own_keys_raw_and_earlier_ones_through_the_codec(tiny: LoadedModel) -> None:
    """A codec that gives back zeros changes a chunk's logits through earlier chunks only."""
    zeros = Codec("nothing", lambda x, side, layer: torch.zeros_like(x), lambda d: 1.0)
    one = run(tiny.model, ids_of(tiny), Simulation(zeros, first=PREFIX + SCORED))
    two = run(tiny.model, ids_of(tiny), Simulation(zeros, first=PREFIX, chunk=CHUNK))
    exact = run(tiny.model, ids_of(tiny), Simulation())
    torch.testing.assert_close(one, exact)
    torch.testing.assert_close(two[:, :PREFIX], exact[:, :PREFIX], atol=1e-3, rtol=1e-3)
    assert (two[:, PREFIX:] - exact[:, PREFIX:]).abs().amax(-1).min() > 0.1


def test_only_the_chosen_heads_and_sides_are_packed(tiny: LoadedModel) -> None:
    codec = codec_of(tiny, "k2v2")

    def logits(**options: Any) -> Tensor:
        return run(tiny.model, ids_of(tiny), Simulation(codec, first=PREFIX, chunk=CHUNK, **options), start=PREFIX)

    none = {i: torch.zeros(KV_HEADS, dtype=torch.bool) for i in range(LAYERS)}
    exact = run(tiny.model, ids_of(tiny), Simulation(first=PREFIX, chunk=CHUNK), start=PREFIX)
    torch.testing.assert_close(logits(heads=none), exact)
    torch.testing.assert_close(logits(sides=()), exact)
    every = {i: ~mask for i, mask in none.items()}
    torch.testing.assert_close(logits(heads=every), logits())
    assert not torch.allclose(logits(sides=("k",)), logits(sides=("v",)), atol=1e-3)


def test_packed_ranges_leave_windows_and_unfinished_groups() -> None:
    codec = Codec("", lambda x, side, layer: x, lambda d: 16.0, sink=4, recent=128, group=32)
    assert codec.packed_range(500) == (4, 352)
    assert codec.packed_range(100) == (4, 4)
    assert codec.packed_range(2) == (2, 2)


def test_bits_count_windows() -> None:
    codec = Codec("", lambda x, side, layer: x, lambda d: d / 2, sink=4, recent=124)
    assert codec.bits_per_element(128) == 2
    assert codec.bits_at(128, 1024) == (896 * 2 + 128 * 16) / 1024


def _noise(x: Tensor, side: Side, layer: int) -> Tensor:
    return x.round()


def test_wrapped_codecs_are_exact_where_theory_says_so() -> None:
    """Scaling and centring change what is rounded, and are undone after: with a codec that loses nothing, nothing changes."""
    x = torch.randn(1, 2, 3, 64) * 3
    factors, means = {0: torch.rand(2, 64) + 0.5}, {0: torch.randn(2, 64)}
    for wrap in (lambda c: scaled_keys(c, factors), lambda c: centred(c, means, "v"), lambda c: centred(c, means, "k")):
        lossless, lossy = wrap(SIXTEEN_BIT), wrap(Codec("", _noise, lambda d: 1.0))
        for side in ("k", "v"):
            torch.testing.assert_close(lossless.restore(x, side, 0), x)
        changed = [not torch.equal(lossy.restore(x, side, 0), x.round()) for side in ("k", "v")]
        assert sum(changed) == 1
    scaled = scaled_keys(Codec("", _noise, lambda d: 1.0), factors).restore(x, "k", 0)
    expected = (x * factors[0][:, None]).round() / factors[0][:, None]
    torch.testing.assert_close(scaled, expected)


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2"])
def test_other_scales_are_what_their_rules_say(name: str) -> None:
    """On the same codes: norm keeps |x|, and no multiple of what least squares gives is closer to x."""
    codec = packed_codec(KVFormat.from_name(name, 64))
    x = torch.randn(1, 2, 50, 64, generator=torch.Generator().manual_seed(3))
    x[0, 0, 0] = 0
    own = codec.restore(x, "v", 0)
    norm, least = (rescaled(codec, rule, "v").restore(x, "v", 0) for rule in ("norm", "least_squares"))
    for other in (norm, least):
        assert (other[0, 0, 0] == 0).all()
        alike = torch.cosine_similarity(other.double(), own.double(), dim=-1)
        assert (alike.flatten()[1:] > 1 - 1e-9).all(), "the same codes"
    torch.testing.assert_close(norm.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close((x * least).sum(-1), least.square().sum(-1))
    assert ((own - x).norm(dim=-1) >= (least - x).norm(dim=-1) - 1e-5).all()
    assert not torch.allclose(own, least, rtol=1e-3) and not torch.allclose(own, norm, rtol=1e-3)
    assert torch.equal(rescaled(codec, "norm", "v").restore(x, "k", 0), codec.restore(x, "k", 0)), "the other side"


def test_codecs_by_layer_and_by_side() -> None:
    rounding = Codec("rounding", _noise, lambda d: d)
    layers = by_layer({0: SIXTEEN_BIT, 1: rounding})
    x = torch.randn(1, 2, 3, 64)
    assert torch.equal(layers.restore(x, "k", 0), x) and torch.equal(layers.restore(x, "k", 1), x.round())
    assert layers.bytes_per_token(64) == (4 * 64 + 64) / 2
    both = mixed(SIXTEEN_BIT, rounding, 64, 100)
    assert torch.equal(both.restore(x, "k", 0), x) and torch.equal(both.restore(x, "v", 0), x.round())
    with pytest.raises(ValueError, match="for head_dim 64, got 128"):
        both.bytes_per_token(128)


def test_a_plans_simulation_gives_the_logits_of_its_cache(tiny: LoadedModel) -> None:
    """Formats and windows differ from layer to layer, and so do the packed tokens that are read."""
    base = make_plan(moments_of_model(tiny.model))
    first, second = base.layers[0], base.layers[1]
    plan = Plan({0: replace(first, format="k3v2", sink=4, recent=40), 1: replace(second, format="k4v4-o16")})
    spec = PlanSpec("plan", plan=plan)
    packed = packed_logits(tiny, spec)
    simulation = Simulation(plan_codec(plan), first=PREFIX, chunk=CHUNK, raw_dtype=None)
    simulated = run(tiny.model, ids_of(tiny), simulation, start=PREFIX)[0]
    exact = run(tiny.model, ids_of(tiny), Simulation(raw_dtype=None), start=PREFIX)[0]
    assert kl_divergence(packed, simulated).mean() < 0.05 * kl_divergence(exact, packed).mean()
    starts = range(PREFIX, PREFIX + SCORED, CHUNK)
    assert simulation.packed_tokens_read == sum(2 * start - 44 for start in starts)
    assert plan_codec(plan).bits_at(HEAD_DIM, 1000) == pytest.approx(bits_per_element(plan, 1000), rel=0.02)
    whole = plan_codec(Plan({i: replace(layer, format="16bit") for i, layer in plan.layers.items()}))
    assert whole.bits_at(HEAD_DIM, 100) == 16


def test_the_models_attention_is_put_back_and_never_used_outside(tiny: LoadedModel) -> None:
    before = tiny.model.config._attn_implementation
    run(tiny.model, ids_of(tiny, 20), Simulation())
    assert tiny.model.config._attn_implementation == before
    tiny.model.set_attn_implementation("kvturbo_simulation")
    try:
        with pytest.raises(RuntimeError, match="only for"), torch.inference_mode():
            tiny.model(ids_of(tiny, 20))
    finally:
        tiny.model.set_attn_implementation(before)


@pytest.mark.parametrize("name", ["fp8", "kivi2", "kvarn-k4v2", "vllm-4bit_nc", "quarot-int4", "pr38280"])
def test_a_simulated_cache_gives_the_logits_of_a_simulation(tiny: LoadedModel, name: str) -> None:
    """What `kvturbo eval` feeds chunk by chunk is what one pass computes: codecs whose scales span tokens aside (fp8,
    pr38280), for which the stretch of tokens differs."""
    codec = BASELINES.get(name).codec
    assert codec is not None
    prefix = 300  # two tiles of KVarN's and a part, so that it packs one
    ids = tiny.text[: prefix + CHUNK]
    cache = BASELINES.get(name).new(tiny.model.config)
    with torch.inference_mode():
        for piece in (ids[:prefix], ids[prefix:]):
            logits = tiny.model(torch.from_numpy(piece)[None], past_key_values=cache).logits[0]
    simulated = run(tiny.model, ids_of(tiny, prefix + CHUNK), Simulation(codec, first=prefix), start=prefix)[0]
    exact = run(tiny.model, ids_of(tiny, prefix + CHUNK), Simulation(), start=prefix)[0]
    assert kl_divergence(logits, simulated).mean() < 0.01 * kl_divergence(exact, simulated).mean()
    assert cache.packed_tokens_read == LAYERS * np.diff(codec.packed_range(prefix))[0] > 0
    expected = len(ids) * LAYERS * KV_HEADS * 2 * HEAD_DIM * codec.bits_at(HEAD_DIM, len(ids)) / 8
    assert abs(cache.nbytes() - expected) < 1


def test_a_task_measures_a_simulated_cache_and_counts_its_reads(tiny: LoadedModel) -> None:
    runs = start(tiny, tiny.text[:PREFIX], [CacheSpec("kivi4")])
    feed(tiny, runs[0], tiny.text[PREFIX : PREFIX + CHUNK])
    assert runs[0].packed_tokens_read == LAYERS * 64
