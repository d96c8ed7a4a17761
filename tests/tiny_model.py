"""A Llama of a few thousand random weights with a byte tokenizer, saved as the embedded model is."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvturbo.eval.retrieval import RetrievalVocab

SPECIAL = ("pad", "bos", "eos", "key", "val", "ask", "hop", "mark", "copy", "end")
CONTEXT = 8192
LAYERS, KV_HEADS, HEAD_DIM = 2, 1, 64


def save_tiny_model(folder: Path) -> Path:
    """Writes weights, tokenizer, retrieval.json and heldout.txt; returns the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {f"<|{name}|>": i for i, name in enumerate(SPECIAL)}
    vocab |= {letter: len(SPECIAL) + i for i, letter in enumerate(alphabet)}
    _save_tokenizer(folder, vocab)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=CONTEXT, initializer_range=0.3,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    ids = {name: i for i, name in enumerate(SPECIAL) if name not in ("pad", "eos")}
    RetrievalVocab(**ids, first_content=len(SPECIAL), size=len(vocab)).save(folder)
    lines = [f"Line {i}: the square of {i} is {i * i}, its cube {i**3}.\n" for i in range(120)]
    (folder / "heldout.txt").write_text("".join(lines))
    return folder


def _save_tokenizer(folder: Path, vocab: dict[str, int]) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<|{name}|>" for name in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    fast.save_pretrained(folder)
