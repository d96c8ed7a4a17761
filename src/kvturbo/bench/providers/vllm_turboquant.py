"""vLLM's stock TurboQuant decode, `turboquant_4bit_nc`: 4-bit keys and values."""

from __future__ import annotations

import torch

from kvturbo.bench.decode import Inputs
from kvturbo.bench.registry import PROVIDERS, Call, MissingError, Provider

MAX_SPLITS = 32


def prepare(inputs: Inputs) -> Call:
    """A call of the stock kernel on random codes of the case's shape."""
    try:
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
        from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
    except ImportError as error:
        raise MissingError(f"vLLM's TurboQuant is not installed: {error}") from error
    case, device = inputs.case, inputs.q.device
    d, q_heads = case.head_dim, case.kv_heads * case.group
    if case.q_len > 1:
        raise MissingError("its decode takes one query per sequence")
    key_bytes = d // 2 + 2
    shape = (inputs.num_pages(), case.page_size, case.kv_heads, key_bytes + d // 2 + 4)
    cache = torch.randint(0, 256, shape, device=device, dtype=torch.uint8)
    one = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8).to(device)
    for start in (key_bytes - 2, key_bytes + d // 2, key_bytes + d // 2 + 2):  # key norm, value scale, value zero
        cache[..., start : start + 2] = one
    hadamard, centroids = _build_hadamard(d, "cuda"), get_centroids(d, 4).to(device).float()
    partial = torch.empty(case.batch, q_heads, MAX_SPLITS, d + 1, device=device)
    out, lse = torch.empty_like(inputs.q), torch.empty(case.batch, q_heads, device=device)
    table = inputs.table
    return lambda: triton_turboquant_decode_attention(
        query=inputs.q, kv_cache=cache, block_table=table, seq_lens=inputs.seq_lens, Pi=hadamard, centroids=centroids,
        scale=inputs.scale, mse_bits=4, key_packed_size=key_bytes, value_quant_bits=4, norm_correction=True, PiT=hadamard,
        mid_o_buf=partial, output_buf=out, lse_buf=lse, max_num_kv_splits=MAX_SPLITS,
    )  # fmt: skip


PROVIDERS.register("vllm_tq")(Provider(prepare))
