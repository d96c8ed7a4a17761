"""The example runs as it stands."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf.models import VOCABULARY, tiny

EXAMPLE = Path(__file__).parents[2] / "examples" / "hf_generate.py"


def test_the_example_generates_saves_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(tmp_path)
    tiny("llama").save_pretrained(tmp_path)
    main = runpy.run_path(str(EXAMPLE))["main"]
    main(["--model", str(tmp_path), "--prompt", " ".join(f"w{i}" for i in range(2, 30)), "--new-tokens", "5"])
    printed = capsys.readouterr().out
    assert "32 tokens in" in printed and "in 16 bits they would take 32768 bytes" in printed
