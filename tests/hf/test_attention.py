"""What models ask of attention beside a causal softmax: soft caps, sinks, masks of their own; and bounded masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM

from hf.models import COMMON, fake_cache, feed, prompt, tiny
from kvturbo.hf import TurboCache
from kvturbo.hf.attention import attention_mask

SIZES = [19, 1, 5, 12, 9, 1]
ALTERNATE = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


def gemma2() -> Any:
    """Soft caps that bite."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**(COMMON | ALTERNATE), attn_logit_softcapping=1.5)).eval()


def gpt_oss() -> Any:
    """Sinks of random size, more than enough to change the result."""
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**(COMMON | ALTERNATE), num_local_experts=2, num_experts_per_tok=1)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=2.0)
    return model


@pytest.mark.parametrize("build", [gemma2, gpt_oss])
@pytest.mark.parametrize("name, windows", [("k4v4", (0, 0)), ("k3v3", (3, 6))])
def test_soft_caps_and_sinks_equal_eager_attention(build: Any, name: str, windows: tuple[int, int]) -> None:
    model, ids = build(), prompt(2, sum(SIZES))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model.set_attn_implementation("eager")
    raw = feed(model, DynamicCache(config=model.config), ids, SIZES)
    want = feed(model, fake_cache(model.config, name, *windows), ids, SIZES)
    model.set_attn_implementation("kvturbo")
    options = dict(zip(("sink", "recent"), windows, strict=True))
    got = feed(model, TurboCache(model.config, name, **options), ids, SIZES)
    error = (want - raw).square().mean().sqrt()
    assert (got - want).square().mean().sqrt() <= 0.01 * error + 1e-5
    padded = feed(model, TurboCache(model.config, name, **options), ids, SIZES, mask)
    alone = feed(model, TurboCache(model.config, name, **options), ids[:1, 4:], [SIZES[0] - 4, *SIZES[1:]])
    torch.testing.assert_close(padded[:1, 4:], alone, atol=2e-3, rtol=2e-3)


def test_a_first_chunk_can_have_a_mask_of_its_own() -> None:
    """Such as images whose tokens see one another; what is stored and read later is the same as with any other mask."""
    model, ids = tiny("llama"), prompt(2, 30)
    pattern = torch.ones(30, 30, dtype=torch.bool).tril()
    pattern[3:12, 3:12] = True
    pattern = pattern.expand(2, 1, 30, 30).clone()
    pattern[0, :, :, :2] = False
    logits = []
    for implementation in ("sdpa", "kvturbo"):
        model.set_attn_implementation(implementation)
        cache = fake_cache(model.config, "k4v4") if implementation == "sdpa" else TurboCache(model.config)
        first = model(ids, attention_mask=pattern, past_key_values=cache).logits
        mask = torch.ones(2, 31, dtype=torch.int64)
        mask[0, :2] = 0
        second = model(prompt(2, 1, seed=1), attention_mask=mask, past_key_values=cache).logits
        logits.append(torch.cat((first[:, 2:], second), 1))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-3, rtol=2e-3)


def test_a_causal_mask_in_four_dimensions_is_understood() -> None:
    model, ids = tiny("llama"), prompt(2, 24)
    model.set_attn_implementation("kvturbo")
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :5] = 0
    want = feed(model, TurboCache(model.config), ids, [20, 4], mask)
    cache, got = TurboCache(model.config), []
    for start, stop in ((0, 20), (20, 24)):
        full = torch.ones(stop, stop, dtype=torch.bool).tril() & mask[:, None, None, :stop].bool()
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
        out = model(
            ids[:, start:stop], attention_mask=full[:, :, start:], position_ids=positions, past_key_values=cache
        )
        got.append(out.logits)
    torch.testing.assert_close(torch.cat(got, 1)[mask.bool()], want[mask.bool()], atol=1e-5, rtol=1e-5)
    assert cache.tokens == 48 - 5


def test_no_mask_of_queries_times_keys_is_made_for_causal_attention() -> None:
    assert attention_mask(2, 100_000, 100_000) is None
    assert attention_mask(2, 1, 100_000, 99_999) is None
    padding = torch.ones(2, 100_000, dtype=torch.bool)
    padding[0, :3] = False
    assert attention_mask(2, 100_000, 100_000, attention_mask=padding).shape == (2, 100_000)
    continued = attention_mask(2, 50, 100_000, 99_950)
    assert continued.shape == (2, 100_000) and continued.all()
