"""The vLLM plugin: `--kv-cache-dtype turboquant` and `kvturbo_<format>`, on vLLM 0.33 and newer.

vLLM finds it by its entry point and calls `kvturbo.vllm.plugin.register`. Nothing of vLLM is changed: the names, the attention
backend and the page are registered through its public hooks.
"""
