"""Files of named tensors with a header: safetensors whose version and checksum are verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvturbo.files import whole_file

FILE_VERSION = 1


def write_file(path: Path, kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a JSON header. The file appears whole or not at all, and replaces one that is there.

    Args:
        path: the file.
        kind: what is saved, such as "PagedKVCache"; `read_file` wants the same.
        tensors: contiguous host tensors by name.
        header: anything JSON can hold; version and kind are added.

    Raises:
        FileNotFoundError: the file's folder does not exist.
        IsADirectoryError: it is a folder.
    """
    text = json.dumps({"version": FILE_VERSION, "kind": kind, **header})
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {"kvturbo": text, "sha256": _digest(tensors, text)})


def read_file(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_file` wrote: tensors on the host, and the header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered, not one of ours, of another version, or of another kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no cache file {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
    if "kvturbo" not in metadata:
        raise ValueError(f"{path} is not a saved KV cache: it has no 'kvturbo' entry")
    if metadata.get("sha256") != _digest(tensors, metadata["kvturbo"]):
        raise ValueError(f"{path} has been altered: its checksum does not match its contents")
    header = json.loads(metadata["kvturbo"])
    if header["version"] != FILE_VERSION:
        raise ValueError(f"{path} is of file version {header['version']}; this release reads version {FILE_VERSION}")
    if header["kind"] != kind:
        raise ValueError(f"{path} is a saved {header['kind']}, not a {kind}")
    return tensors, header


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
