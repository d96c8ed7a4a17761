"""Dense attention that returns its log-sum-exp, and the merge of such results, in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor

_SCORES_AT_ONCE = 1 << 20


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp32 (fp64 if q is fp64). A NaN or an infinity makes exactly the rows that see it NaN.

    Args:
        q: [n, num_q_heads, d].
        k, v: [m, num_kv_heads, d], num_q_heads a multiple of num_kv_heads.
        scale: factor on the scores.
        mask: [n, m] bool, True where the row sees the key.
        soft_cap: scores become soft_cap * tanh(score / soft_cap).
        sinks: [num_q_heads], a logit per head that takes part in the softmax without a value.

    Returns:
        out [n, num_q_heads, d] in the computing dtype, and lse [n, num_q_heads], natural logarithm, sinks included. A
        row that sees nothing gives 0 and -inf (with a sink: 0 and the sink).
    """
    rows = max(1, _SCORES_AT_ONCE // max(1, k.shape[0] * q.shape[1]))
    pieces = [
        _attend_rows(q[i : i + rows], k, v, scale, mask[i : i + rows], soft_cap, sinks)
        for i in range(0, max(1, q.shape[0]), rows)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([out for out, _ in pieces]), torch.cat([lse for _, lse in pieces])


def has_flash(q: Tensor) -> bool:
    """Whether `attend_flash` takes such queries."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def attend_flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """torch's flash attention on a GPU: every row sees every key, or, if causal, row i the keys up to i (n = m).

    A NaN may reach rows that do not see it.

    Args:
        q: [n, num_q_heads, d] bf16 or fp16.
        k, v: [m, num_kv_heads, d], num_q_heads a multiple of num_kv_heads.
        scale: factor on the scores.
        causal: see above.

    Returns:
        out [n, num_q_heads, d] fp32, rounded to q's dtype before, and lse [n, num_q_heads] fp32, natural logarithm.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out[0].transpose(0, 1).float(), lse[0].T


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor, soft_cap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    n, heads, _ = q.shape
    group = heads // k.shape[1]
    grouped = (q.to(dtype) * scale).unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)  # [Hkv, group * n, d]
    keys, values = k.to(dtype).transpose(0, 1), v.to(dtype).transpose(0, 1)  # [Hkv, m, d]
    scores = (grouped @ keys.transpose(1, 2)).unflatten(1, (group, n)).flatten(0, 1)  # [Hq, n, m]
    if not _all_finite(scores):  # an infinity would vanish in the soft cap or as a weight of 0
        scores = torch.where(scores.isfinite(), scores, torch.nan)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = torch.where(mask, scores, -torch.inf)
    top = scores.amax(-1, keepdim=True) if k.shape[0] else scores.new_full((heads, n, 1), -torch.inf)
    if sinks is not None:
        top = torch.maximum(top, sinks.to(dtype)[:, None, None].expand_as(top))
    shift = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(scores - shift)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.to(dtype)[:, None, None] - shift)
    out = _weighted_sum(weights, values, mask) / torch.where(total == 0, 1.0, total)
    lse = (shift + total.log()).squeeze(-1)
    return out.transpose(0, 1), lse.T


def _weighted_sum(weights: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Weights [Hq, n, m] times values [Hkv, m, d]: [Hq, n, d], NaN in the rows whose mask has a value that isn't finite."""
    n, group = mask.shape[0], weights.shape[0] // values.shape[0]
    grouped = weights.unflatten(0, (-1, group)).flatten(1, 2)
    out = grouped @ values
    if _all_finite(out):
        return out.unflatten(1, (group, n)).flatten(0, 1)
    bad = ~values.isfinite().all(-1)  # [Hkv, m]; selected away, since 0 * NaN is NaN
    out = grouped @ torch.where(bad.unsqueeze(-1), 0.0, values)
    sees_bad = (mask & bad.unsqueeze(1)).any(-1).repeat_interleave(group, 0)  # [Hq, n]
    return torch.where(sees_bad.unsqueeze(-1), torch.nan, out.unflatten(1, (group, n)).flatten(0, 1))


def _all_finite(x: Tensor) -> bool:
    """False if anything in x isn't finite; false too if the sum overflows, which costs the caller time only."""
    return bool(x.sum().isfinite())


def merge(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from the results over each.

    Args:
        parts: (out [n, num_q_heads, d], lse [n, num_q_heads]) pairs; sinks in at most one of them.

    Returns:
        out and lse of the union, fp32 (fp64 if the parts are).
    """
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    top = lses.amax(0)
    shift = torch.where(top == -torch.inf, 0.0, top)
    weights = torch.exp(lses - shift)  # [parts, n, heads]
    total = weights.sum(0)
    stacked = torch.stack([out.to(lses.dtype) for out, _ in parts])
    seen = (lses != -torch.inf).unsqueeze(-1)  # by lse: a NaN must not vanish because its weight underflows to 0
    out = (torch.where(seen, stacked, 0.0) * weights.unsqueeze(-1)).sum(0)
    unseen = total == 0
    return out / torch.where(unseen, 1.0, total).unsqueeze(-1), torch.where(unseen, -torch.inf, shift + total.log())


def first_seen(first: int, window: int | None, seq_start: int) -> int:
    """The first position that a query at `first`, or a later one, may see; arguments as for `causal_mask`."""
    return max(seq_start, 0 if window is None else first - window + 1, 0)


def causal_mask(
    n: int,
    start: int,
    stop: int,
    first: int,
    *,
    window: int | None = None,
    seq_start: int = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Which keys at positions start..stop-1 the queries at first..first+n-1 see: [n, stop - start] bool.

    Args:
        n: number of queries.
        start, stop: positions of the keys.
        first: position of the first query.
        window: a query at p sees positions above p - window only (default: all).
        seq_start: positions below it are padding.
    """
    query = torch.arange(first, first + n, device=device)[:, None]
    key = torch.arange(start, stop, device=device)[None, :]
    mask = (key <= query) & (key >= seq_start)
    return mask & (key > query - window) if window is not None else mask
