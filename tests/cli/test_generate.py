"""`kvturbo generate` streams what transformers generates, and measures the cache."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from kvturbo.config import KVFormat
from tiny_model import CONTEXT, HEAD_DIM, KV_HEADS, LAYERS

PROMPT = "The square of 7 is"
SIXTEEN_BITS = LAYERS * KV_HEADS * HEAD_DIM * 4
KEYS = {
    "model", "format", "prompt", "text", "prompt_tokens", "new_tokens", "cache_tokens", "prompt_seconds",
    "tokens_per_second", "cache_bytes", "sixteen_bit_bytes",
}  # fmt: skip


def test_json_holds_text_counts_and_bytes(kvturbo, tiny_folder: Path) -> None:
    ran = kvturbo("generate", "--model", tiny_folder, "--prompt", PROMPT, "--max-new-tokens", 20, "--json")
    assert ran.code == 0
    data = ran.data
    assert set(data) == KEYS
    assert (data["prompt_tokens"], data["new_tokens"], data["cache_tokens"]) == (len(PROMPT) + 1, 20, len(PROMPT) + 20)
    assert data["tokens_per_second"] > 0
    assert data["sixteen_bit_bytes"] == SIXTEEN_BITS * data["cache_tokens"]
    pages = (
        -(-data["cache_tokens"] // 16) * 16 * LAYERS * KV_HEADS * KVFormat.from_name("k4v4", HEAD_DIM).bytes_per_token
    )
    assert pages <= data["cache_bytes"] < data["sixteen_bit_bytes"]


def test_the_stock_cache_takes_16_bits(kvturbo, tiny_folder: Path) -> None:
    data = kvturbo(
        "generate", "--model", tiny_folder, "--prompt", PROMPT, "--format", "16bit", "--max-new-tokens", 8, "--json"
    ).data
    assert data["cache_bytes"] == data["sixteen_bit_bytes"] == SIXTEEN_BITS * data["cache_tokens"]


def test_text_is_streamed_to_stdout_and_figures_to_stderr(kvturbo, tiny_folder: Path) -> None:
    arguments = ("generate", "--model", tiny_folder, "--prompt", PROMPT, "--max-new-tokens", 12)
    text = kvturbo(*arguments, "--json").data["text"]
    ran = kvturbo(*arguments)
    assert ran.out == text + "\n"
    assert "tokens/s" in ran.err and "measured" in ran.err and "16 bits take" in ran.err


def test_the_prompt_comes_from_a_file_or_from_stdin(
    kvturbo, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPT)
    arguments = ("generate", "--model", tiny_folder, "--max-new-tokens", 4, "--json")
    given = kvturbo(*arguments, "--prompt", PROMPT).data["text"]
    assert kvturbo(*arguments, "--file", tmp_path / "prompt.txt").data["text"] == given
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert kvturbo(*arguments).data["text"] == given


def test_sampling_depends_on_the_seed_alone(kvturbo, tiny_folder: Path) -> None:
    def text(seed: int) -> str:
        options = ("--temperature", 5, "--seed", seed, "--max-new-tokens", 16, "--json")
        return kvturbo("generate", "--model", tiny_folder, "--prompt", PROMPT, *options).data["text"]

    assert text(1) == text(1) != text(2)


def test_outlier_channels_are_chosen_from_the_weights(kvturbo, tiny_folder: Path) -> None:
    options = ("--format", "k4v4-o16", "--max-new-tokens", 8, "--json")
    data = kvturbo("generate", "--model", tiny_folder, "--prompt", PROMPT, *options).data
    assert data["new_tokens"] == 8 and data["cache_bytes"] < data["sixteen_bit_bytes"]


def test_windows_are_counted(kvturbo, tiny_folder: Path) -> None:
    def nbytes(recent: int) -> int:
        options = ("--recent", recent, "--sink", 0, "--max-new-tokens", 4, "--json")
        return kvturbo("generate", "--model", tiny_folder, "--prompt", PROMPT * 10, *options).data["cache_bytes"]

    assert nbytes(64) > nbytes(0)


class NoTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--format", "k5v5"), ("k5v5", "16bit", "k4v4", "turboquant")),
        (("--format", "k4v4-o32"), ("k4v4-o32", "head_dim 64", "k4v4-o16")),
        (("--max-new-tokens", 0), ("--max-new-tokens", "at least 1", "got 0")),
        (("--max-new-tokens", CONTEXT), (f"prompt of {len(PROMPT) + 1} tokens", f"context of {CONTEXT}")),
        (("--temperature", -1), ("--temperature", "got -1")),
        (("--temperature", "nan"), ("--temperature", "got nan")),
        (("--temperature", 1e-300), ("--temperature must be 0 or at least 1e-05", "got 1e-300")),
        (("--device", "meta"), ("device must be auto, cpu, cuda or cuda:N", "'meta'")),
        (("--seed", 2**64), ("--seed must be from -2**63 to 2**64 - 1", f"got {2**64}")),
        (("--recent", -5), ("recent", "-5")),
        (("--device", "abacus"), ("abacus", "cpu, cuda")),
        (("--dtype", "int4"), ("int4", "float32, bfloat16")),
        (("--model", "./nowhere"), ("./nowhere", "folder or a hub id")),
        (("--prompt", ""), ("prompt is empty",)),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    kvturbo, tiny_folder: Path, arguments: tuple, words: tuple[str, ...]
) -> None:
    ran = kvturbo("generate", "--model", tiny_folder, "--prompt", PROMPT, "--json", *arguments)
    assert (ran.code, ran.out) == (2, "")
    last = ran.err.splitlines()[-1]
    assert last.startswith("kvturbo generate: ") and all(word in last for word in words)


def test_a_prompt_must_be_there_and_readable(
    kvturbo, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "none.txt", tmp_path / "bytes"):
        ran = kvturbo("generate", "--model", tiny_folder, "--file", file)
        assert ran.code == 2 and f"can't read {file}" in ran.err
    monkeypatch.setattr(sys, "stdin", NoTerminal())
    ran = kvturbo("generate", "--model", tiny_folder)
    assert ran.code == 2 and "give --prompt TEXT, --file PATH" in ran.err


def save(folder: Path, tiny_folder: Path, model) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_folder / name).read_bytes())
    return folder


def test_a_model_without_full_attention_is_refused(kvturbo, tiny_folder: Path, tmp_path: Path) -> None:
    config = Gemma3TextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, sliding_window=16, layer_types=["sliding_attention"] * 2,
    )  # fmt: skip
    folder = save(tmp_path / "sliding", tiny_folder, Gemma3ForCausalLM(config))
    ran = kvturbo("generate", "--model", folder, "--prompt", PROMPT)
    assert ran.code == 2 and "no full_attention layer" in ran.err


def test_a_head_dim_that_no_format_has_is_refused(kvturbo, tiny_folder: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=40,
    )  # fmt: skip
    folder = save(tmp_path / "odd", tiny_folder, LlamaForCausalLM(config))
    ran = kvturbo("generate", "--model", folder, "--prompt", PROMPT)
    assert ran.code == 2 and "head_dim" in ran.err and "got 40" in ran.err and "128" in ran.err
