"""`kvturbo doctor` tries every backend, and says so when one is wrong."""

from __future__ import annotations

import platform

import pytest
import torch

import kvturbo as package
from kvturbo.cli import selftest
from kvturbo.config import KVFormat
from kvturbo.ops import backends


def test_report_covers_every_backend_and_operation(kvturbo) -> None:
    ran = kvturbo("doctor", "--json")
    assert ran.code == 0
    data = ran.data
    assert data["versions"]["kvturbo"] == package.__version__
    assert data["versions"]["python"] == platform.python_version()
    assert data["versions"]["torch"] == torch.__version__
    on_cpu = [(e["backend"], e["operation"]) for e in data["backends"] if e["device"] == "cpu"]
    assert on_cpu == [(b, op) for b in backends.BACKENDS for op in backends.OPERATIONS]
    for entry in data["backends"]:
        device = torch.device(entry["device"])
        fmt = KVFormat.from_name("k4v4", 128)
        reason = backends.unavailable(entry["backend"], entry["operation"], device, fmt)
        assert (entry["works"], entry["detail"]) == (None, reason) if reason else entry["works"] is True


def test_text_names_backends_and_the_model(kvturbo) -> None:
    out = kvturbo("doctor").out
    assert "reference" in out and "decode" in out and "kvturbo-12m" in out


def test_a_wrong_backend_is_found_in_every_operation(kvturbo, monkeypatch: pytest.MonkeyPatch) -> None:
    load, unavailable = backends.load, backends.unavailable

    def store(k, v, pages, slots, **options) -> None:
        load("store", "reference")(1.1 * k, v, pages, slots, **options)

    def decode(q, pages, table, lens, out, **options):
        lse = load("decode", "reference")(q, pages, table, lens, out, **options)
        out.mul_(1.1)
        return lse

    def gather(pages, table, start, stop, out, **options) -> None:
        load("gather", "reference")(pages, table, start, stop, out, **options)
        out[0].mul_(1.1)

    wrong = {"store": store, "decode": decode, "gather": gather}
    monkeypatch.setattr(backends, "BACKENDS", ("reference", "wrong"))
    monkeypatch.setattr(
        backends, "unavailable", lambda name, *rest: None if name == "wrong" else unavailable(name, *rest)
    )
    monkeypatch.setattr(backends, "load", lambda op, name: wrong[op] if name == "wrong" else load(op, name))
    ran = kvturbo("doctor", "--json")
    assert ran.code == 1
    verdicts = {(e["backend"], e["operation"]): e["works"] for e in ran.data["backends"] if e["device"] == "cpu"}
    assert verdicts == {(name, op): name == "reference" for name in ("reference", "wrong") for op in wrong}


def test_a_backend_that_throws_is_reported_and_fails(kvturbo, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("no such kernel\nmore")

    monkeypatch.setitem(selftest.CHECKS, "store", broken)
    ran = kvturbo("doctor", "--json")
    assert ran.code == 1 and ran.data["ok"] is False
    details = [
        entry["detail"] for entry in ran.data["backends"] if entry["operation"] == "store" and not entry["works"]
    ]
    assert details[0] == "RuntimeError: no such kernel"


@pytest.mark.parametrize("error", [2 * selftest.LIMIT, float("nan")])
def test_an_error_above_the_limit_fails(kvturbo, monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    monkeypatch.setattr(selftest, "CHECKS", dict.fromkeys(selftest.CHECKS, lambda *_: error))
    ran = kvturbo("doctor", "--json")
    assert ran.code == 1
    assert [e["works"] for e in ran.data["backends"] if e["device"] == "cpu" and e["backend"] == "reference"] == [
        False
    ] * 3
