"""`kvturbo.json`: the format, windows and outlier channels of every layer of a model, decided before anything is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvturbo.config import OUTLIER_COUNTS, KVFormat
from kvturbo.files import whole_file

PLAN_FILE = "kvturbo.json"
"""Its name beside a model's weights."""
PLAN_VERSION = 1
SIXTEEN_BIT = "16bit"
"""What stands in place of a format's name for a layer that is kept in 16 bits."""


@dataclass(frozen=True)
class LayerPlan:
    """What one full-attention layer gets.

    Attributes:
        format: a format's name, or `16bit`.
        num_kv_heads, head_dim: the layer's shape.
        sink, recent: tokens of each row that stay in 16 bits, first and last; None: the format's default.
        channels: number of channels -> per KV head the outlier channels, ascending, whole RoPE pairs; for every `-o` count
            that head_dim has, whether or not the format uses it, so that a format can be chosen elsewhere.
        key_excess, value_excess: of the worst head, see `kvturbo.guard.merit`; None where they were not measured.
    """

    format: str
    num_kv_heads: int
    head_dim: int
    sink: int | None = None
    recent: int | None = None
    channels: Mapping[int, list[list[int]]] = field(default_factory=dict)
    key_excess: float | None = None
    value_excess: float | None = None

    def __post_init__(self) -> None:
        for name, size in (("num_kv_heads", self.num_kv_heads), ("head_dim", self.head_dim)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} must be a positive number, got {size!r}")
        if self.format != SIXTEEN_BIT:
            count = KVFormat.from_name(self.format, self.head_dim).outliers
            if count and count not in self.channels:
                raise ValueError(f"format {self.format!r} needs channels for {count}, got {sorted(self.channels)}")
        for name, value in (("sink", self.sink), ("recent", self.recent)):
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name} must be a number of tokens or null, got {value!r}")
        for count, heads in self.channels.items():
            _check_channels(count, heads, self)


@dataclass(frozen=True)
class Plan:
    """The full-attention layers of a model.

    Attributes:
        layers: by layer index.
        source: what it was made from, for people.
    """

    layers: Mapping[int, LayerPlan]
    source: str = ""

    @property
    def formats(self) -> dict[int, str]:
        """Names by layer index."""
        return {i: layer.format for i, layer in self.layers.items()}

    def channels(self, count: int) -> dict[int, Tensor]:
        """Outlier channels by layer index: [num_kv_heads, count] int64 each.

        Raises:
            ValueError: a layer has none for this count.
        """
        missing = [i for i, layer in self.layers.items() if count not in layer.channels]
        if missing:
            raise ValueError(f"layers {missing} have no {count} outlier channels in the plan")
        return {i: torch.tensor(layer.channels[count], dtype=torch.int64) for i, layer in self.layers.items()}

    def own_channels(self, formats: Mapping[int, str] | None = None) -> dict[int, Tensor]:
        """Outlier channels of the layers whose format has some, by layer index.

        Args:
            formats: by layer index; default: the plan's.
        """
        found = {}
        for i, name in (formats or self.formats).items():
            layer = self.layers[i]
            count = 0 if name == SIXTEEN_BIT else KVFormat.from_name(name, layer.head_dim).outliers
            if count in layer.channels:
                found[i] = torch.tensor(layer.channels[count], dtype=torch.int64)
        return found


def write_plan(path: str | Path, plan: Plan) -> None:
    """Writes a plan, whole or not at all, in place of one that is there.

    Args:
        path: the file, or a folder in which it is `kvturbo.json`.
        plan: what to write.

    Raises:
        FileNotFoundError: the file's folder does not exist.
    """
    layers = {str(i): _plain(layer) for i, layer in sorted(plan.layers.items())}
    text = json.dumps({"version": PLAN_VERSION, "source": plan.source, "layers": layers}, indent=1)
    with whole_file(plan_path(path)) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_plan(path: str | Path) -> Plan:
    """Reads what `write_plan` wrote.

    Args:
        path: the file, or a folder in which it is `kvturbo.json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no plan, of another version, or an entry is not valid; the message says which.
    """
    path = plan_path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no plan {path}; kvturbo check and kvturbo plan write one")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
        raise ValueError(f"{path} is no plan of kvturbo: it has no 'layers'")
    if data.get("version") != PLAN_VERSION:
        raise ValueError(f"{path} is a plan of version {data.get('version')!r}; this release reads {PLAN_VERSION}")
    layers = {}
    for i, entry in data["layers"].items():
        try:
            layers[_number("a layer's index", i)] = _parsed(entry)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, layer {i}: {error}") from error
    return Plan(layers, str(data.get("source", "")))


def plan_path(path: str | Path) -> Path:
    """The plan's file: the path itself, or in a folder `kvturbo.json`."""
    path = Path(path)
    return path / PLAN_FILE if path.is_dir() else path


def _plain(layer: LayerPlan) -> dict[str, Any]:
    return asdict(layer) | {"channels": {str(count): heads for count, heads in layer.channels.items()}}


def _parsed(entry: Any) -> LayerPlan:
    if not isinstance(entry, dict):
        raise ValueError(f"must be an object, got {entry!r}")
    known = set(LayerPlan.__dataclass_fields__)
    unknown, missing = sorted(set(entry) - known), sorted({"format", "num_kv_heads", "head_dim"} - set(entry))
    if unknown or missing:
        raise ValueError(f"unknown: {unknown}, missing: {missing}; fields: {', '.join(sorted(known))}")
    channels = entry.get("channels", {})
    if not isinstance(channels, dict):
        raise ValueError(f"channels must be an object, got {channels!r:.60}")
    channels = {_number("a number of channels", count): heads for count, heads in channels.items()}
    return LayerPlan(**{**entry, "channels": channels})


def _number(what: str, text: str) -> int:
    """A key of a JSON object as the number it stands for."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{what} must be a number, got {text!r}")
    return int(text)


def _check_channels(count: int, heads: Any, layer: LayerPlan) -> None:
    if count not in OUTLIER_COUNTS:
        raise ValueError(f"channels must be for one of {', '.join(map(str, OUTLIER_COUNTS))}, got {count}")
    if not isinstance(heads, list) or len(heads) != layer.num_kv_heads:
        raise ValueError(f"channels for {count} must be lists for {layer.num_kv_heads} KV heads, got {heads!r:.60}")
    for head in heads:
        valid = isinstance(head, list) and all(type(c) is int and 0 <= c < layer.head_dim for c in head)
        if not valid or len(head) != count or sorted(set(head)) != head:
            raise ValueError(
                f"channels for {count} must be {count} ascending numbers below {layer.head_dim}, got {head!r:.60}"
            )
