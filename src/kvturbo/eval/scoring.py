"""Chunked scoring: a raw prefill once, packed once per cache, then the same chunks through every cache in lock step.

A chunk attends to its own raw keys and values and to what the cache holds from before it, so results depend on where
chunks end. They are fixed by the task and recorded with the results; a chunk of one token is what decoding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvturbo.eval.caches import REFERENCE, CacheSpec, PackedReadsError, attention_for
from kvturbo.eval.model import LoadedModel, PromptSource


@dataclass
class Run:
    """One cache on its way through a prompt.

    Attributes:
        spec: which cache.
        cache: the transformers cache.
        tokens, nbytes: what it held right after packing, and the bytes that took.
        fed: tokens of the chunks since then.
        packed_tokens_read: by all chunks so far, summed over packed layers.
    """

    spec: CacheSpec
    cache: Any
    tokens: int
    nbytes: int
    fed: int = 0
    packed_tokens_read: int = 0

    def facts(self) -> dict[str, int]:
        """What every record holds beside its figures."""
        return {
            "cache_tokens": self.tokens,
            "cache_bytes": self.nbytes,
            "packed_tokens_read": self.packed_tokens_read,
        }


def with_reference(specs: list[CacheSpec]) -> list[CacheSpec]:
    """The 16-bit cache first, then the others."""
    return [CacheSpec(REFERENCE)] + [spec for spec in specs if spec.name != REFERENCE]


@torch.inference_mode()
def start(loaded: LoadedModel, ids: np.ndarray, specs: list[CacheSpec]) -> list[Run]:
    """Prefills token ids [P] once with raw keys and values, and packs them once per cache."""
    raw = DynamicCache(config=loaded.model.config)
    loaded.model(_row(ids, loaded), past_key_values=raw, use_cache=True, logits_to_keep=1)
    runs = []
    for spec in specs:
        cache = spec.from_raw(loaded, raw)
        runs.append(Run(spec, cache, len(ids), cache.nbytes()))
    return runs


@torch.inference_mode()
def feed(loaded: LoadedModel, run: Run, ids: np.ndarray) -> Tensor:
    """One chunk through one cache: token ids [n] -> logits [n, V] fp32, row i after ids[i].

    Raises:
        PackedReadsError: the chunk read another number of packed tokens than the cache held.
    """
    expected = run.spec.packed_tokens(loaded.model.config, run.tokens + run.fed)
    before = run.cache.packed_tokens_read
    with attention_for(loaded.model, run.cache):
        logits = loaded.model(_row(ids, loaded), past_key_values=run.cache, use_cache=True).logits
    read = run.cache.packed_tokens_read - before
    if read != expected:
        raise PackedReadsError(
            f"a chunk of {len(ids)} tokens read {read} packed tokens (over all layers) of the {run.spec.name} cache, "
            f"which holds {expected}"
        )
    run.fed += len(ids)
    run.packed_tokens_read += read
    return logits[0].float()


def chunks(total: int, size: int) -> list[tuple[int, int]]:
    """Bounds (start, stop) of consecutive chunks; the last one may be shorter.

    Raises:
        ValueError: size is not positive.
    """
    if size < 1:
        raise ValueError(f"chunk must be at least 1, got {size}")
    return [(begin, min(begin + size, total)) for begin in range(0, total, size)]


def lock_step(
    loaded: LoadedModel, runs: list[Run], ids: np.ndarray, chunk: int
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Feeds ids[:-1] in chunks to every cache; yields the next tokens [n] and the logits [n, V] by cache name.

    Only one chunk's logits are alive at a time.
    """
    for begin, stop in chunks(len(ids) - 1, chunk):
        targets = torch.from_numpy(ids[begin + 1 : stop + 1]).to(loaded.device)
        yield targets, {run.spec.name: feed(loaded, run, ids[begin:stop]) for run in runs}


def passage(loaded: PromptSource, index: int, count: int, length: int) -> np.ndarray:
    """`length` tokens of the text, the index-th of `count` evenly spaced passages; the model's start token comes first if it
    has one."""
    begin = index * (len(loaded.text) - length) // max(1, count - 1)
    ids = loaded.text[begin : begin + length].copy()
    if loaded.tokenizer.bos_token_id is not None:
        ids[0] = loaded.tokenizer.bos_token_id
    return ids


def _row(ids: np.ndarray, loaded: LoadedModel) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(ids))[None].to(loaded.device)
