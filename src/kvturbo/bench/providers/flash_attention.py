"""FlashAttention-3 over a 16-bit or fp8 paged cache, as vLLM ships it, scheduler metadata made beforehand."""

from __future__ import annotations

import torch

from kvturbo.bench.decode import Inputs
from kvturbo.bench.registry import PROVIDERS, Call, MissingError, Provider


def prepare(inputs: Inputs, dtype: torch.dtype) -> Call:
    """A call of FA3 on random keys and values of the case's shape."""
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError as error:
        raise MissingError(f"vLLM's FlashAttention-3 is not installed: {error}") from error
    case, device = inputs.case, inputs.q.device
    q_heads = case.kv_heads * case.group
    shape = (inputs.num_pages(), case.page_size, case.kv_heads, case.head_dim)
    k, v = (torch.empty(shape, dtype=torch.bfloat16, device=device).normal_().to(dtype) for _ in range(2))
    q, out = inputs.q.to(dtype), torch.empty_like(inputs.q)
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=device) * case.q_len
    scales = torch.ones(case.batch, case.kv_heads, device=device)
    descale = {f"{name}_descale": scales for name in "qkv"} if dtype == torch.float8_e4m3fn else {}
    longest = max(case.lengths())
    metadata = get_scheduler_metadata(
        case.batch, case.q_len, longest, q_heads, case.kv_heads, case.head_dim, inputs.seq_lens, qkv_dtype=dtype,
        cu_seqlens_q=starts, page_size=case.page_size, causal=True, num_splits=0,
    )  # fmt: skip
    table = inputs.table
    return lambda: flash_attn_varlen_func(
        q, k, v, max_seqlen_q=case.q_len, cu_seqlens_q=starts, max_seqlen_k=longest, seqused_k=inputs.seq_lens,
        softmax_scale=inputs.scale, causal=True, block_table=table, out=out, scheduler_metadata=metadata,
        fa_version=3, num_splits=0, **descale,
    )  # fmt: skip


PROVIDERS.register("fa3_bf16")(Provider(lambda inputs: prepare(inputs, torch.bfloat16)))
PROVIDERS.register("fa3_fp8")(Provider(lambda inputs: prepare(inputs, torch.float8_e4m3fn)))
