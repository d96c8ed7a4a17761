"""Models that are a config.json: of the shapes that the plugin meets."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

DENSE = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 6, "rope_theta": 1e6,
    "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False,
}  # fmt: skip

QWEN_7B = DENSE | {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072,
}  # fmt: skip

SLIDING = _COMMON | {
    "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 128,
    "sliding_window": 256, "sliding_window_pattern": 3, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
    "query_pre_attn_scalar": 128, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
}  # fmt: skip

HEAD_DIM_64 = _COMMON | {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 4, "rope_theta": 1e4,
    "num_attention_heads": 8, "head_dim": 64,
}  # fmt: skip

HEAD_DIM_256 = HEAD_DIM_64 | {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256}

SOFT_CAP = _COMMON | {
    "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "num_hidden_layers": 4, "head_dim": 128,
    "sliding_window": 256, "query_pre_attn_scalar": 128, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e4,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": False,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip

MAMBA = _COMMON | {
    "architectures": ["JambaForCausalLM"], "model_type": "jamba", "num_hidden_layers": 4, "attn_layer_period": 2,
    "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1,
    "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 32, "use_mamba_kernels": False,
}  # fmt: skip

GATED_DELTA = _COMMON | {
    "architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid", "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 96, "linear_value_head_dim": 192,
    "attention_bias": False,
}  # fmt: skip

SINKS = _COMMON | {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "num_hidden_layers": 4, "num_attention_heads": 8,
    "head_dim": 64, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 2, "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "attention_bias": True, "intermediate_size": 512, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7.0,
}  # fmt: skip

LOCAL_CHUNKS = _COMMON | {
    "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "num_hidden_layers": 4, "head_dim": 128,
    "intermediate_size_mlp": 1024, "attention_chunk_size": 256, "no_rope_layers": [1, 1, 1, 0], "rope_theta": 5e5,
    "moe_layers": [], "interleave_moe_layer_step": 0, "num_local_experts": 1, "num_experts_per_tok": 1,
    "use_qk_norm": True, "attn_temperature_tuning": True, "floor_scale": 512, "attn_scale": 0.1, "attention_bias": False,
}  # fmt: skip

LATENT = _COMMON | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_hidden_layers": 2, "num_key_value_heads": 4,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 256,
    "first_k_dense_replace": 2, "moe_layer_freq": 1, "rope_theta": 1e4,
}  # fmt: skip
