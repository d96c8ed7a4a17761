"""Which channels are outliers: whole RoPE pairs with the largest second moment, the same number in every head.

The second moment includes the mean, so a constant key bias counts (Qwen2.5's failure, which a variance does not see), and a
pair of channels keeps its second moment when RoPE turns it, so the choice holds at every position.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["half", "interleaved"]


def rope_pairs(head_dim: int, pairing: Pairing = "half", rotary_dim: int | None = None) -> Tensor:
    """The pairs of channels that RoPE turns together: [head_dim / 2, 2] int64.

    Args:
        head_dim: channels of a vector, even.
        pairing: "half" pairs i with i + rotary_dim / 2 (Llama, Qwen, Mistral, Phi, Gemma), "interleaved" 2i with 2i + 1 (GPT-J).
        rotary_dim: channels that RoPE turns, from the first on (default all); the others are paired with their neighbours.

    Raises:
        ValueError: an argument is not one of the above.
    """
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if head_dim % 2 or rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim must be even and from 0 to head_dim {head_dim}, got {rotary_dim}")
    if pairing not in ("half", "interleaved"):
        raise ValueError(f"pairing must be 'half' or 'interleaved', got {pairing!r}")
    turned = torch.arange(rotary_dim)
    turned = turned.view(2, -1).T if pairing == "half" else turned.view(-1, 2)
    return torch.cat((turned, torch.arange(rotary_dim, head_dim).view(-1, 2)))


def choose_outlier_channels(
    second_moment: Tensor, count: int, *, pairing: Pairing = "half", rotary_dim: int | None = None
) -> Tensor:
    """The `count` outlier channels of every KV head.

    Args:
        second_moment: [..., num_kv_heads, head_dim], E[k^2] per channel after RoPE (or before it: pairs keep their sum).
        count: channels per head, even (`KVFormat.channel_count`).
        pairing, rotary_dim: see `rope_pairs`.

    Returns:
        [..., num_kv_heads, count] int64, ascending in every head; of equal pairs the first.

    Raises:
        ValueError: count is odd or more than head_dim, or a second moment is negative or not finite.
    """
    head_dim = second_moment.shape[-1]
    if count % 2 or not 0 <= count <= head_dim:
        raise ValueError(f"count of outlier channels must be even and from 0 to {head_dim}, got {count}")
    if not (torch.isfinite(second_moment) & (second_moment >= 0)).all():
        raise ValueError(
            f"second moments must be finite and not negative, got {second_moment.min()} to {second_moment.max()}"
        )
    pairs = rope_pairs(head_dim, pairing, rotary_dim).to(second_moment.device)
    energy = second_moment.double()[..., pairs].sum(-1)
    best = energy.sort(dim=-1, descending=True, stable=True).indices[..., : count // 2]
    return pairs[best].flatten(-2).sort(-1).values
