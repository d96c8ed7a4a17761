"""A TurboCache as named tensors and a header, and back: what its files hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvturbo.cache import PagedKVCache
from kvturbo.hf.group import Group
from kvturbo.hf.layer import PackedLayer
from kvturbo.hf.windows import Fill, WindowTensors

if TYPE_CHECKING:
    from kvturbo.hf.cache import TurboCache


def to_state(cache: TurboCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Host tensors by name, and a header that JSON can hold."""
    store = cache.store
    tensors: dict[str, Tensor] = {} if store.rows.stored is None else {"stored": store.rows.stored}
    groups = []
    for i, group in enumerate(store.groups):
        own, header = _group_state(group)
        tensors |= {f"group{i}.{name}": tensor for name, tensor in own.items()}
        groups.append(header)
    stock = {}
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, PackedLayer):
            own, stock[str(i)] = _layer_state(layer)
            tensors |= {f"layer{i}.{name}": tensor for name, tensor in own.items()}
    header = {"formats": {str(i): fmt.name for i, fmt in cache.formats.items()}, "options": cache.options}
    header |= {"shapes": shapes_of(cache), "batch": store.batch, "columns": store.rows.columns}
    return tensors, header | {"groups": groups, "stock": stock}


def restore(cache: TurboCache, tensors: dict[str, Tensor], header: dict[str, Any], device: torch.device) -> None:
    """Puts what `to_state` returned into an empty cache of the same layers and formats."""
    store = cache.store
    store.batch, store.rows.columns = header["batch"], header["columns"]
    store.rows.stored = tensors.get("stored")
    for i, (group, saved) in enumerate(zip(store.groups, header["groups"], strict=True)):
        _restore_group(group, _under(f"group{i}.", tensors), saved, device)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, PackedLayer):
            layer.length = store.rows.columns
        else:
            _restore_layer(layer, _under(f"layer{i}.", tensors), header["stock"][str(i)], device)


def shapes_of(cache: TurboCache) -> dict[str, list[Any]]:
    """What a file's model must have in common with the one it is loaded for: the kind and shape of every layer."""
    shapes: dict[str, list[Any]] = {str(i): [type(layer).__name__] for i, layer in enumerate(cache.layers)}
    for i, shape in cache.shapes.items():
        shapes[str(i)] += [shape.num_kv_heads, shape.head_dim]
    return shapes


def saved_options(header: dict[str, Any]) -> dict[str, Any]:
    """The constructor's sizes; windows by layer have their indices back, which JSON holds as text."""
    options = dict(header["options"])
    for name in ("sink", "recent"):
        if isinstance(options[name], dict):
            options[name] = {int(i): tokens for i, tokens in options[name].items()}
    return options


def saved_channels(tensors: dict[str, Tensor], header: dict[str, Any]) -> dict[int, Tensor]:
    """Outlier channels by layer index."""
    found: dict[int, Tensor] = {}
    for i, group in enumerate(header["groups"]):
        channels = tensors.get(f"group{i}.outlier_channels")
        if channels is not None:
            found |= dict(zip(group["layers"], channels, strict=True))
    return found


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _group_state(group: Group) -> tuple[dict[str, Tensor], dict[str, Any]]:
    header: dict[str, Any] = {"layers": group.layers, "sink": group.fill.sink, "recent": group.fill.recent}
    if group.paged is None:
        channels = group.outlier_channels
        return {} if channels is None else {"outlier_channels": channels}, header | {"paged": None}
    tensors, header["paged"] = group.paged.state()
    header["sequences"] = [group.paged.sequences.index(sequence) for sequence in group.sequences]
    for layer, windows in enumerate(group.windows):
        if windows is not None:
            tensors |= {f"sink.{layer}": windows.sink.cpu(), f"recent.{layer}": windows.recent.cpu()}
    return tensors, header


def _restore_group(group: Group, tensors: dict[str, Tensor], header: dict[str, Any], device: torch.device) -> None:
    group.fill = Fill(header["sink"], header["recent"])
    if header["paged"] is None:
        return
    wanted = group.pages_for(len(header["sequences"]))
    stored = tensors["pages.0"].shape[0]
    group.paged = PagedKVCache.from_state(
        tensors, header["paged"], num_pages=max(wanted, stored), device=device, backend=group.backend
    )
    group.sequences = header["sequences"]
    for layer in range(len(group.layers)):
        if f"sink.{layer}" in tensors:
            sink, recent = tensors[f"sink.{layer}"].to(device), tensors[f"recent.{layer}"].to(device)
            group.windows[layer] = WindowTensors.of(sink, recent)


def _layer_state(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A stock layer's public attributes: tensors, and plain values. Its device is where it is loaded."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if name.startswith("_") or isinstance(value, torch.device):
            continue
        if isinstance(value, Tensor):
            tensors[name] = value.cpu().contiguous().clone()
        elif isinstance(value, torch.dtype):
            plain[name] = {"dtype": str(value).removeprefix("torch.")}
        elif isinstance(value, dict):
            inner = {key: x for key, x in value.items() if isinstance(x, Tensor)}
            tensors |= {f"{name}.{key}": x.cpu().contiguous().clone() for key, x in inner.items()}
            plain[name] = {"dict": [[key, x] for key, x in value.items() if key not in inner]}
        else:
            plain[name] = value
    return tensors, plain


def _restore_layer(layer: Any, tensors: dict[str, Tensor], plain: dict[str, Any], device: torch.device) -> None:
    for name, value in plain.items():
        if isinstance(value, dict) and "dtype" in value:
            value = getattr(torch, value["dtype"])
        elif isinstance(value, dict):
            value = {key: x for key, x in value["dict"]}
        setattr(layer, name, value)
    for name, tensor in tensors.items():
        owner, _, key = name.partition(".")
        if key:
            getattr(layer, owner)[int(key)] = tensor.to(device)
        else:
            setattr(layer, owner, tensor.to(device))
    if getattr(layer, "is_initialized", False) or tensors:
        layer.device = device
