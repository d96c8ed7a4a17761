"""The caches that are measured: packed ones by format, baselines by name, and what each takes and reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvturbo.config import KVFormat, format_names
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.registry import BASELINES
from kvturbo.hf import TurboCache
from kvturbo.hf.geometry import full_attention_shapes, stock_layers, windows_of

REFERENCE = "16bit"


class PackedReadsError(RuntimeError):
    """A forward pass read another number of packed tokens than the cache holds: the figures would not be the cache's."""


@dataclass(frozen=True)
class CacheSpec:
    """A cache to measure.

    Attributes:
        name: a format or a registered baseline.
        recent, sink: windows of packed caches in 16 bits, in tokens; None: the format's default.
    """

    name: str
    recent: int | None = None
    sink: int | None = None

    @property
    def packed(self) -> bool:
        return self.name not in BASELINES.names()

    def new(self, loaded: LoadedModel) -> Any:
        """An empty cache for a model.

        Raises:
            ValueError: the format doesn't fit the model; the message lists what does.
        """
        if not self.packed:
            return BASELINES.get(self.name).new(loaded.model.config)
        return TurboCache(loaded.model.config, self.name, **self._options(loaded))

    def from_raw(self, loaded: LoadedModel, raw: Any) -> Any:
        """A cache with what a raw prefill holds; the raw cache is not changed."""
        if not self.packed:
            return BASELINES.get(self.name).from_raw(raw)
        return TurboCache.from_cache(loaded.model.config, raw, self.name, **self._options(loaded))

    def packed_tokens(self, config: Any, tokens: int) -> int:
        """Packed tokens, summed over layers, that a cache with one row of `tokens` tokens has to hold.

        Worked out from the model's layers and the windows alone, so that a cache can be checked against it.
        """
        layers = full_attention_shapes(config, stock_layers(config)).values()
        if not self.packed:
            codec = BASELINES.get(self.name).codec
            first, stop = (0, 0) if codec is None else codec.packed_range(tokens)
            return len(layers) * (stop - first)
        formats = (KVFormat.from_name(self.name, layer.head_dim) for layer in layers)
        return sum(max(0, tokens - sum(windows_of(fmt, self.sink, self.recent))) for fmt in formats)

    def _options(self, loaded: LoadedModel) -> dict[str, Any]:
        channels = loaded.outlier_channels(self.name)
        return {"recent": self.recent, "sink": self.sink, "outlier_channels": channels}


def check_name(name: str) -> str:
    """Returns the name of a cache.

    Raises:
        ValueError: it is neither a format nor a baseline; the message lists both.
    """
    names = BASELINES.names() + format_names(128)  # every format is offered for head_dim 128
    if name not in names:
        raise ValueError(f"unknown format {name!r}; valid formats: {', '.join(names)}")
    return name


@contextmanager
def attention_for(model: Any, cache: Any) -> Iterator[None]:
    """Lets the model attend to packed pages where the cache has them, with its own attention otherwise."""
    if not isinstance(cache, TurboCache):
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation("kvturbo")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
