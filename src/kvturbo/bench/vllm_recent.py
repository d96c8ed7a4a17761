"""Rings of the newest tokens in benchmarks of engines: which caches have them, how an engine is told, what results say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvturbo.vllm import rings
from kvturbo.vllm.formats import cache_dtypes


def sizes_of(text: str) -> list[int]:
    """The sizes in a text such as `0,16`.

    Raises:
        ValueError: something else is in it.
    """
    known = {str(size): size for size in rings.SIZES}
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"recent must be among {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return [known[name] for name in names]


def asked(cache_dtype: str, sizes: Sequence[int | None]) -> Sequence[int | None]:
    """The sizes that engines with a cache dtype are told: all for packed caches, none for others."""
    return sizes if cache_dtype in cache_dtypes() else (None,)


def options(size: int | None) -> dict[str, Any]:
    """Arguments of vllm.LLM that ask for a size; none leave it to the engine."""
    return {} if size is None else {"additional_config": {"kvturbo": {"recent": size}}}


def measured(cache_dtype: str, size: int | None) -> int | None:
    """Tokens of a ring in an engine that was told a size or none: what results say. None for caches that are not packed."""
    if cache_dtype not in cache_dtypes():
        return None
    return rings.DEFAULT if size is None else size


def completed(values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Figures of a file, each with `recent`: those from before there were rings had none."""
    return [{"recent": 0 if value["kv_cache_dtype"] in cache_dtypes() else None} | dict(value) for value in values]
