"""Bad input to the transformers integration: an error that names the value and the choices, and nothing half-written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, DeepseekV3Config, DynamicCache, Gemma3nTextConfig, LlamaConfig, MistralConfig

from hf.models import COMMON, feed, prompt, tiny
from kvturbo.hf import TurboCache


def llama(**options: Any) -> LlamaConfig:
    return LlamaConfig(**(COMMON | options))


CONFIGS = {
    "layer 0: head_dim must be a multiple of 16, got 100; supported: 64": llama(head_dim=100),
    "layer 0: head_dim must be one of 64, 80, .*, got 48": llama(head_dim=48),
    "'mistral' has no full_attention layer .* DynamicSlidingWindowLayer": MistralConfig(**COMMON, sliding_window=16),
    "'deepseek_v3' uses multi-head latent attention": DeepseekV3Config(),
    "'bart' has cross attention; only decoder-only": BartConfig(),
    r"'gemma3n_text' shares keys and values between layers \(num_kv_shared_layers 15\)": Gemma3nTextConfig(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "unknown format 'k5v5' for head_dim 64; valid formats: k4v4, .*tq3.5": {"format": "k5v5"},
    "layer 0: unknown format 'k4v4-o32' for head_dim 64": {"format": "k4v4-o32"},
    "one entry for each of the 2 layers, got 1": {"format": ["k4v4"]},
    r"missing: \[1\], not full_attention: \[7\]": {"format": {0: "k4v4", 7: "k4v4"}},
    "sink must not be negative, got -1": {"sink": -1},
    "recent must not be negative, got -5": {"recent": -5},
    "recent must be a number of tokens, got 1.5": {"recent": 1.5},
    "sink must be a number of tokens, got '4'": {"sink": {0: "4"}},
    r"recent names layers \[7\]; the full_attention layers are \[0, 1\]": {"recent": {0: 64, 7: 64}},
    "format must be a name, a list over all layers or a mapping by layer, got 4": {"format": 4},
    "page_size must be one of 16, 32, 64, got 20": {"page_size": 20},
    "max_tokens must be at least 1, got 0": {"max_tokens": 0},
    r"needs outlier_channels for layers \[0, 1\]; .*channels_from_weights.*channels_from_text": {"format": "k4v4-o16"},
    "needs outlier_channels for layers \\[1\\]": {
        "format": "k4v4-o16", "outlier_channels": {0: torch.arange(16).expand(2, 16)}
    },
}  # fmt: skip


@pytest.mark.parametrize("message", CONFIGS)
def test_models_that_cannot_be_packed(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TurboCache(CONFIGS[message])


@pytest.mark.parametrize("message", OPTIONS)
def test_options(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TurboCache(llama(), **OPTIONS[message])


def test_unknown_backend() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of .*reference.*, got 'fpga'"):
        feed(model, TurboCache(model.config, backend="fpga"), prompt(1, 4), [4])


def filled(**options: Any) -> tuple[Any, TurboCache]:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache = TurboCache(model.config, **options)
    feed(model, cache, prompt(2, 20), [20])
    return model, cache


def test_crop_takes_no_positive_count() -> None:
    _, cache = filled()
    with pytest.raises(ValueError, match="0 or a negative number of tokens, got 3"):
        cache.crop(3)
    assert cache.get_seq_length() == 20


def test_another_batch_size() -> None:
    model, cache = filled()
    with pytest.raises(ValueError, match="the cache holds 2 rows, got a batch of 3"):
        feed(model, cache, prompt(3, 1), [1])
    assert cache.tokens == 40


def test_masks_that_cannot_be_followed() -> None:
    model, cache = filled()
    ids, mask = prompt(2, 3), torch.ones(2, 23, dtype=torch.int64)
    mask[1, 5] = 0
    with pytest.raises(ValueError, match="hides stored tokens of row 1 that have visible ones after them"):
        model(ids, attention_mask=mask, past_key_values=cache)
    pattern = torch.ones(2, 1, 3, 23, dtype=torch.bool)
    with pytest.raises(ValueError, match="attention_mask is not causal, and tokens are stored already"):
        model(ids, attention_mask=pattern, past_key_values=cache)
    with pytest.raises(ValueError, match=r"bool \[batch, 1, 3, columns\], got torch.float32 \[2, 1, 3, 23\]"):
        model(ids, attention_mask=torch.zeros(2, 1, 3, 23), past_key_values=cache)
    assert cache.tokens == 40 and cache.get_seq_length() == 20


def test_padding_that_is_shown_later() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    cache, mask = TurboCache(model.config), torch.ones(2, 20, dtype=torch.int64)
    mask[0, :3] = 0
    feed(model, cache, prompt(2, 20), [20], mask)
    hidden = torch.ones(2, 21, dtype=torch.int64)
    hidden[1, 20] = 0
    with pytest.raises(ValueError, match="attention_mask shows columns that were padding"):
        model(prompt(2, 1), attention_mask=hidden, past_key_values=cache)


def test_dropout_and_sliding_windows_of_packed_layers() -> None:
    model, cache = filled()
    attention = copy.deepcopy(model.model.layers[0].self_attn).train()
    attention.attention_dropout = 0.5
    hidden = torch.zeros(2, 1, 64)
    positions = model.model.rotary_emb(hidden, torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"packed layers don't support dropout \(got 0.5\)"):
        attention(hidden, positions, None, cache)
    with pytest.raises(ValueError, match=r"packed layers don't support sliding_window \(got 8\)"):
        attention.eval()(hidden, positions, None, cache, sliding_window=8)


def test_keys_of_another_shape() -> None:
    cache = TurboCache(llama())
    with pytest.raises(ValueError, match=r"keys of layer 0 must be \[batch, 2, tokens, 64\], got \[1, 4, 3, 64\]"):
        cache.update(torch.zeros(1, 4, 3, 64), torch.zeros(1, 4, 3, 64), 0)


def test_a_configuration_that_names_another_attention_than_the_model_uses() -> None:
    model = tiny("llama")
    model.set_attn_implementation("kvturbo")
    config = copy.deepcopy(model.config)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="keys of layer 0 were never attended to by 'kvturbo'"):
        feed(model, TurboCache(config), prompt(1, 8), [8])


def test_a_forward_pass_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = filled()
    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[1].self_attn, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            feed(model, cache, prompt(2, 1), [1])
    with pytest.raises(RuntimeError, match=r"layer 1 holds 20 tokens .* reset\(\) the cache"):
        feed(model, cache, prompt(2, 1), [1])
    cache.reset()
    feed(model, cache, prompt(1, 5), [5])
    assert cache.tokens == 5


def test_sources_that_do_not_fit() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="layer 0 of the cache holds no keys and values"):
        TurboCache.from_cache(model.config, DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="the cache has 0 layers, the model has 2"):
        TurboCache.from_cache(model.config, DynamicCache())


def test_files(tmp_path: Path) -> None:
    model, cache = filled()
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        TurboCache.load(path, model.config)
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(ValueError, match="has been altered"):
        TurboCache.load(path, model.config)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is for a model with layers .*, the configuration has"):
        TurboCache.load(path, tiny("phi3").config)
    cache.store.groups[0].pages.save(path)
    with pytest.raises(ValueError, match="is a saved PagedKVCache, not a TurboCache"):
        TurboCache.load(path, model.config)
    with pytest.raises(FileNotFoundError, match="no cache file"):
        TurboCache.load(tmp_path / "nothing", model.config)
