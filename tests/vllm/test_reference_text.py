"""What the check `same_text_as_reference` compares engines with, and when it fails; engines need a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kvturbo[hf]'")

from vllm_engines import MODEL, first_differences, prompts, same_text
from vllm_reference import FLOORS, as_rounding, as_sixteen_bit, written


@pytest.mark.parametrize("fmt", [None, "k4v4"])
def test_the_reference_writes_what_generate_writes(fmt: str | None) -> None:
    from transformers import AutoModelForCausalLM

    from kvturbo.hf import TurboCache

    texts = prompts(2, 40)
    model = AutoModelForCausalLM.from_pretrained(
        MODEL, attn_implementation="kvturbo" if fmt else "sdpa", dtype=torch.float32
    )
    ids = torch.tensor([text["prompt_token_ids"] for text in texts])
    past = TurboCache(model.config, fmt, recent=0, sink=0) if fmt else None
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
    wanted = model.generate(ids, past_key_values=past, do_sample=False, **options)
    got = written(texts, fmt, "float32", 4, "cpu")
    assert [tokens for tokens, _ in got] == wanted.sequences[:, 40:].tolist()
    best = torch.stack(wanted.logits, 1).topk(2).values
    torch.testing.assert_close(torch.tensor([gaps for _, gaps in got]), best[..., 0] - best[..., 1], atol=1e-4, rtol=0)


def test_paths_part_no_wider_and_no_more_often_than_by_rounding() -> None:
    rounding = [(3, 0.02), (9, 0.2)]
    text = as_rounding(rounding, {"a": [(5, 0.39)] * 8, "b": [], "c": [(0, 0.09)]}, 0.1)
    assert text.endswith("rounding 2 (gap 0.200), a 8 (gap 0.390), b 0 (gap 0.000), c 1 (gap 0.090)")
    as_rounding([], {"a": [(5, 0.1)]}, 0.1)  # ties are nobody's fault
    as_rounding(rounding, {"a": [(5, 0.41)]}, 0.1)
    with pytest.raises(AssertionError, match=r"a part at a gap above 0.400, 7 at one above 0.1 and 1 by rounding"):
        as_rounding(rounding, {"a": [(5, 0.41)] * 7}, 0.1)
    with pytest.raises(AssertionError, match=r"a part at a gap above 0.100"):
        as_rounding([], {"a": [(5, 0.11)]}, 0.1)
    with pytest.raises(AssertionError, match=r"b part more often than rounding alone: .*rounding 2 .*b 11"):
        as_rounding(rounding, {"a": [], "b": [(5, 0.01)] * 11}, 0.1)
    with pytest.raises(AssertionError, match=r"a: first tokens differ at gaps \[0.11\], above 0.1"):
        as_rounding(rounding, {"a": [(0, 0.11)]}, 0.1)


def test_a_packed_cache_parts_from_itself_at_ties_alone_and_no_more_often_than_16_bits() -> None:
    sixteen = {"by 8": [(3, 0.3), (9, 0.01)]}
    text = as_sixteen_bit({"by 8": [(5, 0.09)] * 2}, sixteen, 0.1)
    assert text.endswith("by 8: 2 (gap 0.090), 16 bits 2 (gap 0.300)")
    as_sixteen_bit({"by 8": [(5, 0.09)] * 8}, sixteen, 0.1)
    with pytest.raises(AssertionError, match=r"by 8: more texts part than in 16 bits: .*by 8: 11 "):
        as_sixteen_bit({"by 8": [(5, 0.09)] * 11}, sixteen, 0.1)
    with pytest.raises(AssertionError, match=r"by 8: texts part at a gap of 0.100, 0.1 or more"):
        as_sixteen_bit({"by 8": [(5, 0.1)]}, sixteen, 0.1)


def test_the_same_text_is_the_same_to_the_last_token() -> None:
    text = ([1, 2, 3], [0.5, 0.25, 0.0])
    assert same_text([text, text], [text, text]) == "2 texts the same"
    with pytest.raises(AssertionError, match=r"1 of 2 texts differ, at \(token, gap\) \[\(2, 0.0\)\]"):
        same_text([text, ([1, 2, 4], [])], [text, text])


def test_a_coarser_cache_is_told_from_rounding() -> None:
    texts = prompts(6, 40)
    exact, half = (written(texts, "k4v4", dtype, 12, "cpu", recent=16) for dtype in ("float32", "float16"))
    other = written(texts, "k2v2", "float16", 12, "cpu", recent=0)
    with pytest.raises(AssertionError, match="rounding"):
        as_rounding(first_differences(half, exact), {"k2v2": first_differences(other, half)}, FLOORS["float16"])
