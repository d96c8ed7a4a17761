"""Store and gather of one layer: cases, inputs, a check against the reference, a row of results per case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvturbo.bench import decode as bench_decode
from kvturbo.bench.registry import Call, MissingError
from kvturbo.bench.running import Skips
from kvturbo.bench.timing import graph_us
from kvturbo.config import PAGE_SIZE, SIDES, KVFormat
from kvturbo.eval.report import table
from kvturbo.layout import PageLayout
from kvturbo.ops import backends, gather, store
from kvturbo.quantizer import Packed

BACKENDS = {"kvturbo": "cuda", "kvturbo_triton": "triton"}
"""Columns of the results and the backends that they time."""
EQUAL_VECTORS = 0.999
"""Share of stored vectors that must have the reference's bits; the others differ by the rounding of a sum."""
MAX_ERROR = 1e-3
"""Relative L2 distance of a bf16 gather from the reference's."""
MOST_SEQUENCES = 128
POOL_PAGES = 512
MILLISECONDS = 30


@dataclass(frozen=True)
class Case:
    """A store of new tokens, keys and values, or a gather of the first tokens of a sequence.

    Attributes:
        what: "store" or "gather".
        tokens: stored or gathered. A store of up to `MOST_SEQUENCES` takes one token of each of as many sequences, as a step of
            decoding does; a larger one takes consecutive tokens of one sequence, as prefill does.
        format: name of the format.
        rotated: whether a gather leaves the rotation in.
        kv_heads, head_dim: of the layer.
        page_size: tokens per page, for vLLM's cache too.
    """

    what: str
    tokens: int
    format: str = "k4v4"
    rotated: bool = False
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = PAGE_SIZE


def _cases() -> list[Case]:
    cases = []
    for name in ("k4v4", "k3v3", "k2v2", "k8v4", "k4v4-o16"):
        cases += [Case("store", tokens, name) for tokens in (1, 8, 32, 128, 1024, 8192)]
    gathers = (("k4v4", False), ("k4v4", True), ("k4v4-o16", False))
    return cases + [Case("gather", 8192, name, rotated) for name, rotated in gathers]


CASES = _cases()


