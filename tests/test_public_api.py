"""The public names. A name that comes or goes is a decision: change this list with it."""

from __future__ import annotations

import subprocess
import sys

import kvturbo

PUBLIC = [
    "KVFormat",
    "OutOfPagesError",
    "Packed",
    "PageLayout",
    "PagedKVCache",
    "choose_outlier_channels",
    "dequantize",
    "format_names",
    "quantize",
]


def test_public_names() -> None:
    assert sorted(kvturbo.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(kvturbo, name).__doc__, name


def test_the_version_is_three_numbers() -> None:
    assert all(part.isdigit() for part in kvturbo.__version__.split("."))
    assert kvturbo.__version__.count(".") == 2


def test_importing_the_package_imports_no_extra() -> None:
    """But what torch itself imports."""
    extras = {"transformers", "triton", "vllm", "cuda", "lm_eval", "matplotlib"}
    code = (
        f"import sys, torch; before = set(sys.modules); import kvturbo; print({extras} & (set(sys.modules) - before))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "set()"
