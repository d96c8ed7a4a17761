"""The script for compute-sanitizer: its checks fail when a kernel is wrong, and it covers what there is."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvturbo import KVFormat
from kvturbo.config import HEAD_DIMS, PAGE_SIZES
from support import BACKENDS_UNDER_TEST

SCRIPT = Path(__file__).with_name("sanitize.py")


@pytest.fixture(scope="module")
def sanitize() -> Iterator[ModuleType]:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("sanitize", SCRIPT)
    assert spec and spec.loader
    module = sys.modules["sanitize"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = path
    del sys.modules["sanitize"]


def test_every_shape_of_page_is_stored_and_gathered(sanitize: ModuleType) -> None:
    formats = [KVFormat.from_name(name, head_dim) for name, head_dim, _, _ in sanitize.FORMATS]
    assert {fmt.head_dim for fmt in formats} == set(HEAD_DIMS)
    assert {page_size for _, _, page_size, _ in sanitize.FORMATS} == set(PAGE_SIZES)
    assert {fmt.k.parts[0].bits for fmt in formats} == {2, 3, 4, 8}
    assert {fmt.v.parts[0].bits for fmt in formats} == {2, 3, 4}
    assert {fmt.outliers for fmt in formats} == {0, 16, 32} and {fmt.k.rotate for fmt in formats} == {True, False}
    assert len({dtype for _, _, _, dtype in sanitize.FORMATS}) == 3


def test_names_are_distinct_and_quick_is_a_part_of_all(sanitize: ModuleType) -> None:
    for backend in ("cuda", "triton"):
        names = [name for name, _ in sanitize.Checks(backend, False)]
        assert len(set(names)) == len(names)
        assert set(names) > {name for name, _ in sanitize.Checks(backend, True)}
        assert {name.split()[0] for name in names} >= {"store", "gather", "decode"}


def test_parts_are_all_of_it_once(sanitize: ModuleType) -> None:
    checks = list(sanitize.Checks("cuda", False))
    parts = [sanitize.part_of(checks, f"{i}/7") for i in range(1, 8)]
    assert sorted(name for part in parts for name, _ in part) == sorted(name for name, _ in checks)
    for wrong in ("0/7", "8/7", "3"):
        with pytest.raises(ValueError, match=f"part must be I/N with I from 1 to N, got '{wrong}'"):
            sanitize.part_of(checks, wrong)


def test_options_are_for_as_many_sequences_as_there_are(sanitize: ModuleType) -> None:
    for case in sanitize.CASES:
        lengths = sanitize.lengths_of(case)
        options = sanitize.options_for(case, lengths, sanitize.OPTIONS["all"])
        assert len(options["q_lens"]) == len(options["seq_starts"]) == len(lengths)
        assert sum(options["q_lens"]) < len(lengths) * case.queries, "no rows of padding"
        assert all(n <= length or length == 0 for n, length in zip(options["q_lens"], lengths, strict=True))


@pytest.mark.skipif("triton" not in BACKENDS_UNDER_TEST, reason="needs Triton")
def test_right_kernels_pass_and_wrong_ones_are_named(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picked = {"store  k4v4-128-32 bfloat16 octets", "gather k4v4-128-32 bfloat16", "decode k4v4-128-16-8x1-few plain"}
    checks = [check for check in sanitize.Checks("triton", True) if check[0] in picked]
    assert len(checks) == 3 and sanitize.run(checks) == 0
    assert capsys.readouterr().out.count("\nok") == 2

    def beyond(operation: Any, pages_at: int) -> Any:
        """The operation, which then writes a byte before the pages."""

        def run(*args: Any, **options: Any) -> Any:
            result = operation(*args, **options)
            args[pages_at]._base[0, 0, -1] = 0
            return result

        return run

    for name, pages_at in (("store", 2), ("gather", 0), ("decode", 1)):
        monkeypatch.setattr(sanitize, name, beyond(getattr(sanitize, name), pages_at))
    assert sanitize.run(checks) == 3
    assert capsys.readouterr().out.count(": bytes outside the pages were written (") == 3


@pytest.mark.parametrize("factor,said", [(1.02, "relative error 2.0e-02"), (float("nan"), "not finite")])
def test_a_wrong_result_fails(
    sanitize: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], factor: float, said: str
) -> None:
    def wrong(*args: Any, backend: str, out: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        _, lse = right(*args, out=out, backend="reference", **options)
        return out.mul_(factor), lse

    right = sanitize.decode
    checks = sanitize.Checks("reference", True)
    check = partial(checks.decode, sanitize.CASES[1], [40, 3], {}, planned=False)
    monkeypatch.setattr(sanitize, "decode", wrong)
    assert sanitize.run([("decode", check)]) == 1
    assert said in capsys.readouterr().out
