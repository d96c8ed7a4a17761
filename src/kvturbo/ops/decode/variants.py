"""Which decode kernel a call gets: what decode.cu is compiled for, and what fits a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvturbo.config import KVFormat
from kvturbo.cuda.source import TYPES, page_macros, source
from kvturbo.layout import PageLayout
from kvturbo.rotation import factor

FOLDER = Path(__file__).parent
SHARES = FOLDER / "shares.cuh"
FEW_TASKS = 64
"""Sequences times KV heads up to which a kernel of few large CTAs is used."""
LIGHT_BYTES = 53, 0.3
"""Bytes of a token, key and value together, that take as long to read as its instructions with one tile of rows do: so many, and so
many more per channel."""
_RESERVED_BYTES = 1024  # of a CTA, by the driver


@dataclass(frozen=True)
class Variant:
    """What a decode kernel is compiled for.

    Attributes:
        fmt, page_size: the pages.
        group: query heads per KV head.
        q_type, out_type: 0 bf16, 1 fp16, 2 fp32.
        row_tiles: tiles of 4 query rows (query heads of a KV head times q_len) that share one decoding of the codes.
        step: slots that a warp takes at once.
        warps, stages: of a CTA; a stage holds a step. Without bulk copies a multiple of the warps.
        ctas_per_sm: CTAs per multiprocessor that registers are limited for.
        recent: newest tokens that may be read raw, from beside the pages; 0: none.
    """

    fmt: KVFormat
    page_size: int
    group: int
    q_type: int
    out_type: int
    row_tiles: int
    step: int
    warps: int
    stages: int
    ctas_per_sm: int
    recent: int = 0

    @property
    def rows(self) -> int:
        """Query rows of a task."""
        return 4 * self.row_tiles

    @property
    def heavy(self) -> bool:
        """Whether a step's instructions take about as long as its bytes or longer.

        So it is with several tiles of rows, few bits or channels, or so many channels that only two CTAs share a multiprocessor.
        """
        fixed, per_channel = LIGHT_BYTES
        light = fixed + per_channel * self.fmt.head_dim
        return self.row_tiles > 1 or self.fmt.head_dim > 128 or self.fmt.bytes_per_token < light

    @property
    def partial_floats(self) -> int:
        """Floats of a piece's partial results, of its pages and of the newest tokens: the output and two numbers per row."""
        return (2 if self.recent else 1) * self.rows * (self.fmt.head_dim + 2)

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA: the ring of stages, in which the warps' results lie later, the queries, and the newest
        tokens of a sequence."""
        pages = self.step // self.page_size
        page_bytes = PageLayout.of(self.fmt, self.page_size).page_bytes
        stride = (page_bytes + 63) // 128 * 128 + 64 if self.page_size == 16 else -(-page_bytes // 128) * 128
        stage = (pages * stride + 127) // 128 * 128
        results = self.warps * self.rows * (self.fmt.head_dim + 8) * 4
        k_steps = -(-self.fmt.head_dim // 32)
        queries = self.row_tiles * (k_steps + 1) * 256 + 3 * self.rows * 4
        newest = 2 * self.recent * self.fmt.head_dim * (4 if self.q_type == 2 else 2)
        return max(self.stages * stage, results) + queries + newest

    @property
    def static_shared_bytes(self) -> int:
        """Static shared memory of a CTA: barriers, what lanes need at every step, tops and sums of the warps' rows, and a vector
        per warp for the Paley matrix."""
        vectors = self.warps * self.fmt.head_dim * 4 if factor(self.fmt.head_dim)[0] > 1 else 4
        return -(-(self.stages * 12 + 2 * self.warps * self.rows * 4 + vectors + 640) // 128) * 128

    def macros(self) -> dict[str, int | str]:
        """The macros decode.cu is compiled with."""
        return page_macros(self.fmt, self.page_size) | {
            "GROUP": self.group,
            "NT": self.row_tiles,
            "STEP": self.step,
            "NW": self.warps,
            "NB": self.stages,
            "MIN_CTAS": self.ctas_per_sm,
            "RECENT": self.recent,
            "Q_TYPE": self.q_type,
            "OUT_TYPE": self.out_type,
        }

    def source(self) -> str:
        """The text that is compiled."""
        return source(self.fmt.head_dim, SHARES, FOLDER / "decode.cu")


def schedule_source() -> str:
    """The text of the schedule kernel, the same for every variant."""
    return SHARES.read_text() + (FOLDER / "schedule.cu").read_text()


@dataclass(frozen=True)
class Limits:
    """What a GPU gives a kernel; without a GPU, nothing is known.

    Attributes:
        shared_per_cta, shared_per_sm: bytes of shared memory.
        bulk_copies: whether any warp may wait for a copy (sm_90 and newer).
    """

    shared_per_cta: int = 0
    shared_per_sm: int = 0
    bulk_copies: bool = False


@lru_cache(maxsize=8)
def limits_of(device: torch.device) -> Limits:
    """The limits of a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)
    return Limits(
        int(properties.shared_memory_per_block_optin),
        int(properties.shared_memory_per_multiprocessor),
        properties.major >= 9,
    )


