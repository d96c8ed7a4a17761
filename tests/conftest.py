"""What every test gets: reproducible examples, few threads, poisoned memory, and no GPU test without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read once, by Triton when it is imported and by cuBLAS when it starts: so they come before torch.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

hypothesis.settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None, print_blob=True)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fills memory that nobody has written (torch.empty and its kin) with NaN, or with the largest integer (0xFF).

    torch does this itself in its deterministic mode, below Python, so compiled and fake-tensor code sees it too.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
