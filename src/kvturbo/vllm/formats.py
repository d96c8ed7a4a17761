"""The names that the plugin adds to `--kv-cache-dtype`, and the formats they stand for. Needs neither vLLM nor a GPU."""

from __future__ import annotations

from kvturbo.config import ALIASES, HEAD_DIMS, PRESETS, KVFormat, format_names

PREFIX = "kvturbo_"
DEFAULT = "turboquant"


def cache_dtypes() -> dict[str, str]:
    """Every `--kv-cache-dtype` of the plugin and its format's name; the default, `turboquant`, first.

    Formats without a decode kernel (`tq`, `qjl`) are not among them.
    """
    names = dict.fromkeys(name for head_dim in HEAD_DIMS for name in format_names(head_dim))
    fast = [name for name in names if name not in ALIASES and _has_kernels(name)]
    return {DEFAULT: ALIASES[DEFAULT]} | {PREFIX + name: name for name in fast}


def _has_kernels(name: str) -> bool:
    return PRESETS[name.partition("-o")[0]].kind not in ("split", "qjl")


def format_of(cache_dtype: str, head_size: int) -> KVFormat:
    """The format that a `--kv-cache-dtype` of the plugin stands for.

    Raises:
        ValueError: it is not one of the plugin's, or the format does not exist for the head size; the message lists what does.
    """
    names = cache_dtypes()
    if cache_dtype not in names:
        raise ValueError(f"kv_cache_dtype must be one of {', '.join(names)}, got {cache_dtype!r}")
    return KVFormat.from_name(names[cache_dtype], head_size)
