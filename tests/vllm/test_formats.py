"""Which names the plugin offers, and which versions of vLLM it works with."""

from __future__ import annotations

import logging

import pytest

from kvturbo.config import HEAD_DIMS, PRESETS
from kvturbo.vllm import plugin
from kvturbo.vllm.formats import cache_dtypes, format_of

PLAIN = ["k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k2v2"]
NAMES = [
    "turboquant", "kvturbo_k8v4", "kvturbo_lite4", *(f"kvturbo_{name}{end}" for end in ("", "-o16", "-o32") for name in PLAIN)
]  # fmt: skip


def test_the_cache_dtypes_are_the_formats_with_kernels() -> None:
    assert sorted(cache_dtypes()) == sorted(NAMES)
    assert next(iter(cache_dtypes())) == "turboquant"


@pytest.mark.parametrize("name", NAMES)
def test_no_name_has_the_prefix_that_makes_vllm_skip_layers(name: str) -> None:
    assert not name.startswith("turboquant_")


@pytest.mark.parametrize("name", NAMES)
def test_every_cache_dtype_exists_for_some_head_dim_and_has_a_decode_kernel(name: str) -> None:
    kinds = set()
    for head_dim in HEAD_DIMS:
        if name.endswith("-o32") and head_dim < 128:
            continue
        fmt = format_of(name, head_dim)
        kinds.add(PRESETS[fmt.name.partition("-o")[0]].kind)
        assert fmt.name == name.removeprefix("kvturbo_").replace("turboquant", "k4v4")
    assert kinds and not kinds & {"split", "qjl"}


@pytest.mark.parametrize("name, head_dim", [("kvturbo_tq3.5", 128), ("fp8", 128), ("turboquant_4bit_nc", 128)])
def test_other_cache_dtypes_are_refused_with_the_choices(name: str, head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"kv_cache_dtype must be one of turboquant, kvturbo_k4v4, .*got '{name}'"):
        format_of(name, head_dim)


def test_a_head_dim_that_no_kernel_has_is_refused() -> None:
    with pytest.raises(ValueError, match="head_dim must be one of 64, 80, .*got 512"):
        format_of("turboquant", 512)


@pytest.mark.parametrize("version", ["0.33.0", "0.33.1.dev3+g1234", "0.40.0", "1.0.0rc1"])
def test_newer_versions_are_taken(version: str) -> None:
    assert plugin.unsupported_version(version) is None


@pytest.mark.parametrize("version", ["0.26.0", "0.32.9", "0.9.2", "dev"])
def test_older_versions_are_refused_by_name(version: str) -> None:
    reason = plugin.unsupported_version(version)
    assert reason is not None
    assert f"found {version}" in reason and "vLLM 0.33 or newer" in reason and "pip install -U 'vllm>=0.33'" in reason


def test_with_an_old_vllm_nothing_is_registered_and_an_error_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys
    import types

    old = types.ModuleType("vllm")
    old.__version__ = "0.26.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", old)
    with caplog.at_level(logging.ERROR, logger="vllm.kvturbo"):
        plugin.register()  # would fail to import vllm.config if it went on
    assert "found 0.26.0" in caplog.text
