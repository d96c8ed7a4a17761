"""TurboCache: a transformers cache whose full-attention layers are packed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from kvturbo.config import PAGE_SIZE
from kvturbo.guard.plan import Plan, read_plan
from kvturbo.hf.geometry import (
    SIXTEEN_BIT,
    Formats,
    PackedSpec,
    Window,
    check_plan,
    check_window,
    choose_formats,
    full_attention_shapes,
    stock_layers,
    window_of_layer,
    windows_of,
)
from kvturbo.hf.group import Group
from kvturbo.hf.layer import PackedLayer
from kvturbo.hf.state import restore, saved_channels, saved_options, shapes_of, to_state
from kvturbo.hf.store import PackedStore
from kvturbo.storage import read_file, write_file


class TurboCache(Cache):
    """A cache for decoder-only models: full-attention layers in packed pages, every other layer as in a DynamicCache.

    The pages hold the only copy of the packed layers' keys and values, apart from two windows in 16 bits. They grow on
    demand. Use it with the attention implementation `kvturbo`, which reads the pages:

        model.set_attn_implementation("kvturbo")
        past = TurboCache(model.config, "k4v4")
        model.generate(**inputs, past_key_values=past)

    Args:
        config: the model's configuration (`model.config` itself: it says which attention implementation is on).
        format: a format's name for all layers, or a mapping from layer index or a list over all layers; `16bit` in it
            leaves a layer as it is. A list has None for layers that are not full attention. Default: the plan's, else `k4v4`.
        plan: formats, windows and outlier channels of every layer, or the file that `kvturbo check` and `kvturbo plan` write.
            What is given beside it counts instead of the plan's.
        recent: the last tokens of each row that stay in 16 bits, in all layers or by layer index. Default: 0 where keys have
            4 bits or more, else 128.
        sink: the first tokens of each row that stay in 16 bits. Default: 0 where keys have 4 bits or more, else 4.
        page_size: tokens per page, 16, 32 or 64.
        max_tokens: tokens per row that the pages are made for, once and for all; None: pages grow on demand.
        outlier_channels: layer index -> [num_kv_heads, channels] int64; needed by the `-o` formats, see `kvturbo.hf.outliers`.
        seed: of the rotation.
        backend: of the operations, "auto" or one of `kvturbo.ops.backends.BACKENDS`.

    Raises:
        ValueError: the model has no full-attention layer, cross attention, latent attention or an unsupported head_dim; a
            format, a size or a window is not valid; the plan is for another model; or outlier channels are missing. Nothing
            has been allocated then.
        FileNotFoundError: there is no such plan.
    """

    def __init__(
        self,
        config: Any,
        format: Formats | None = None,
        *,
        plan: Plan | str | Path | None = None,
        recent: Window = None,
        sink: Window = None,
        page_size: int = PAGE_SIZE,
        max_tokens: int | None = None,
        outlier_channels: Mapping[int, Tensor] | None = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        layers = stock_layers(config)
        self.shapes = full_attention_shapes(config, layers)
        if plan is not None:
            plan = plan if isinstance(plan, Plan) else read_plan(plan)
            check_plan(plan, self.shapes)
            sink = {i: layer.sink for i, layer in plan.layers.items()} if sink is None else sink
            recent = {i: layer.recent for i, layer in plan.layers.items()} if recent is None else recent
        check_window("sink", sink, self.shapes)
        check_window("recent", recent, self.shapes)
        format = (plan.formats if plan else "k4v4") if format is None else format
        self.options = {"recent": recent, "sink": sink, "page_size": page_size, "max_tokens": max_tokens, "seed": seed}
        self.formats = choose_formats(format, self.shapes, len(layers), seed)
        if plan is not None and outlier_channels is None:
            outlier_channels = plan.own_channels({i: fmt.name for i, fmt in self.formats.items()})
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        members: dict[PackedSpec, list[int]] = {}
        for i, fmt in self.formats.items():
            fmt.page_bytes(page_size)
            windows = windows_of(fmt, window_of_layer(sink, i), window_of_layer(recent, i))
            spec = PackedSpec(fmt, self.shapes[i].num_kv_heads, *windows)
            members.setdefault(spec, []).append(i)
        groups = [
            Group(
                spec,
                indices,
                page_size=page_size,
                max_tokens=max_tokens,
                outlier_channels=_stack_channels(outlier_channels, spec, indices),
                backend=backend,
            )
            for spec, indices in members.items()
        ]
        self.store = PackedStore(groups)
        self.config = text = config.get_text_config(decoder=True)
        for group in groups:
            for position, i in enumerate(group.layers):
                layers[i] = PackedLayer(self.store, group, position, i, self.shapes[i], text)
        super().__init__(layers=layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> TurboCache:
        """A cache of its own for the same model: the configuration says which attention is on, so it is not copied."""
        memo[id(self.config)] = self.config
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    @classmethod
    def from_cache(
        cls,
        config: Any,
        cache: Cache,
        format: Formats | None = None,
        *,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> TurboCache:
        """Packs what a raw cache holds, such as a DynamicCache after a prefill. The source is not changed.

        Args:
            config: the model's configuration.
            cache: the source; its full-attention layers must hold every token.
            format: as for the constructor.
            attention_mask: [batch, tokens], 0 for padding, which is then left out; None: no padding.
            options: the constructor's other arguments.

        Raises:
            ValueError: the source has other layers than the model or holds nothing, or as the constructor.
        """
        packed = cls(config, format, **options)
        if len(cache.layers) != len(packed.layers):
            raise ValueError(f"the cache has {len(cache.layers)} layers, the model has {len(packed.layers)}")
        mask = None if attention_mask is None else attention_mask.bool()
        for i, (source, target) in enumerate(zip(cache.layers, packed.layers, strict=True)):
            if not isinstance(target, PackedLayer):
                packed.layers[i] = _copied(source, target)
                continue
            if source.get_seq_length() == 0 or getattr(source, "keys", None) is None:
                raise ValueError(f"layer {i} of the cache holds no keys and values ({type(source).__name__})")
            target.lazy_initialization(source.keys, source.values)
            target.begin(source.keys, mask)
            target.finish(source.keys, source.values)
        for group in packed.store.groups:
            group.step = None  # its index tensors are as long as the prompt
        return packed

    def save(self, path: str | Path) -> None:
        """Writes everything that the cache holds to a safetensors file, whole or not at all.

        Args:
            path: the file, replaced if it exists.
        """
        write_file(Path(path), "TurboCache", *to_state(self))

    @classmethod
    def load(
        cls, path: str | Path, config: Any, *, device: torch.device | str = "cpu", backend: str = "auto"
    ) -> TurboCache:
        """Reads a file that `save` wrote. Format, windows and sizes are the saved cache's.

        Args:
            path: the file.
            config: the configuration of the model that the cache is for.
            device: where the cache goes.
            backend: as for the constructor.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, altered, of another version, not a saved TurboCache, or for a model with
                other layers.
        """
        tensors, header = read_file(Path(path), "TurboCache")
        layers = full_attention_shapes(config, stock_layers(config))
        formats = {i: header["formats"].get(str(i), SIXTEEN_BIT) for i in layers}
        channels = saved_channels(tensors, header)
        cache = cls(config, formats, outlier_channels=channels, backend=backend, **saved_options(header))
        if shapes_of(cache) != header["shapes"]:
            raise ValueError(
                f"{path} is for a model with layers {header['shapes']}, the configuration has {shapes_of(cache)}"
            )
        restore(cache, tensors, header, torch.device(device))
        return cache

    @property
    def packed_tokens(self) -> int:
        """Packed tokens now held, summed over rows and packed layers."""
        return sum(len(group.layers) * sum(group.lengths()) for group in self.store.groups)

    @property
    def packed_tokens_read(self) -> int:
        """Packed tokens of earlier steps that attention has read so far, summed over rows, layers and forward passes."""
        return self.store.packed_tokens_read

    @property
    def tokens(self) -> int:
        """Tokens held, summed over rows, padding not counted."""
        if self.store.groups:
            return sum(self.store.lengths())
        layer = self.layers[next(iter(self.shapes))]
        return layer.keys.shape[0] * layer.get_seq_length() if layer.get_seq_length() else 0

    @property
    def bytes_used(self) -> int:
        """Bytes of what full-attention layers hold: pages in use, windows, layers kept in 16 bits."""
        return sum(group.bytes_used() for group in self.store.groups) + sum(
            _storage_bytes(self.layers[i]) for i in self.shapes if i not in self.formats
        )

    @property
    def bytes_per_token(self) -> float:
        """`bytes_used` per token, all full-attention layers together; 0 for an empty cache."""
        return self.bytes_used / self.tokens if self.tokens else 0.0

    def sixteen_bit_nbytes(self) -> int:
        """Bytes that the full-attention layers' tokens would take in 16 bits."""
        return self.tokens * sum(shape.sixteen_bit_bytes for shape in self.shapes.values())

    def nbytes(self) -> int:
        """Bytes allocated now by all layers: pages (free ones too), windows, index tensors, and the stock layers' states."""
        return self.store.nbytes() + sum(_storage_bytes(layer) for layer in self._stock())

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` tokens of every row away.

        Args:
            tokens_to_remove: 0 or negative, as in transformers.

        Raises:
            ValueError: it is positive.
            RuntimeError: a sliding-window layer no longer has what comes before (see transformers).
        """
        tokens_to_remove = int(tokens_to_remove)  # generate of transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of tokens, got {tokens_to_remove}")
        for layer in self._stock():
            layer.crop(tokens_to_remove)
        self.store.crop(-tokens_to_remove)
        self._follow()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; pages are shared until one of the rows writes to them."""
        for layer in self._stock():
            layer.reorder_cache(beam_idx)
        self.store.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after another."""
        for layer in self._stock():
            layer.batch_repeat_interleave(repeats)
        self.store.select([row for row in range(self.store.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given rows (indices, or a bool mask)."""
        for layer in self._stock():
            layer.batch_select_indices(indices)
        self.store.select(torch.arange(self.store.batch)[indices.cpu()].tolist())

    def reset(self) -> None:
        """Empties the cache and gives its pages back."""
        for layer in self._stock():
            layer.reset()
        self.store.reset()
        self._follow()

    def _stock(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, PackedLayer)]

    def _follow(self) -> None:
        for layer in self.layers:
            if isinstance(layer, PackedLayer):
                layer.length = self.store.rows.columns


def _stack_channels(channels: Mapping[int, Tensor] | None, spec: PackedSpec, layers: list[int]) -> Tensor | None:
    if not spec.fmt.channel_count:
        return None
    missing = [i for i in layers if channels is None or i not in channels]
    if not missing:
        assert channels is not None
        return torch.stack([channels[i].cpu() for i in layers])
    if spec.fmt.outliers:
        raise ValueError(
            f"format {spec.fmt.name!r} needs outlier_channels for layers {missing}; get them from "
            "kvturbo.hf.outliers.channels_from_weights(model, format) or channels_from_text(model, input_ids, format)"
        )
    return None


def _storage_bytes(layer: Any) -> int:
    """Bytes of all tensors that a stock layer holds."""
    found: dict[int, int] = {}
    pending = list(vars(layer).values())
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
    return sum(found.values())


def _copied(source: Any, target: Any) -> Any:
    """A stock layer with what another one holds; a window is cut out of a layer that holds everything."""
    if type(source) is type(target) or not isinstance(target, DynamicLayer) or type(source) is not DynamicLayer:
        return copy.deepcopy(source)
    if source.get_seq_length():
        target.update(source.keys.clone(), source.values.clone())
    return target
