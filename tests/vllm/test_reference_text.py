"""What the check `same_text_as_reference` compares engines with, and when it fails; engines need a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kvturbo[hf]'")

from vllm_engines import MODEL, prompts
from vllm_reference import as_seldom, written


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


def test_paths_part_no_wider_and_no_more_often_than_16_bits() -> None:
    text = as_seldom({"a": [0.02], "b": [0.0, 0.06]}, {"c": [0.01] * 8, "d": []})
    assert text.endswith("a 1 (gap 0.020), b 2 (gap 0.060), c 8 (gap 0.010), d 0 (gap 0.000)")
    as_seldom({"a": [0.125]}, {"c": [0.125]})  # as bf16 with itself
    with pytest.raises(AssertionError, match=r"c part at a gap above 0.100: .*c 1 \(gap 0.110\)"):
        as_seldom({"a": [0.02]}, {"c": [0.11]})
    with pytest.raises(AssertionError, match=r"c part more often than 16 bits: .*a 2 .*c 11"):
        as_seldom({"a": [0.02] * 2}, {"b": [], "c": [0.01] * 11})
