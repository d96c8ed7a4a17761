"""What it costs to read the newest tokens from a packed cache: divergence and retrieval, token by token, by how many are raw.

    python benchmarks/recent.py                   # writes benchmarks/results/recent.json; an hour on two CPU cores
    python benchmarks/recent.py --contexts 0      # the divergence alone: ten minutes

Contexts are read raw and packed whole, as an engine does with a prompt. What follows is decoded one token at a time: a step's own
token and those before it come from the codec, but for the newest ones. All by simulation (`kvturbo.eval.simulation`).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvturbo.bench.report import checked_commit, write
from kvturbo.config import KVFormat
from kvturbo.eval.codec import Codec, packed_codec
from kvturbo.eval.decoding import Decoded
from kvturbo.eval.metrics.kl import kl_divergence
from kvturbo.eval.model import LoadedModel, load_model
from kvturbo.eval.report import table
from kvturbo.eval.retrieval import samples, score
from kvturbo.eval.scoring import passage
from kvturbo.eval.simulation import Prefix, Simulation, run

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "recent.json"
SETTING = "hard-4k"
NEWEST = {"k4v4": (0, 1, 2, 4, 8, 16, 32, 128), "k4v4-o16": (0, 16), "k8v4": (0, 16)}
ASKED = {"k4v4": (0, 4, 16), "k4v4-o16": (0, 16), "k8v4": (0,)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--passages", type=int, default=8, help="of text, for the divergence (default: 8)")
    parser.add_argument("--prefix", type=int, default=1024, help="tokens of a passage's context (default: 1024)")
    parser.add_argument("--scored", type=int, default=512, help="tokens of a passage that are scored (default: 512)")
    parser.add_argument(
        "--contexts", type=int, default=64, help=f"of {SETTING}, 16 questions each, 0 for none (default: 64)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--commit", help="the tree's commit, where it is no git checkout")
    parser.add_argument("--allow-dirty", action="store_true", help="measure a changed tree; the commit says -dirty")
    given = parser.parse_args()
    commit = checked_commit(given.commit, allow_dirty=given.allow_dirty)
    loaded = load_model(device=given.device, dtype="float32")
    rows = divergences(loaded, given.passages, given.prefix, given.scored)
    if given.contexts:
        rows += answers(loaded, given.contexts)
    facts = {"model": loaded.name, "dtype": "float32", "prefix": given.prefix, "setting": SETTING}
    write(given.out, rows, commit, **facts)
    header = ["what", "format", "newest", "value", "n", "p99", "only_16bit", "only_this"]
    print(table(header, [[str(row.get(key, "")) for key in header] for row in rows]))
    return 0


def codecs_of(loaded: LoadedModel) -> dict[str, Codec]:
    """Every format that is measured."""
    size = loaded.model.config.head_dim
    return {
        name: packed_codec(KVFormat.from_name(name, size), loaded.outlier_channels(name), sink=0, recent=0)
        for name in NEWEST
    }


def packed(context: Prefix, codec: Codec) -> Prefix:
    """A context as a cache gives it back."""
    return {
        layer: (codec.restore(k.float(), "k", layer), codec.restore(v.float(), "v", layer))
        for layer, (k, v) in context.items()
    }


def divergences(loaded: LoadedModel, count: int, prefix: int, scored: int) -> list[dict[str, Any]]:
    """Mean and 99th percentile of the KL divergence to the 16-bit cache, over text."""
    found: dict[tuple[str, int], list[Tensor]] = {}
    codecs = codecs_of(loaded)
    for i in range(count):
        ids = torch.from_numpy(passage(loaded, i, count, prefix + scored))[None].to(loaded.device)
        plain = Simulation(keep=True)
        wanted = run(loaded.model, ids, plain, prefix)
        context = {layer: (k[:, :, :prefix], v[:, :, :prefix]) for layer, (k, v) in plain.kept.items()}
        for name, windows in NEWEST.items():
            back = packed(context, codecs[name])
            for newest in windows:
                logits = run(loaded.model, ids[:, prefix:], Decoded(codecs[name], newest, context, back))
                found.setdefault((name, newest), []).append(kl_divergence(wanted[0], logits[0]))
    rows = []
    for (name, newest), parts in found.items():
        kl = torch.cat(parts).double()
        figures = {"value": float(kl.mean()), "p99": float(kl.quantile(0.99)), "n": len(kl)}
        rows.append({"what": "mean KL", "format": name, "newest": newest} | figures)
    return rows


def answers(loaded: LoadedModel, contexts: int) -> list[dict[str, Any]]:
    """Questions answered rightly, and the paired differences from the 16-bit cache."""
    right: dict[tuple[str, int], list[bool]] = {}
    codecs = codecs_of(loaded)
    for sample in samples(SETTING, contexts, loaded.text, loaded.retrieval_vocab):
        ids = torch.from_numpy(sample.context)[None].to(loaded.device)
        plain = Simulation(keep=True)
        run(loaded.model, ids, plain, ids.shape[1] - 1)
        context = plain.kept
        asked = torch.from_numpy(sample.questions.reshape(sample.num_questions, -1)).to(loaded.device)
        whole: Any = {layer: tuple(x.expand(len(asked), -1, -1, -1) for x in kv) for layer, kv in context.items()}
        right.setdefault(("16bit", 0), []).extend(
            score(run(loaded.model, asked, Simulation(prefix=whole)).flatten(0, 1), sample)
        )
        for name, windows in ASKED.items():
            back = packed(context, codecs[name])
            for newest in windows:
                logits = run(loaded.model, asked, Decoded(codecs[name], newest, context, back))
                right.setdefault((name, newest), []).extend(score(logits.flatten(0, 1), sample))
    base = right["16bit", 0]
    return [
        {
            "what": SETTING, "format": name, "newest": newest, "value": sum(got) / len(got), "n": len(got),
            "only_16bit": sum(a and not b for a, b in zip(base, got, strict=True)),
            "only_this": sum(b and not a for a, b in zip(base, got, strict=True)),
        }
        for (name, newest), got in right.items()
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
