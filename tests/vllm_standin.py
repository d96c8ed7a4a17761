"""vLLM's Python without a GPU: stands in for the driver and for vLLM's compiled half, so that its configuration, model classes,
cache specs and layouts are the real ones. Import it before anything of vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

COMPILED = (
    "vllm._C_stable_libtorch", "vllm._C", "vllm._moe_C_stable_libtorch", "vllm._moe_C", "vllm.cumem_allocator",
    "vllm.vllm_flash_attn._vllm_fa2_C", "vllm.vllm_flash_attn._vllm_fa3_C",
)  # fmt: skip
_FUSED = ("_and_mul", "rms_norm", "rotary", "gelu")


def installed() -> bool:
    """Whether the real package is there (this folder of tests has its name)."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


class _Operators:
    """vLLM's compiled operators, as far as models look them up when they are built; none of them runs."""

    def __getattr__(self, name: str) -> Any:
        if not any(part in name for part in _FUSED) and "support" not in name:
            raise AttributeError(name)

        def operator(*arguments: Any, **options: Any) -> bool:
            return False

        operator.default = operator  # type: ignore[attr-defined]
        return operator


def set_up() -> None:
    """Makes vLLM believe in a Hopper GPU and registers the plugin."""
    os.environ |= {"VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in COMPILED:
        sys.modules[name] = types.ModuleType(name)
    for namespace in ("_C", "_moe_C", "_C_cache_ops"):
        setattr(torch.ops, namespace, _Operators())
    import vllm.platforms as platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Hopper(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H200"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return 140 << 30

        @classmethod
        def current_device(cls) -> torch.device:
            return torch.device("meta")

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            return 132

    platforms._current_platform = Hopper()
    import vllm.v1.attention.backends.fa_utils as flash

    flash.get_flash_attn_version = lambda *arguments, **options: 3
    from kvturbo.vllm.plugin import register

    register()
    _one_process()


def _one_process() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, rendezvous, 0, "gloo")
        initialize_model_parallel(1, 1)


def config_of(model: dict[str, Any], cache_dtype: str = "turboquant", **options: Any) -> Any:
    """vLLM's whole configuration for a model that is nothing but a config.json."""
    from vllm.engine.arg_utils import EngineArgs

    folder = tempfile.mkdtemp()
    (Path(folder) / "config.json").write_text(json.dumps(model))
    defaults = {"load_format": "dummy", "dtype": "bfloat16", "max_model_len": 4096, "enforce_eager": True}
    arguments = defaults | options | {"model": folder, "kv_cache_dtype": cache_dtype, "skip_tokenizer_init": True}
    return EngineArgs(**arguments).create_engine_config()


def build(config: Any, device: str = "meta") -> Any:
    """The model, its weights on the meta device unless said otherwise; block sizes are settled as a worker does."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config):
        with set_default_torch_dtype(config.model_config.dtype), torch.device(device):
            model = initialize_model(config)
        current_platform.update_block_size_for_backend(config)
    return model
