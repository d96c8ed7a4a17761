"""What works on this machine: versions, GPU, backends and why not, the embedded model.

Every backend that says it can run is tried on a few tokens and compared with the reference. Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from kvturbo.cli import selftest
from kvturbo.cli.output import print_json, progress
from kvturbo.config import KVFormat
from kvturbo.eval.model import EMBEDDED, embedded_folder
from kvturbo.eval.report import environment, size, table
from kvturbo.ops import backends

FORMAT, HEAD_DIM = "k4v4", 128


def configure(parser: argparse.ArgumentParser) -> None:
    del parser  # no options of its own


def run(arguments: argparse.Namespace) -> int:
    facts = environment()
    folder = embedded_folder()
    result = {
        **facts,
        "gpus": _gpus(),
        "backends": _backends(),
        "embedded_model": {"name": EMBEDDED, "folder": None if folder is None else str(folder)},
    }
    result["ok"] = all(entry["works"] is not False for entry in result["backends"])
    if arguments.json:
        print_json(result)
    else:
        print(_text(result))
    return 0 if result["ok"] else 1


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "capability": capability, "bytes": properties.total_memory})
    return gpus


def _backends() -> list[dict[str, Any]]:
    """One entry per device, backend and operation. works: True, False (tried and wrong), or None (not available)."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    fmt = KVFormat.from_name(FORMAT, HEAD_DIM)
    cases = [(device, name, op) for device in devices for name in backends.BACKENDS for op in backends.OPERATIONS]
    entries = []
    with progress(len(cases), "trying backends", "operation") as bar:
        for device, name, operation in cases:
            entries.append(_entry(device, name, operation, fmt))
            bar.update()
    return entries


def _entry(device: torch.device, name: str, operation: str, fmt: KVFormat) -> dict[str, Any]:
    entry = {"device": device.type, "backend": name, "operation": operation}
    reason = backends.unavailable(name, operation, device, fmt)
    if reason:
        return entry | {"works": None, "detail": reason}
    try:
        error = selftest.CHECKS[operation](fmt, device, name)
    except Exception as failure:  # a diagnosis reports whatever a driver or a compiler throws
        first_line = (str(failure) or type(failure).__name__).splitlines()[0]
        return entry | {"works": False, "detail": f"{type(failure).__name__}: {first_line}"}
    works = error <= selftest.LIMIT
    detail = f"relative error {error:.1e} against the reference" + ("" if works else f", limit {selftest.LIMIT}")
    return entry | {"works": works, "detail": detail}


def _text(result: dict[str, Any]) -> str:
    lines = [f"{name:13} {version or 'not installed'}" for name, version in result["versions"].items()]
    lines += [f"{'commit':13} {result['commit']}"] if result["commit"] else []
    lines += ["", f"{'cpu':13} {result['cpu']}, {result['threads']} threads"]
    lines += [f"{'gpu':13} {g['name']}, sm_{g['capability']}, {size(g['bytes'])}" for g in result["gpus"]]
    lines += [] if result["gpus"] else [f"{'gpu':13} none that torch can use"]
    model = result["embedded_model"]
    lines += [f"{'model':13} {model['name']}: {model['folder'] or 'not found'}", ""]
    words = {True: "works", False: "FAILS", None: "not available"}
    rows = [
        (entry["device"], entry["backend"], entry["operation"], words[entry["works"]], entry["detail"])
        for entry in result["backends"]
    ]
    lines.append(table(("device", "backend", "operation", "state", "detail"), rows, left=True))
    return "\n".join(lines)
