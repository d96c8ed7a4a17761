"""Decode attention of one layer: the cases, their inputs, a float64 check, and a row of results per case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvturbo.bench.registry import PROVIDERS, Call, Case, MissingError
from kvturbo.bench.running import Skips
from kvturbo.bench.timing import graph_us
from kvturbo.config import SIDES, KVFormat
from kvturbo.layout import PageLayout
from kvturbo.ops import backends, decode
from kvturbo.ops.recent import Recent
from kvturbo.quantizer import dequantize

MAX_ERROR = 1e-3
"""Relative L2 of an fp32 output; a row beyond it is not a result."""

SHAPES = [
    (1, 128, 8, 4), (1, 4096, 8, 4), (1, 32768, 8, 4), (1, 131072, 8, 4), (8, 128, 4, 7), (8, 4096, 8, 4),
    (8, 32768, 8, 4), (32, 1024, 8, 4), (32, 4096, 8, 4), (32, 32768, 8, 4), (128, 1024, 8, 4), (128, 4096, 8, 4),
    (32, 32768, 4, 7), (32, 32768, 4, 8), (128, 4096, 4, 8),
]  # fmt: skip
CASES: dict[str, list[Case]] = {
    "shapes": [Case(*shape) for shape in SHAPES],
    "ragged": [Case(64, 65536, ragged=True)],
    "head-dims": [Case(32, 32768, 8, 8, 64), Case(32, 32768, 2, 8, 256)],
    "group-1": [Case(8, 32768, 32, 1)],
    "q-lens": [Case(32, 32768, q_len=q_len) for q_len in (2, 4)],
    "pages": [
        replace(case, page_size=size)
        for case in (Case(1, 32768), Case(32, 32768), Case(32, 32768, 4, 8), Case(128, 4096))
        for size in (16, 64)
    ],
    "formats": [
        Case(32, 32768, format=name)
        for name in ("k4v3", "k4v2", "k3v3", "k3v2", "k2v2", "k8v4", "lite4", "k4v4-o16", "k4v4-o32")
    ],
    "rings": [
        replace(case, recent=16)
        for case in (Case(1, 32768), Case(8, 8192, 4, 7), Case(32, 32768), Case(32, 32768, 4, 8), Case(128, 4096))
    ],
}
"""By name, in the order of the table."""


class Inputs:
    """A case's tensors on the GPU: random codes with plausible scales, pages in random order."""

    def __init__(self, case: Case) -> None:
        self.case, self.scale = case, case.head_dim**-0.5
        self.fmt = KVFormat.from_name(case.format, case.head_dim)
        self.layout = PageLayout.of(self.fmt, case.page_size)
        torch.manual_seed(0)
        self.lengths = case.lengths()
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, device="cuda")
        heads = case.kv_heads * case.group
        self.q = torch.randn(case.batch * case.q_len, heads, case.head_dim, device="cuda").bfloat16()
        self.q_lens = None if case.q_len == 1 else torch.full_like(self.seq_lens, case.q_len)

    @cached_property
    def pages(self) -> Tensor:
        shape = (self.num_pages(), self.case.kv_heads, self.layout.page_bytes)
        pages = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        for plane in self.layout.planes.values():
            if plane.width == 16:
                size = 0.02 if plane.name == "k.outlier_scale" or self.fmt.side(plane.side).parts[0].bits == 8 else 0.8
                scales = (torch.rand(*shape[:2], self.case.page_size, device="cuda") + 0.5) * size
                pages[..., plane.offset : plane.end] = scales.half().view(torch.uint8)
        return pages

    @cached_property
    def channels(self) -> Tensor | None:
        heads, count = self.case.kv_heads, self.fmt.outliers
        if not count:
            return None
        return torch.stack([torch.randperm(self.fmt.head_dim, device="cuda")[:count] for _ in range(heads)])

    @cached_property
    def recent(self) -> Recent | None:
        """A full ring of other keys and values for every sequence."""
        size, (batch, heads, d) = self.case.recent, (self.case.batch, self.case.kv_heads, self.case.head_dim)
        if not size:
            return None
        rows = torch.randn(batch, heads, 2, size, d, device="cuda").bfloat16()
        return Recent(rows, torch.randperm(batch, device="cuda").int(), self.seq_lens.clamp(max=size))

    def num_pages(self) -> int:
        """Pages of all sequences."""
        return sum(-(-length // self.case.page_size) for length in self.lengths)

    @cached_property
    def table(self) -> Tensor:
        """A block table in random order: [batch, most pages] int32."""
        counts = [-(-length // self.case.page_size) for length in self.lengths]
        order = torch.randperm(sum(counts), device="cuda").int()
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32, device="cuda")
        for b, ids in enumerate(order.split(counts)):
            table[b, : len(ids)] = ids
        return table

    def schedule(self, backend: str, out_dtype: torch.dtype = torch.bfloat16) -> Any:
        """The step's schedule for a backend and outputs of a dtype, or None where it has none to be made beforehand."""
        return SCHEDULES[backend](self, out_dtype) if backend in SCHEDULES else None

    def decode(self, backend: str, out: Tensor | None, schedule: Any) -> tuple[Tensor, Tensor]:
        """kvturbo's decode into `out` (None: into new memory)."""
        return decode(
            self.q, self.pages, self.table, self.seq_lens, fmt=self.fmt, scale=self.scale, q_lens=self.q_lens,
            outlier_channels=self.channels, schedule=schedule, out=out, backend=backend, recent=self.recent,
        )  # fmt: skip

    def error(self, backend: str) -> float:
        """Relative L2 error of fp32 output against float64 attention: the first and last sequence's first and last head."""
        schedule = self.schedule(backends.choose(backend, "decode", self.pages.device, self.fmt), torch.float32)
        out, _ = self.decode(backend, torch.full(self.q.shape, torch.nan, device="cuda"), schedule)
        ends = {0, self.case.batch - 1}, {0, self.case.kv_heads - 1}
        return max(self._error_of(out, b, head) for b in ends[0] for head in ends[1])

    def _error_of(self, out: Tensor, b: int, head: int) -> float:
        n, group, length = self.case.q_len, self.case.group, self.lengths[b]
        block = self.pages[self.table[b, : -(-length // self.case.page_size)].long(), head]
        channels = None if self.channels is None else self.channels[head]
        k, v = (
            dequantize(self.layout.read(block, side), self.fmt, side, channels).flatten(0, 1)[:length].double()
            for side in SIDES
        )
        if self.recent is not None:
            newest = torch.arange(length - int(self.recent.counts[b]), length, device="cuda")
            ring = self.recent.rows[int(self.recent.slots[b]), head]
            k[newest], v[newest] = ring[:, newest % self.case.recent].double()
        rows = slice(b * n, (b + 1) * n), slice(head * group, (head + 1) * group)
        scores = self.q[rows].double() @ k.T * self.scale  # [n, group, length]
        seen = torch.arange(length, device="cuda") <= length - n + torch.arange(n, device="cuda")[:, None]
        wanted = torch.where(seen[:, None], scores, -torch.inf).softmax(-1) @ v
        return float((out[rows].double() - wanted).norm() / wanted.norm())


def _triton_schedule(inputs: Inputs, out_dtype: torch.dtype) -> Any:
    from kvturbo.ops.schedule import plan

    return plan(inputs.seq_lens, q_lens=inputs.q_lens, max_q_len=inputs.case.q_len)


def _cuda_schedule(inputs: Inputs, out_dtype: torch.dtype) -> Any:
    from kvturbo.ops.decode.cuda_schedule import make_schedule

    schedule = make_schedule(
        inputs.q, inputs.pages, inputs.seq_lens, fmt=inputs.fmt, out_dtype=out_dtype, ring_size=inputs.case.recent
    )
    counts = None if inputs.recent is None else inputs.recent.counts
    schedule.update(inputs.seq_lens, inputs.q_lens, recent_counts=counts)
    return schedule


SCHEDULES: dict[str, Callable[[Inputs, torch.dtype], Any]] = {"triton": _triton_schedule, "cuda": _cuda_schedule}


def eager_calls() -> dict[str, Call]:
    """Calls of the cuda backend that give a GPU next to nothing to do, one query over 64 tokens; out is allocated by each."""
    inputs = Inputs(Case(1, 64))
    schedule = inputs.schedule("cuda")
    return {
        "decode": lambda: inputs.decode("cuda", None, None),
        "decode_with_schedule": lambda: inputs.decode("cuda", None, schedule),
    }


class Runner(Skips):
    """Measures cases; what other providers gave for a shape is kept, since our formats do not change it.

    Args:
        providers: names in `PROVIDERS`.
        log: where to say what is skipped.
    """

    def __init__(self, providers: Sequence[str], log: Callable[[str], None] = print) -> None:
        super().__init__(log)
        self.providers = providers
        self._known: dict[tuple[str, Case], float | None] = {}

    def row(self, case: Case) -> dict[str, Any]:
        """Times of every provider in microseconds (None: skipped), the error, and the packed bytes read per second.

        Raises:
            RuntimeError: kvturbo's result is wrong; there is no time for a wrong result.
        """
        inputs = Inputs(case)
        times = {name: self._time(name, inputs) for name in self.providers}
        errors = [inputs.error(backend) for backend in self._checked(times)]
        if errors and not max(errors) <= MAX_ERROR:
            raise RuntimeError(f"relative error {max(errors):.1e} is above {MAX_ERROR:.0e} in {case}")
        ours = times.get("kvturbo") or times.get("kvturbo_triton")
        read = sum(inputs.lengths) * case.kv_heads * inputs.fmt.bytes_per_token
        row = asdict(case) | {f"{name}_us": value for name, value in times.items()}
        return row | {"rel_err": max(errors, default=None), "gb_per_s": read / ours / 1e3 if ours else None}

    def _checked(self, times: dict[str, float | None]) -> list[str]:
        names = {"kvturbo": "auto", "kvturbo_triton": "triton"}
        return [backend for name, backend in names.items() if times.get(name)]

    def _time(self, name: str, inputs: Inputs) -> float | None:
        provider = PROVIDERS.get(name)
        if not provider.every_format and (inputs.case.format != Case.format or inputs.case.recent):
            return None
        key = (name, inputs.case if provider.packed else inputs.case.baseline())
        if key not in self._known:
            self._known[key] = self._measured(name, inputs)
        return self._known[key]

    def _measured(self, name: str, inputs: Inputs) -> float | None:
        provider = PROVIDERS.get(name)
        try:
            microseconds = graph_us(provider.prepare(inputs))
        except MissingError as reason:
            self.skip(name, str(reason))
            return None
        except Exception as error:
            if provider.packed:
                raise
            self.skip(name, f"{inputs.case.baseline()}: {type(error).__name__}: {error}"[:300])
            return None
        finally:
            torch.cuda.empty_cache()
        return microseconds
