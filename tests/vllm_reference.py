"""Greedy text of an engine beside that of transformers over the same cache, and beside its own by few; for `vllm/checks.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_engines import MODEL, NEW_TOKENS, NO_RINGS, Text, engine, first_differences, generate, prompts

TEXTS, TOKENS, FEW = 64, 512, 8
BOUND = 0.1
"""Paths that compute the same thing may part where the two best logits are closer than this."""


def written(
    texts: list[Any], fmt: str | None, dtype: str, new_tokens: int = NEW_TOKENS, device: str = "cuda"
) -> list[Text]:
    """Greedy tokens of transformers, whose prompts are read whole, and the gap between the two best logits at each.

    Args:
        texts: prompts of one length.
        fmt: of a packed cache without windows; None for 16 bits.
        dtype: of the model.
        new_tokens: of each text.
        device: where.
    """
    from transformers import AutoModelForCausalLM, DynamicCache

    from kvturbo.hf import TurboCache

    attention = "kvturbo" if fmt else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation=attention, dtype=getattr(torch, dtype)).to(
        device
    )
    past = TurboCache(model.config, fmt, recent=0, sink=0) if fmt else DynamicCache(config=model.config)
    step, tokens, gaps = torch.tensor([text["prompt_token_ids"] for text in texts], device=device), [], []
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(step, past_key_values=past, logits_to_keep=1).logits[:, -1].float()
            best = logits.topk(2).values
            step = logits.argmax(-1, keepdim=True)
            tokens.append(step)
            gaps.append(best[:, 0] - best[:, 1])
    return list(zip(torch.cat(tokens, 1).tolist(), torch.stack(gaps, 1).tolist(), strict=True))


def as_seldom(sixteen_bits: Mapping[str, list[float]], packed: Mapping[str, list[float]]) -> str:
    """Raises unless packed paths part only where 16-bit ones may, and no more often than these up to two standard deviations.

    Args:
        sixteen_bits, packed: gaps of the two best logits where texts part, by what is compared.
    """
    lines = [f"{name} {len(gaps)} (gap {max(gaps, default=0):.3f})" for name, gaps in (sixteen_bits | packed).items()]
    text = f"texts that part, and the largest gap there: {', '.join(lines)}"
    bound = max([BOUND, *(gap for gaps in sixteen_bits.values() for gap in gaps)])
    most = max(len(gaps) for gaps in sixteen_bits.values())
    for name, gaps in packed.items():
        assert max(gaps, default=0) <= bound, f"{name} part at a gap above {bound:.3f}: {text}"
        assert len(gaps) - most <= 2 * (len(gaps) + most) ** 0.5, f"{name} part more often than 16 bits: {text}"
    return text


def same_text_as_reference() -> str:
    """64 texts of the engine beside those of transformers over the same packed cache, and beside its own by 8: they part as seldom
    as 16-bit ones do. In fp16, where two logits are told apart by less than 0.1, and in bf16, where steps between logits are 0.125.
    """
    return "; ".join(f"{dtype}: {_beside_reference(dtype)}" for dtype in ("float16", "bfloat16"))


def _beside_reference(dtype: str) -> str:
    texts = prompts(TEXTS, TOKENS)

    def by(at_once: int, cache_dtype: str, **options: Any) -> list[Text]:
        options |= {"dtype": dtype, "max_num_seqs": at_once, "max_num_batched_tokens": TEXTS * TOKENS}
        with engine(cache_dtype, **options) as llm:
            return generate(llm, texts)

    def gaps(got: list[Text], wanted: list[Text]) -> list[float]:
        return [gap for _, gap in first_differences(got, wanted)]

    raw, packed, rings = by(TEXTS, "auto"), by(TEXTS, "turboquant", **NO_RINGS), by(TEXTS, "turboquant")
    return as_seldom(
        {
            "16 bits beside transformers": gaps(raw, written(texts, None, dtype)),
            "16 bits by 8": gaps(by(FEW, "auto"), raw),
        },
        {
            "packed beside transformers": gaps(packed, written(texts, "k4v4", dtype)),
            "packed by 8": gaps(by(FEW, "turboquant", **NO_RINGS), packed),
            "with rings by 8": gaps(by(FEW, "turboquant"), rings),
        },
    )
