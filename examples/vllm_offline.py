"""Generates text in vLLM with a packed cache, and says how many tokens fit.

python examples/vllm_offline.py --model Qwen/Qwen3-8B --prompt "A page of the cache holds"
"""

from __future__ import annotations

import argparse

from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face hub")
    parser.add_argument("--kv-cache-dtype", default="turboquant", help="docs/vllm.md lists them (default: turboquant)")
    parser.add_argument("--prompt", action="append", help="may be given several times")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--max-model-len", type=int, help="tokens of a sequence at most (default: the model's)")
    options = parser.parse_args()

    llm = LLM(model=options.model, kv_cache_dtype=options.kv_cache_dtype, max_model_len=options.max_model_len)
    prompts = options.prompt or ["The key-value cache of a language model"]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=options.new_tokens)):
        print(f"{output.prompt}{output.outputs[0].text}\n")
    cache = llm.llm_engine.vllm_config.cache_config
    print(f"{cache.num_gpu_blocks} blocks of {cache.block_size} tokens fit in the cache")


if __name__ == "__main__":
    main()
