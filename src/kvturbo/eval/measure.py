"""Many codecs on the same model and tokens, in batches: divergence on text, and paired retrieval from a packed context."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvturbo.eval.codec import Codec
from kvturbo.eval.metrics.kl import kl_divergence, quantiles, same_top1
from kvturbo.eval.metrics.perplexity import nll
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.retrieval import get_setting, samples, score_predictions, wilson_interval
from kvturbo.eval.scoring import PackedReadsError
from kvturbo.eval.simulation import Prefix, Simulation, run


@dataclass(frozen=True)
class Passages:
    """Rows of text that are scored.

    Attributes:
        ids: [rows, length + 1] int64; the last token is only a target.
        prefix: tokens that are read as one raw chunk and not scored.
        chunk: tokens of every chunk after it.
        batch: rows of a forward pass.
    """

    ids: Tensor
    prefix: int
    chunk: int
    batch: int

    @property
    def scored(self) -> int:
        """Scored tokens of all rows."""
        return len(self.ids) * (self.ids.shape[1] - 1 - self.prefix)

    def batches(self) -> Iterator[Tensor]:
        """Rows for one forward pass each."""
        return iter(self.ids.split(self.batch))


def cut_passages(
    text: np.ndarray, rows: int, length: int, *, bos: int | None, reserve: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows evenly spaced over a text, and the text's end, which is kept for calibration.

    Args:
        text: [N] int64.
        rows: how many.
        length: tokens of a row; one more is cut as the last target.
        bos: the start token, put in the first place of every row; None: none.
        reserve: tokens at the end of the text that no row has.
        device: where the rows go.

    Returns:
        [rows, length + 1] and [reserve] int64, on device.

    Raises:
        ValueError: the text is too short for rows that don't overlap.
    """
    usable = len(text) - reserve
    if rows * (length + 1) > usable:
        raise ValueError(f"{rows} rows of {length + 1} tokens and {reserve} for calibration need more than {len(text)}")
    begins = [i * (usable - length - 1) // max(1, rows - 1) for i in range(rows)]
    cut = np.stack([text[begin : begin + length + 1] for begin in begins])
    rest = text[usable:].copy()
    if bos is not None:
        cut[:, 0] = bos
        rest[:1] = bos
    return torch.from_numpy(cut).to(device), torch.from_numpy(rest).to(device)


class TextMeasure:
    """Divergence of codecs from the 16-bit cache on passages; the 16-bit logits are computed once.

    Args:
        model: a causal language model.
        passages: what is scored.
    """

    def __init__(self, model: Any, passages: Passages) -> None:
        self.model, self.passages = model, passages
        self.reference = [self._logits(ids, Simulation()) for ids in passages.batches()]

    def measure(self, simulation: Simulation) -> dict[str, Any]:
        """Figures of a simulation; its chunks are set here.

        Raises:
            PackedReadsError: the pass read another number of packed tokens than the chunks ask for.
        """
        passages = self.passages
        simulation = replace(simulation, first=passages.prefix, chunk=passages.chunk)
        found: dict[str, list[Tensor]] = {"kl": [], "same": [], "nll": []}
        for ids, reference in zip(passages.batches(), self.reference, strict=True):
            logits = self._logits(ids, simulation)
            targets = ids[:, passages.prefix + 1 :].flatten()
            found["kl"].append(kl_divergence(reference, logits))
            found["same"].append(same_top1(reference, logits).double())
            found["nll"].append(nll(logits, targets))
        self._check(simulation)
        kl, same, loss = (torch.cat(found[name]) for name in ("kl", "same", "nll"))
        return {
            **quantiles(kl),
            "kl_error": kl.std().item() / math.sqrt(len(kl)),
            "same_top1": same.mean().item(),
            "nll": loss.mean().item(),
            "perplexity": math.exp(min(loss.mean().item(), 700.0)),
            "scored_tokens": len(kl),
            "packed_tokens_read": simulation.packed_tokens_read,
        }

    def _logits(self, ids: Tensor, simulation: Simulation) -> Tensor:
        logits = run(self.model, ids[:, :-1], simulation, start=self.passages.prefix)
        return logits.float().flatten(0, 1)

    def _check(self, simulation: Simulation) -> None:
        if simulation.codec is None:
            return
        starts = [a for a, _ in simulation.bounds(self.passages.ids.shape[1] - 1)]
        expected = sum(packed_tokens(simulation.codec, start, layers_of(self.model)) for start in starts)
        check_reads(simulation, len(self.passages.ids) * expected)


class RetrievalMeasure:
    """Retrieval from contexts that are read once with raw keys and values, then seen through each codec by the questions.

    Args:
        loaded: the model; it needs `retrieval.json`.
        setting: one of `kvturbo.eval.retrieval.SETTINGS`.
        prompts: samples, each with the setting's number of questions.
        batch: samples of a forward pass.
        seed: of the samples.
    """

    def __init__(self, loaded: LoadedModel, setting: str, prompts: int, batch: int, seed: int = 2026) -> None:
        self.loaded, self.setting = loaded, setting
        self.questions_each = get_setting(setting).questions
        drawn = list(samples(setting, prompts, loaded.text, loaded.retrieval_vocab, seed))
        self.batches = [drawn[i : i + batch] for i in range(0, len(drawn), batch)]
        self.prefixes = [self._read([sample.context for sample in group]) for group in self.batches]
        self.reference = self.right(None)

    def right(self, codec: Codec | None, prompts: int | None = None) -> np.ndarray:
        """Which questions are answered exactly, [questions] bool; of the first `prompts` samples, rounded up to a batch.

        Raises:
            PackedReadsError: the questions read another number of packed tokens than the contexts hold.
        """
        correct: list[bool] = []
        for group, prefix in zip(self.batches, self.prefixes, strict=True):
            if prompts is not None and len(correct) >= prompts * self.questions_each:
                break
            simulation = Simulation(codec, prefix=prefix)
            logits = run(self.loaded.model, self._stack([sample.questions for sample in group]), simulation)
            if codec is not None:
                check_reads(simulation, len(group) * packed_tokens(codec, len(group[0].context), len(prefix)))
            for row, sample in zip(_predictions(logits), group, strict=True):
                correct += score_predictions(row, sample)
        return np.array(correct)

    def measure(self, codec: Codec | None, prompts: int | None = None) -> dict[str, Any]:
        """Accuracy with its 95 % Wilson interval, and the paired difference to the 16-bit cache on the same questions."""
        return paired(self.reference, self.reference if codec is None else self.right(codec, prompts))

    def _read(self, contexts: list[np.ndarray]) -> Prefix:
        simulation = Simulation(keep=True)
        ids = self._stack(contexts)
        run(self.loaded.model, ids, simulation, start=ids.shape[1] - 1)
        return simulation.kept

    def _stack(self, arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(self.loaded.device)


def paired(reference: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Accuracy and its difference to a reference on the same questions.

    The interval of the difference is Wald's for paired proportions: with b questions lost and c gained of n, its standard
    error is sqrt(b + c - (b - c)^2 / n) / n.

    Args:
        reference, right: [questions] bool; the reference may have more, of which the first are taken.
    """
    n = len(right)
    reference = reference[:n]
    hits = int(right.sum())
    lost, gained = int((reference & ~right).sum()), int((~reference & right).sum())
    low, high = wilson_interval(hits, n)
    difference = (gained - lost) / n
    margin = 1.96 * math.sqrt(max(0.0, lost + gained - (lost - gained) ** 2 / n)) / n
    return {
        "accuracy": hits / n, "low": low, "high": high, "questions": n,
        "reference": float(reference.mean()), "lost": lost, "gained": gained,
        "difference": difference, "difference_low": difference - margin, "difference_high": difference + margin,
    }  # fmt: skip


def _predictions(logits: Tensor) -> np.ndarray:
    """[B, M, V] -> [B, M] int64 on the CPU, in one transfer."""
    best = logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)
    return best.cpu().numpy()


def layers_of(model: Any) -> int:
    """How many layers a model has."""
    return int(model.config.get_text_config().num_hidden_layers)


def packed_tokens(codec: Codec, tokens: int, layers: int) -> int:
    """Of `tokens` tokens those that a chunk after them reads through a codec, summed over layers."""
    ranges = [codec.packed_range(tokens, layer) for layer in range(layers)]
    return sum(stop - first for first, stop in ranges)


def check_reads(simulation: Simulation, expected: int) -> None:
    """Raises PackedReadsError unless so many packed tokens were read."""
    if simulation.packed_tokens_read != expected:
        raise PackedReadsError(
            f"a simulation read {simulation.packed_tokens_read} packed tokens where its chunks ask for {expected}"
        )
