"""What the plugin refuses, and with what words: models, options of the engine, layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vllm_models as models
import vllm_standin

pytestmark = pytest.mark.usefixtures("vllm_python")


@pytest.mark.parametrize(
    "model, options, message",
    [
        (models.DENSE | {"hidden_size": 192}, {}, "head_dim must be one of 64, .*got 48"),
        (models.DENSE, {"dtype": "float32"}, "dtype torch.float32 is not supported; use --dtype bfloat16 or float16"),
        (models.LATENT, {}, "use_mla=True.*kv_cache_dtype not supported"),
    ],
    ids=["head_dim", "fp32", "latent attention"],
)
def test_what_is_not_supported_is_refused_by_name(model: dict[str, Any], options: dict[str, Any], message: str) -> None:
    config = vllm_standin.config_of(model, **options)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        vllm_standin.build(config)


@pytest.mark.parametrize(
    "option, message",
    [
        ("use_dcp", "decode context parallelism.*use tensor parallelism"),
        ("use_mm_prefix", "bidirectional attention inside a prompt"),
        ("use_non_causal", "non-causal attention"),
        ("use_batch_invariant", "VLLM_BATCH_INVARIANT"),
        ("use_kv_connector", "KV connector None does not know packed pages; use one of OffloadingConnector"),
    ],
)
def test_options_of_the_selection_are_refused_with_what_to_use(option: str, message: str) -> None:
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from kvturbo.vllm.backend import BACKENDS

    selector = AttentionSelectorConfig(128, torch.bfloat16, "turboquant", None)._replace(**{option: True})
    backend = BACKENDS["turboquant"]
    reasons = backend.validate_configuration(device_capability=(9, 0), **selector._asdict())
    assert len(reasons) == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(reasons[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alibi_slopes": [1.0]}, "ALiBi is not supported"),
        ({"attn_type": "encoder_only"}, "encoder_only attention is not supported"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "sharing the cache of model.layers.0"),
        ({"chunk_lookback": 2}, "chunk_lookback is not supported"),
    ],
)
def test_layers_that_ask_for_more_are_refused(options: dict[str, Any], message: str) -> None:
    from vllm.config import set_current_vllm_config

    from kvturbo.vllm.attention import PackedAttention

    config = vllm_standin.config_of(models.DENSE)
    with set_current_vllm_config(config), pytest.raises(NotImplementedError, match=message):
        PackedAttention(4, 128, 0.1, 2, kv_cache_dtype="turboquant", **options)


@pytest.mark.parametrize("method, tokens, most", [("ngram", 9, 7), ("draft_model", 7, 6)])
def test_long_drafts_with_asynchronous_scheduling_are_refused(method: str, tokens: int, most: int) -> None:
    from types import SimpleNamespace

    from kvturbo.vllm.metadata import _check_long_drafts

    draft = SimpleNamespace(num_speculative_tokens=tokens, parallel_drafting=False, method=method)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=True), speculative_config=draft, use_v2_model_runner=True
    )
    with pytest.raises(ValueError, match=f"num_speculative_tokens must be at most {most} .*got {tokens}"):
        _check_long_drafts(config)
