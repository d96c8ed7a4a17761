"""What of vLLM does the dense part of the work: flash attention, the merge of partial results, and shared memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvturbo.vllm.prefill import Flash, Shapes, dense_workspace


def flash_attention(head_size: int, scale: float, soft_cap: float | None) -> Flash:
    """vLLM's flash attention, in the version that vLLM would pick.

    Raises:
        ValueError: vLLM has none for this GPU.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_size, requires_softcap=soft_cap is not None)
    if version is None:
        raise ValueError(
            f"kvturbo: vLLM has no flash attention for head_size {head_size} here; use --kv-cache-dtype auto"
        )
    return partial(_flash, scale=scale, soft_cap=soft_cap or 0.0, version=version)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    causal: bool,
    out: Tensor,
    *,
    scale: float,
    soft_cap: float,
    version: int,
) -> Tensor:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    # How far keys are split is chosen by the longest sequence as if there were no other, and all rows get memory for it: a gigabyte
    # for many short prefixes beside a long one. One sequence's splits times its rows are bounded, and a chunk's own keys are split
    # as in the engine's own backend.
    splits = 1 if not causal and len(starts[0]) > 2 else 0
    result, lse = flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], max_seqlen_q=longest[0], max_seqlen_k=longest[1],
        softmax_scale=scale, causal=causal, softcap=soft_cap, return_softmax_lse=True, out=out, fa_version=version,
        num_splits=splits,
    )  # fmt: skip
    # Versions that fold grouped heads for a single query make a tensor of their own.
    if result.data_ptr() != out.data_ptr():
        out.copy_(result)
    sums: Tensor = lse
    return sums


def merge(out: Tensor, first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor, lse: Tensor) -> None:
    """vLLM's merge of attention over two sets of keys."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    merge_attn_states(out, first, first_lse, second, second_lse, lse)


def workspace(shapes: Shapes, device: torch.device) -> Callable[[], list[Tensor]]:
    """vLLM's shared scratch memory, which its memory profiling counts; memory of its own where vLLM has not set it up."""
    from vllm.v1.worker.workspace import current_workspace_manager, is_workspace_manager_initialized

    if not is_workspace_manager_initialized():
        return dense_workspace(shapes, device)

    def get() -> list[Tensor]:
        tensors: list[Tensor] = current_workspace_manager().get_simultaneous(*shapes.buffers())
        return tensors

    return get
