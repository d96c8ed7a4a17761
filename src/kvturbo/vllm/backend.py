"""The attention backend: what it takes, what a block of pages looks like, and which classes do the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVQuantMode

from kvturbo.config import HEAD_DIMS, PAGE_SIZE, PAGE_SIZES
from kvturbo.vllm.formats import cache_dtypes, format_of

CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
"""KV connectors that copy whole blocks, whatever is in them."""

_ADVICE = {
    "use_mla": "multi-head latent attention has a compressed cache of its own; use --kv-cache-dtype fp8 or auto",
    "use_sparse": "sparse attention reads its own kind of cache; use --kv-cache-dtype auto",
    "use_mm_prefix": "bidirectional attention inside a prompt is not supported; use --kv-cache-dtype fp8 or auto",
    "use_per_head_quant_scales": "the checkpoint brings scales for an fp8 cache; use --kv-cache-dtype fp8",
    "use_non_causal": "non-causal attention is not supported; use --kv-cache-dtype auto",
    "use_batch_invariant": "results depend on the batch; unset VLLM_BATCH_INVARIANT or use --kv-cache-dtype auto",
    "use_pcp": "prefill context parallelism is not supported; use tensor parallelism",
    "use_dcp": "decode context parallelism is not supported; use tensor parallelism",
    "use_adaptive_verification": "adaptive verification is not supported; turn it off in the speculative config",
    "use_rswa": "reference sliding-window attention is not supported; use --kv-cache-dtype auto",
}
"""Options of vLLM's selection that the backend does not take, and what to use instead."""


class PackedBackend(AttentionBackend):
    """Attention over packed pages; one subclass per cache dtype, since vLLM asks a class, not a layer, for a block's size.

    Attributes:
        cache_dtype: the `--kv-cache-dtype` that it serves.
    """

    cache_dtype: ClassVar[str]
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    forward_includes_kv_cache_update = False
    accept_output_buffer = True

    @staticmethod
    def get_name() -> str:
        """The registry member it is reached by: layers look their backend's name up in the registry."""
        return "TURBOQUANT"

    @staticmethod
    def get_impl_cls() -> type:
        from kvturbo.vllm.attention import PackedAttention

        return PackedAttention

    @staticmethod
    def get_builder_cls() -> type:
        from kvturbo.vllm.metadata import PackedMetadataBuilder

        return PackedMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """Tokens of a block as the kernels see it: the page sizes. vLLM splits larger blocks into these."""
        return list(PAGE_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        """Tokens of a block where the user gives no `--block-size`."""
        return max(default_block_size, PAGE_SIZE)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Whether vLLM may settle on a size by itself, for layers of several backends: whole pages, the default's or larger.
        Sizes that the user gives are looked at by `validate_configuration`.
        """
        return block_size is None or (block_size >= PAGE_SIZE and not block_size % min(PAGE_SIZES))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All heads of a block after one another, each head's tokens in one run of bytes: a page per head."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The spec with the bytes of a packed token; a spec of 16 bits is left as it is (layers that are not packed).

        Raises:
            ValueError: the format does not exist for the spec's head size.
        """
        if spec.kv_quant_mode == KVQuantMode.NONE or spec.state_content_bytes is not None:
            return spec
        return replace(spec, state_content_bytes=format_of(cls.cache_dtype, spec.head_size).bytes_per_token)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # the kernel is picked by the host's count of queries

    @classmethod
    def validate_configuration(cls, **configuration: Any) -> list[str]:
        """Why a layer can't be packed, each reason with what to use instead; none if it can. Arguments as vLLM gives them."""
        reasons = [advice for option, advice in _ADVICE.items() if configuration.get(option)]
        reasons += _shape_reasons(configuration, cls.cache_dtype)
        connector = _connector()
        if configuration.get("use_kv_connector") and connector not in CONNECTORS:
            reasons.append(
                f"KV connector {connector} does not know packed pages; use one of {', '.join(CONNECTORS)}, "
                "such as --kv-offloading-size, or --kv-cache-dtype auto"
            )
        return [f"kvturbo: {reason}" for reason in reasons]


def _shape_reasons(configuration: dict[str, Any], cache_dtype: str) -> list[str]:
    head_size, dtype, block_size = (configuration[name] for name in ("head_size", "dtype", "block_size"))
    reasons = []
    try:
        format_of(cache_dtype, head_size)
    except ValueError as error:
        choices = ", ".join(map(str, HEAD_DIMS))
        reasons.append(f"{error}; use --kv-cache-dtype fp8 or auto where head_dim is none of {choices}")
    if dtype not in PackedBackend.supported_dtypes:
        reasons.append(f"dtype {dtype} is not supported; use --dtype bfloat16 or float16")
    if block_size is not None and block_size % min(PAGE_SIZES):
        reasons.append(f"--block-size must be a multiple of {min(PAGE_SIZES)}, got {block_size}")
    if configuration["device_capability"] < (8, 0):
        reasons.append("it needs a GPU of compute capability 8.0 or newer; use --kv-cache-dtype auto")
    if configuration["attn_type"] != "decoder":
        reasons.append(f"{configuration['attn_type']} attention is not supported; use --kv-cache-dtype auto")
    return reasons


def _connector() -> str | None:
    config = get_current_vllm_config_or_none()
    transfer = None if config is None else config.kv_transfer_config
    return None if transfer is None else transfer.kv_connector


def _backend_class(cache_dtype: str) -> type[PackedBackend]:
    name = "Packed_" + cache_dtype.replace("-", "_")
    return type(name, (PackedBackend,), {"cache_dtype": cache_dtype, "__module__": __name__, "__qualname__": name})


BACKENDS: dict[str, type[PackedBackend]] = {cache_dtype: _backend_class(cache_dtype) for cache_dtype in cache_dtypes()}
"""The backend class of every cache dtype; vLLM finds them by name in this module."""
globals().update({backend.__name__: backend for backend in BACKENDS.values()})
