"""A file is there whole or not at all, and nothing else stays beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvturbo.files import whole_file


def test_a_file_replaces_the_one_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def write_half(path: Path) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_half(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder$"), whole_file(tmp_path):
        pass
    words = f"^no folder {tmp_path}/none to write 'file' into$"
    with pytest.raises(FileNotFoundError, match=words), whole_file(tmp_path / "none" / "file"):
        pass
    assert list(tmp_path.iterdir()) == []
