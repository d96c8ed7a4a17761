"""Generates text with a packed KV cache, saves the cache, and goes on from the file.

python examples/hf_generate.py --model Qwen/Qwen2.5-0.5B-Instruct --prompt "A page of the cache holds"
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from kvturbo.hf import TurboCache


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--format", default="k4v4", help="what is stored per key and value (default: k4v4)")
    parser.add_argument("--prompt", default="The key-value cache of a language model")
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="kvturbo", dtype="auto").eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    past = TurboCache(model.config, options.format)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
    limits = {"max_new_tokens": options.new_tokens, "do_sample": False}
    ids = model.generate(**inputs, **limits, past_key_values=past, streamer=TextStreamer(tokenizer))
    print(
        f"\n{past.tokens} tokens in {past.nbytes()} bytes, {past.bytes_per_token:.0f} per token; "
        f"in 16 bits they would take {past.sixteen_bit_nbytes()} bytes"
    )

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "conversation.safetensors"
        past.save(path)
        resumed = TurboCache.load(path, model.config, device=device)
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, **limits, past_key_values=resumed, streamer=TextStreamer(tokenizer))


if __name__ == "__main__":
    main()
