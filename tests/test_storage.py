"""Cache files: read back whole, or refused; written whole, or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvturbo import storage
from kvturbo.storage import read_file, write_file
from support import same_bits

TENSORS = {"pages.0": torch.arange(96, dtype=torch.uint8).view(2, 3, 16), "channels": torch.arange(4).view(2, 2)}
HEADER = {"format": "k4v4", "sequences": [{"length": 3, "pages": [0]}]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cache.safetensors"
    write_file(path, "test", TENSORS, HEADER)
    return path


def check(path: Path) -> None:
    tensors, header = read_file(path, "test")
    assert tensors.keys() == TENSORS.keys() and all(same_bits(tensors[name], TENSORS[name]) for name in TENSORS)
    assert header == {"version": storage.FILE_VERSION, "kind": "test", **HEADER}


def test_a_file_reads_back_as_it_was_written(path: Path) -> None:
    check(path)
    assert os.listdir(path.parent) == [path.name]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_altered_byte_is_noticed_wherever_it_is(path: Path, data: st.DataObject) -> None:
    whole = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(whole) - 1), label="place")
    whole[place] ^= data.draw(st.integers(1, 255), label="flipped")
    altered = path.with_name("altered")
    altered.write_bytes(whole)
    with contextlib.suppress(ValueError):  # white space in the header may change
        check(altered)


def test_an_altered_tensor_is_named_as_such(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="has been altered: its checksum does not match"):
        read_file(path, "test")


def test_a_truncated_file_is_refused_at_every_length(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"is truncated or not a safetensors file"):
            read_file(path, "test")


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="is not a saved KV cache"):
        read_file(other, "test")
    other.write_text("{}")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_file(other, "test")
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="no cache file"):
            read_file(missing, "test")


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "newer"
    with monkeypatch.context() as patch:
        patch.setattr(storage, "FILE_VERSION", 2)
        write_file(path, "test", TENSORS, HEADER)
    with pytest.raises(ValueError, match="is of file version 2; this release reads version 1"):
        read_file(path, "test")


@pytest.mark.parametrize("what", ["save_file", "replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def half(tensors: dict[str, torch.Tensor], target: Path, metadata: dict[str, str]) -> None:
        target.write_bytes(b"half a file")
        raise KeyboardInterrupt

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if what == "save_file":
            patch.setattr(storage, "save_file", half)
        else:
            patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_file(path, "test", {"pages.0": torch.zeros(1)}, {})
    check(path)
    assert os.listdir(path.parent) == [path.name]


def test_writing_to_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_file(tmp_path / "nowhere" / "cache", "test", TENSORS, HEADER)


def test_a_file_of_another_kind_is_refused_by_name(path: Path) -> None:
    with pytest.raises(ValueError, match="is a saved test, not a PagedKVCache"):
        read_file(path, "PagedKVCache")