@lru_cache(maxsize=256)
def variant_for(
    fmt: KVFormat,
    page_size: int,
    q_dtype: torch.dtype,
    out_dtype: torch.dtype,
    group: int,
    q_len: int = 1,
    tasks: int = 0,
    limits: Limits = Limits(),
    recent: int = 0,
) -> Variant:
    """The kernel for a call.

    Args:
        fmt, page_size: the pages.
        q_dtype, out_dtype: bf16, fp16 or fp32.
        group, q_len: query heads per KV head, and queries per sequence.
        tasks: sequences times KV heads (0: not known).
        limits: of the GPU.
        recent: newest tokens that may be read raw.
    """
    wide = fmt.head_dim > 128
    row_tiles = min(2 if wide else 4, -(-group * q_len // 4))
    many_rows = row_tiles > 2
    step = max(page_size, 32 if wide else 64)
    ctas = 1 if wide and page_size == 64 else 2 if wide or many_rows else 3
    types = TYPES[q_dtype], TYPES[out_dtype]
    usual = Variant(fmt, page_size, group, *types, row_tiles, step, 4, 8, ctas, recent)
    # Few tasks are cut into many pieces: fewer, larger CTAs leave fewer pieces to merge (1 x 131k: 58.6 us instead of 64.5).
    large = Variant(fmt, page_size, group, *types, row_tiles, step, 8, 16, 1, recent)
    if 0 < tasks <= FEW_TASKS and not many_rows and not wide and _fit(large, limits):
        return large
    # Three CTAs with a stage or two less are faster than two (-o16: 12 warps instead of 8).
    narrower = [replace(usual, stages=stages) for stages in (8, 7, 6)[: 3 if limits.bulk_copies else 1]]
    narrowest = [*narrower, replace(usual, warps=2, stages=4, ctas_per_sm=1)]
    for fits, variants in ((_fit, narrower), (_fits_once, narrowest)):
        for variant in variants:
            if limits == Limits() or fits(variant, limits):
                return variant
    raise ValueError(
        f"format {fmt.name!r} with head_dim {fmt.head_dim} and pages of {page_size} tokens needs {narrowest[-1].shared_bytes} "
        f"bytes of shared memory in the cuda backend, the GPU has {limits.shared_per_cta}; use smaller pages or backend 'triton'"
    )


def _fit(variant: Variant, limits: Limits) -> bool:
    """Whether as many CTAs as the kernel is compiled for fit on a multiprocessor."""
    shared = variant.shared_bytes + variant.static_shared_bytes + _RESERVED_BYTES
    return _fits_once(variant, limits) and variant.ctas_per_sm * shared <= limits.shared_per_sm


def _fits_once(variant: Variant, limits: Limits) -> bool:
    return variant.shared_bytes + variant.static_shared_bytes <= limits.shared_per_cta
