"""Greedy text and distributions of an engine beside those of transformers over the same cache, and text beside its own by few; for
`vllm/checks.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_engines import (
    CHUNK,
    MODEL,
    NEW_TOKENS,
    NO_RINGS,
    Differences,
    Text,
    engine,
    first_differences,
    generate,
    prompts,
)

TEXTS, TOKENS, FEW = 64, 512, 8
CACHES: dict[str, tuple[str | None, int, dict[str, Any]]] = {
    "16 bits": (None, 0, {"cache_dtype": "auto"}),
    "packed": ("k4v4", 0, {"cache_dtype": "turboquant", **NO_RINGS}),
    "with rings": ("k4v4", 16, {"cache_dtype": "turboquant"}),
}
"""What transformers and an engine are told, for the same cache: format and newest tokens that are raw, and options."""
FLOORS = {"float16": 0.1, "bfloat16": 0.13}
"""Gaps of the two best logits below which rounding may change a token, whatever is read: a bf16 logit between 16 and 32 has steps
of 0.125."""
ENGINES: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, FEW, TEXTS]}},
}
"""Engines whose texts by few are held to their own with all at once."""


def written(
    texts: list[Any],
    fmt: str | None,
    dtype: str,
    new_tokens: int = NEW_TOKENS,
    device: str = "cuda",
    recent: int = 0,
) -> list[Text]:
    """Greedy tokens of transformers, whose prompts are read whole, and the gap between the two best logits at each.

    Args:
        texts: prompts of one length.
        fmt: of a packed cache; None for one of the model's dtype.
        dtype: of the model.
        new_tokens: of each text.
        device: where.
        recent: newest tokens that a packed cache keeps raw.
    """
    from transformers import AutoModelForCausalLM, DynamicCache

    from kvturbo.hf import TurboCache

    attention = "kvturbo" if fmt else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation=attention, dtype=getattr(torch, dtype)).to(
        device
    )
    past = TurboCache(model.config, fmt, recent=recent, sink=0) if fmt else DynamicCache(config=model.config)
    step, tokens, gaps = torch.tensor([text["prompt_token_ids"] for text in texts], device=device), [], []
    with torch.no_grad():
        for _ in range(new_tokens):
            logits = model(step, past_key_values=past, logits_to_keep=1).logits[:, -1].float()
            best = logits.topk(2).values
            step = logits.argmax(-1, keepdim=True)
            tokens.append(step)
            gaps.append(best[:, 0] - best[:, 1])
    return list(zip(torch.cat(tokens, 1).tolist(), torch.stack(gaps, 1).tolist(), strict=True))


def as_rounding(rounding: Differences, paths: Mapping[str, Differences], floor: float) -> str:
    """Raises unless paths that compute the same thing part as rounding alone makes texts part: no more often, up to two standard
    deviations, and at gaps of no more than twice the largest there or, if rounding goes beyond the floor at all, no more often
    beyond it (the largest of a few gaps says little). The first token, for which no cache was read, differs only at gaps below
    the floor.

    Args:
        rounding: where transformers part from themselves in float32, over the same cache.
        paths: where others do, by what is compared, of as many texts.
        floor: gap of the two best logits below which any token may differ.
    """
    lines = [f"{name} {_told(found)}" for name, found in {"rounding": rounding, **paths}.items()]
    text = f"texts that part, and the largest gap there: {', '.join(lines)}"
    bound = max(floor, 2 * _largest(rounding))
    usual = _wide(rounding, floor)
    for name, found in paths.items():
        first = [gap for place, gap in found if place == 0]
        assert max(first, default=0) <= floor, f"{name}: first tokens differ at gaps {first}, above {floor}: {text}"
        wide = _wide(found, floor)
        assert _largest(found) <= bound or (usual and _as_seldom(wide, usual)), (
            f"{name} part at a gap above {bound:.3f}, {wide} at one above {floor} and {usual} by rounding: {text}"
        )
        assert _as_seldom(len(found), len(rounding)), f"{name} part more often than rounding alone: {text}"
    return text


def _as_seldom(count: int, usual: int) -> bool:
    """Whether a count is no larger than another of as many texts, up to two standard deviations."""
    return count - usual <= 2 * (count + usual) ** 0.5


def _wide(differences: Differences, floor: float) -> int:
    return sum(gap > floor for _, gap in differences)


def _told(differences: Differences) -> str:
    return f"{len(differences)} (gap {_largest(differences):.3f})"


def _largest(differences: Differences) -> float:
    return max((gap for _, gap in differences), default=0)


def as_sixteen_bit(packed: Mapping[str, Differences], sixteen_bit: Mapping[str, Differences], floor: float) -> str:
    """Raises unless texts of a packed cache part from themselves at ties alone, and no more often than a 16-bit cache's do (up to
    two standard deviations).

    Args:
        packed, sixteen_bit: where texts part, by engine; as many texts of each.
        floor: gap of the two best logits below which any token may differ.
    """
    lines = [f"{name}: {_told(found)}, 16 bits {_told(sixteen_bit[name])}" for name, found in packed.items()]
    text = "; ".join(lines)
    for name, found in packed.items():
        assert _largest(found) < floor, f"{name}: texts part at a gap of {_largest(found):.3f}, {floor} or more: {text}"
        assert _as_seldom(len(found), len(sixteen_bit[name])), f"{name}: more texts part than in 16 bits: {text}"
    return f"texts that part from themselves, and the largest gap there: {text}"


def same_text_across_batch_sizes(dtype: str) -> str:
    """64 texts of a packed cache, all at once and by 8: they part from themselves at ties, as seldom as in 16 bits. How often those
    of engines with other kernels part is told.
    """
    texts, parted, apart = prompts(TEXTS, TOKENS), {}, {}
    for cache_dtype in ("turboquant", "auto"):
        options = {name: {"cache_dtype": cache_dtype, "dtype": dtype, **more} for name, more in ENGINES.items()}
        whole = {name: _by_engine(texts, **more) for name, more in options.items()}
        parted[cache_dtype] = {
            name: first_differences(_by_engine(texts, max_num_seqs=FEW, **more), whole[name])
            for name, more in options.items()
        }
        apart[cache_dtype] = _told(first_differences(whole["compiled"], whole["eager"]))
    text = as_sixteen_bit(parted["turboquant"], parted["auto"], FLOORS[dtype])
    return f"{text}; compiled beside eager: {apart['turboquant']}, 16 bits {apart['auto']}"


def _by_engine(texts: list[Any], **options: Any) -> list[Text]:
    """What an engine writes that has all texts at once and reads prompts whole, but for its options."""
    with engine(**{"max_num_seqs": TEXTS, "max_num_batched_tokens": TEXTS * TOKENS} | options) as llm:
        return generate(llm, texts)


def reference_path() -> str:
    """Teacher-forced, in the same chunks: the distribution of every token, against transformers over the same packed cache."""
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    from kvturbo.hf import TurboCache

    prompt = prompts(1)
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, detokenize=False)
    with engine(max_num_batched_tokens=CHUNK, max_num_seqs=1, max_logprobs=-1) as llm:
        output = llm.generate(prompt, parameters, use_tqdm=False)[0]
    rows = [[entry[token].logprob for token in range(1024)] for entry in output.prompt_logprobs[1:]]
    got = torch.tensor(rows, dtype=torch.float64)

    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="kvturbo", dtype=torch.bfloat16).cuda()
    past = TurboCache(model.config, "k4v4")
    ids = torch.tensor([prompt[0]["prompt_token_ids"]], device="cuda")
    with torch.no_grad():
        logits = [model(chunk, past_key_values=past).logits[0] for chunk in ids.split(CHUNK, 1)]
    wanted = torch.cat(logits)[:-1].double().log_softmax(-1).cpu()
    divergence = (wanted.exp() * (wanted - got)).sum(-1)
    assert divergence.mean() < 1e-3, f"KL {divergence.mean():.2e}"
    return f"KL {divergence.mean():.2e}, of the worst token {divergence.max():.2e}"


def same_text_as_reference() -> str:
    """64 texts of the engine beside those of transformers over the same cache, and beside its own by 8: they part as transformers
    do from themselves in float32. A cache that rounds hard makes much of little: a difference in the last bit turns a code into its
    neighbour, which the next layer sees as all of that code's error. So every cache is held to what it does itself: 16 bits,
    packed, and packed with the newest tokens raw, where it is least.
    """
    texts = prompts(TEXTS, TOKENS)
    exact = {name: written(texts, fmt, "float32", recent=recent) for name, (fmt, recent, _) in CACHES.items()}
    lines = [
        f"{dtype}, {name}: {_beside_reference(dtype, floor, name, texts, exact[name])}"
        for dtype, floor in FLOORS.items()
        for name in CACHES
    ]
    return "; ".join(lines)


def _beside_reference(dtype: str, floor: float, name: str, texts: list[Any], exact: list[Text]) -> str:
    fmt, recent, cache = CACHES[name]
    cache = cache | {"dtype": dtype}
    reference, got = written(texts, fmt, dtype, recent=recent), _by_engine(texts, **cache)
    few = _by_engine(texts, **cache, max_num_seqs=FEW)
    paths = {"beside transformers": first_differences(got, reference), "by 8": first_differences(few, got)}
    return as_rounding(first_differences(reference, exact), paths, floor)