class Inputs:
    """A case's tensors: normal keys and values in bf16, pages of a pool in random order, full of random bytes before."""

    def __init__(self, case: Case, device: torch.device | str = "cuda") -> None:
        self.case, self.fmt = case, KVFormat.from_name(case.format, case.head_dim)
        self.layout = PageLayout.of(self.fmt, case.page_size)
        torch.manual_seed(0)
        shape = (2, case.tokens, case.kv_heads, case.head_dim)
        self.k, self.v = torch.randn(shape, device=device).bfloat16()
        order, token = torch.randperm(POOL_PAGES, device=device), torch.arange(case.tokens, device=device)
        if case.what == "store" and case.tokens <= MOST_SEQUENCES:
            self.slots = order[token] * case.page_size + torch.randint_like(token, case.page_size)
        else:
            self.slots = order[token // case.page_size] * case.page_size + token % case.page_size
        self.block_table = order[: -(-case.tokens // case.page_size)].int()[None]
        channels = [torch.randperm(case.head_dim, device=device)[: self.fmt.outliers] for _ in range(case.kv_heads)]
        self.options = {"fmt": self.fmt, "outlier_channels": torch.stack(channels) if self.fmt.outliers else None}

    @property
    def device(self) -> torch.device:
        return self.k.device

    @cached_property
    def before(self) -> Tensor:
        shape = (POOL_PAGES, self.case.kv_heads, self.layout.page_bytes)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)

    @cached_property
    def stored(self) -> Tensor:
        """The pages after a store by the reference."""
        pages = self.before.clone()
        self.store(pages, "reference")
        return pages

    def store(self, pages: Tensor, backend: str) -> None:
        store(self.k, self.v, pages, self.slots, backend=backend, **self.options)  # type: ignore[arg-type]

    def gather(self, backend: str, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """A bf16 copy of the tokens that `stored` holds."""
        return gather(
            self.stored, self.block_table, 0, self.case.tokens, rotated=self.case.rotated, out=out, backend=backend,
            **self.options,  # type: ignore[arg-type]
        )  # fmt: skip

    def call(self, backend: str) -> Call:
        """What is timed: a store into pages of its own, or a gather into the same memory every time."""
        if self.case.what == "store":
            pages = self.before.clone()
            return lambda: self.store(pages, backend)
        out = torch.empty_like(self.k[None]), torch.empty_like(self.v[None])
        return lambda: self.gather(backend, out)

    def unequal_vectors(self, backend: str) -> int:
        """How many of the stored keys and values have other bits than the reference's.

        Raises:
            RuntimeError: a slot that was not stored to has changed.
        """
        got = self.before.clone()
        self.store(got, backend)
        mine = torch.zeros(POOL_PAGES, self.case.page_size, dtype=torch.bool, device=self.device)
        mine.view(-1)[self.slots] = True
        mine = mine[:, None].expand(-1, self.case.kv_heads, -1)
        count = 0
        for side in SIDES:
            equal = vectors_equal(self.layout.read(self.stored, side), self.layout.read(got, side))
            if not equal[~mine].all():
                raise RuntimeError(
                    f"the {backend} store changed the {side} of a slot that is not its own in {self.case}"
                )
            count += int((~equal[mine]).sum())
        return count

    def gather_error(self, backend: str) -> float:
        """Relative L2 distance from the reference's copy, of keys or of values, whichever is larger; memory is NaN before."""
        out = torch.full_like(self.k[None], torch.nan), torch.full_like(self.v[None], torch.nan)
        pairs = zip(self.gather("reference"), self.gather(backend, out), strict=True)
        errors = [(b.float() - a.float()).norm() / a.float().norm() for a, b in pairs]
        return float(torch.stack(errors).max())


def vectors_equal(a: Packed, b: Packed) -> Tensor:
    """Per vector, whether all fields have the same bits: a and b of shape [...] -> [...] bool."""
    equal = torch.ones(a.codes.shape[:-1], dtype=torch.bool, device=a.codes.device)
    for name, x in vars(a).items():
        if x is not None:
            left, right = (field.contiguous().view(torch.uint8) for field in (x, getattr(b, name)))
            equal &= (left == right).reshape(*equal.shape, -1).all(-1)
    return equal


def vllm_store(inputs: Inputs) -> Call:
    """A call of vLLM's store of the same tokens into a bf16 cache.

    Raises:
        MissingError: vLLM is not installed, or what it stored is not the keys and values.
    """
    try:
        from vllm import _custom_ops
    except ImportError as error:
        raise MissingError(f"vLLM is not installed: {error}") from error
    if not hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        raise MissingError("this vLLM has no compiled reshape_and_cache_flash")
    case = inputs.case
    shape = (2, POOL_PAGES, case.page_size, case.kv_heads, case.head_dim)
    k_cache, v_cache = torch.zeros(shape, dtype=torch.bfloat16, device=inputs.device)
    one = torch.ones((), device=inputs.device)

    def call() -> None:
        _custom_ops.reshape_and_cache_flash(inputs.k, inputs.v, k_cache, v_cache, inputs.slots, "auto", one, one)

    call()
    for x, cache in ((inputs.k, k_cache), (inputs.v, v_cache)):
        if not torch.equal(cache.flatten(0, 1)[inputs.slots], x):
            raise MissingError("vLLM's reshape_and_cache_flash did not store the keys and values it was given")
    return call


class Runner(Skips):
    """Checks and measures cases; vLLM's time for a number of tokens is kept, since our formats do not change it.

    Args:
        device: where to run.
        log: where to say what is skipped.
    """

    def __init__(self, device: torch.device | str = "cuda", log: Callable[[str], None] = print) -> None:
        super().__init__(log)
        self.device = device
        self._vllm: dict[int, float | None] = {}

    def row(self, case: Case) -> dict[str, Any]:
        """Times in microseconds (None: skipped) and what the check gave.

        Raises:
            RuntimeError: a result is wrong; there is no time for a wrong result.
        """
        inputs = Inputs(case, self.device)
        row: dict[str, Any] = asdict(case)
        names = [name for name, backend in BACKENDS.items() if self._runs(name, backend, inputs)]
        checks = [self._check(BACKENDS[name], inputs) for name in names]
        row |= {f"{name}_us": None for name in BACKENDS}
        row |= {f"{name}_us": graph_us(inputs.call(BACKENDS[name]), MILLISECONDS) for name in names}
        is_store = case.what == "store"
        row["vllm_us"] = self._vllm_us(inputs) if is_store else None
        row["equal_vectors"] = min(checks, default=None) if is_store else None
        row["rel_err"] = None if is_store else max(checks, default=None)
        return row

    def _runs(self, name: str, backend: str, inputs: Inputs) -> bool:
        reason = backends.unavailable(backend, inputs.case.what, inputs.device, inputs.fmt)
        if reason:
            self.skip(name, reason)
        return reason is None

    def _check(self, backend: str, inputs: Inputs) -> float:
        """The share of equal vectors of a store, or the error of a gather."""
        case = inputs.case
        if case.what == "gather":
            error = inputs.gather_error(backend)
            if not error <= MAX_ERROR:
                raise RuntimeError(
                    f"relative error {error:.1e} of the {backend} gather is above {MAX_ERROR:.0e} in {case}"
                )
            return error
        count, unequal = 2 * case.tokens * case.kv_heads, inputs.unequal_vectors(backend)
        if unequal > 1 + (1 - EQUAL_VECTORS) * count:  # one more, or a small store could not have any
            raise RuntimeError(
                f"{unequal} of {count} vectors of the {backend} store differ from the reference's in {case}"
            )
        return 1 - unequal / count

    def _vllm_us(self, inputs: Inputs) -> float | None:
        tokens = inputs.case.tokens
        if tokens not in self._vllm:
            self._vllm[tokens] = self._measured_vllm(inputs)
        return self._vllm[tokens]

    def _measured_vllm(self, inputs: Inputs) -> float | None:
        try:
            return graph_us(vllm_store(inputs), MILLISECONDS)
        except MissingError as reason:
            self.skip("vllm", str(reason))
        except Exception as error:
            self.skip("vllm", f"{inputs.case.tokens} tokens: {type(error).__name__}: {error}"[:300])
        return None


def eager_calls() -> dict[str, Call]:
    """Calls of the cuda backend that give a GPU next to nothing to do: one token stored, and those of decode."""
    return {"store": Inputs(Case("store", 1)).call("cuda")} | bench_decode.eager_calls()


def store_table(rows: Sequence[dict[str, Any]]) -> str:
    """Times in microseconds, and the share of equal vectors of a store or the error of a gather."""
    columns = ("vllm", *reversed(BACKENDS))
    header = ["what", "tokens", "format", *columns, "equal / error"]
    return table(header, [_cells(row, columns) for row in rows])


def _cells(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    times = [row[f"{name}_us"] for name in columns]
    check = "-"
    if row["equal_vectors"] is not None:
        check = f"{row['equal_vectors']:.4%}"
    elif row["rel_err"] is not None:
        check = f"{row['rel_err']:.1e}"
    what = f"{row['what']} rotated" if row["rotated"] else row["what"]
    return [what, str(row["tokens"]), row["format"], *(f"{t:.1f}" if t else "-" for t in times), check]
