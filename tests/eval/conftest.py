"""The tiny model, saved once and loaded once."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvturbo.eval.model import LoadedModel, load_model
from tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    return load_model(str(tiny_folder), device="cpu")
