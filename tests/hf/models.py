"""Small random models, and a raw cache that quantises and dequantises instead of packing: what TurboCache must equal."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from kvturbo import KVFormat, dequantize, quantize

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
GEMMA = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NEXT = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "mlp_only_layers": [0, 1, 2],
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"hidden_size": 256}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA | {"sliding_window": 8}),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM, NEXT),
}


def tiny(family: str) -> Any:
    """A random model of a family in fp32, the caller's own: it may change weights, dtype and attention implementation."""
    return deepcopy(_made_once(family))


@lru_cache(maxsize=16)
def _made_once(family: str) -> Any:
    config_class, model_class, extra = FAMILIES[family]
    options = COMMON | extra
    if family == "phi3":
        options = {key: value for key, value in options.items() if key != "head_dim"}
    torch.manual_seed(1)
    model = model_class(config_class(**options)).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            torch.nn.init.normal_(weight, std=1.0)
    model.generation_config.eos_token_id = None
    return model


def prompt(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids [rows, length] without the padding id."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


class FakeLayer(DynamicLayer):
    """A full-attention layer in plain tensors: packed tokens are quantised and dequantised, by the rules of TurboCache.

    Keys and values hold four versions one after the other in the last axis: raw, dequantised, as the 16-bit windows hold it,
    and dequantised after that, for tokens that are packed when they leave a window.
    """

    def __init__(self, fmt: KVFormat, sink: int, recent: int, channels: Tensor | None) -> None:
        super().__init__()
        self.fmt, self.sink, self.recent, self.channels = fmt, sink, recent, channels
        self.version = torch.zeros(0, dtype=torch.int64)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        past, count = self.get_seq_length(), key_states.shape[2]
        before = torch.cat((self.version, torch.zeros(count, dtype=torch.int64)))
        super().update(*(self.versions(x, side) for x, side in ((key_states, "k"), (value_states, "v"))))
        index = torch.arange(past + count)
        packed = (index >= self.sink) & (index < past + count - self.recent)
        self.version = torch.where(before % 2 == 1, before, torch.where(packed, before + 1, 2))
        read_back = past and count <= 8 and not self.sink + self.recent
        shown = self.version if read_back else before
        return tuple(self.select(x, shown) for x in (self.keys, self.values))

    def versions(self, x: Tensor, side: Any) -> Tensor:
        window = x.bfloat16().to(x.dtype)
        return torch.cat((x, self.fake(x, side), window, self.fake(window, side)), -1)

    @staticmethod
    def select(x: Tensor, version: Tensor) -> Tensor:
        parts = torch.stack(x.chunk(4, -1))  # [4, batch, heads, tokens, d]
        return parts[version, :, :, torch.arange(len(version))].permute(1, 2, 0, 3)

    def fake(self, x: Tensor, side: Any) -> Tensor:
        channels = None if self.channels is None else self.channels[None, :, None]
        return dequantize(quantize(x, self.fmt, side, channels), self.fmt, side, channels).to(x.dtype)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.version = self.version[: self.get_seq_length()]


def fake_cache(
    config: Any, name: str, sink: int = 0, recent: int = 0, channels: dict[int, Tensor] | None = None
) -> DynamicCache:
    """A stock cache whose full-attention layers are FakeLayers of a format."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            heads = config.num_attention_heads
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
            own = None if channels is None else channels[i]
            cache.layers[i] = FakeLayer(KVFormat.from_name(name, head_dim), sink, recent, own)
    return cache


@torch.no_grad()
def feed(model: Any, cache: Any, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits [rows, tokens, vocabulary] of ids, passed in chunks of the given sizes."""
    logits, start = [], 0
    for size in sizes:
        stop = start + size
        seen = None if mask is None else mask[:, :stop]
        positions = None if mask is None else (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:stop]
        out = model(
            ids[:, start:stop], attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits.append(out.logits)
        start = stop
    assert start == ids.shape[1]
    return torch.cat(logits, 1)
