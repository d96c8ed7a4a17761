"""The operations as torch.library ops: schemas, fakes, and whole graphs under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvturbo import KVFormat
from kvturbo.ops import decode, gather, store
from support import BACKENDS_UNDER_TEST, Batch, batch_of, device_of, interpreted, ints, same_bits

OPS = torch.ops.kvturbo
SCHEMA_AND_FAKE = ("test_schema", "test_faketensor")
ALL = (*SCHEMA_AND_FAKE, "test_autograd_registration", "test_aot_dispatch_dynamic")

COMPILED = [
    pytest.param(backend, compiler, marks=[pytest.mark.gpu] if device_of(backend).type == "cuda" else [])
    for backend in [*BACKENDS_UNDER_TEST, "auto"]
    for compiler in (["eager"] if interpreted(backend) and backend != "auto" else ["eager", "aot_eager"])
]


def step(name: str, backend: str) -> tuple[Batch, Tensor, Tensor, Tensor, Tensor]:
    """A batch and one more token for each of its two sequences: q, k, v, slots."""
    fmt = KVFormat.from_name(name, 64, seed=3)
    device = device_of(backend)
    batch = batch_of(fmt, [20, 33], device=device)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, heads, 64, generator=generator).to(device) for heads in (4, 2, 2))
    slots = torch.stack([batch.slots[0][-1], batch.slots[1][-1]]).to(device)
    return batch, q, k, v, slots


def fmt_args(batch: Batch) -> tuple[str, int]:
    return batch.fmt.name, batch.fmt.seed


@pytest.mark.parametrize("name", ["k4v4", "k3v2-o16"])
@pytest.mark.parametrize("backend", BACKENDS_UNDER_TEST)
def test_schemas_and_fakes_describe_the_operations(backend: str, name: str) -> None:
    batch, q, k, v, slots = step(name, backend)
    channels = batch.channels
    # The other checks trace the operation as a caller would, which the compiled step below does too.
    how = {"raise_exception": True, "test_utils": SCHEMA_AND_FAKE if interpreted(backend) else ALL}
    torch.library.opcheck(
        OPS.store.default, (k, v, batch.pages.clone(), slots, *fmt_args(batch), channels, backend, None, None), **how
    )
    rings = torch.zeros(2, 2, 2, 8, 64, device=q.device), torch.tensor([3, -1], device=q.device)
    torch.library.opcheck(
        OPS.store.default, (k, v, batch.pages.clone(), slots, *fmt_args(batch), channels, backend, *rings), **how
    )
    copies = [torch.zeros(2, 5, 2, 64, dtype=torch.bfloat16, device=q.device) for _ in range(2)]
    torch.library.opcheck(
        OPS.gather.default,
        (batch.pages, batch.block_table[:, :2], 3, 8, *copies, *fmt_args(batch), False, channels, backend),
        **how,
    )
    sinks, ones = torch.zeros(4, device=q.device), ints([1, 1], q.device)
    for options in ((None, None, None, None, None), (ones, ints([2, 0], q.device), 9, 2.0, sinks)):
        torch.library.opcheck(
            OPS.decode.default,
            (
                q, batch.pages, batch.block_table, batch.seq_lens, torch.zeros_like(q), *fmt_args(batch),
                0.11, *options, channels, backend,
            ),
            **how,
        )  # fmt: skip


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["k4v4", "k4v4-o16"])
@pytest.mark.parametrize("backend,compiler", COMPILED)
def test_a_compiled_step_is_one_graph_and_gives_the_same_bits(backend: str, compiler: str, name: str) -> None:
    batch, q, k, v, slots = step(name, "reference" if backend == "auto" else backend)
    options: dict[str, Any] = {**batch.format_options(), "backend": backend}

    def one_step(pages: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        store(k + 0.5, v * 2, pages, slots, **options)
        out, lse = decode(q * 2, pages, batch.block_table, batch.seq_lens, scale=0.11, window=25, **options)
        copies = gather(pages, batch.block_table[:, :2], 3, 20, **options)
        return out + 1, lse, *copies

    eager_pages, compiled_pages = batch.pages.clone(), batch.pages.clone()
    wanted = one_step(eager_pages, q, k, v)
    torch._dynamo.reset()
    got = torch.compile(one_step, fullgraph=True, backend=compiler)(compiled_pages, q, k, v)
    assert same_bits(eager_pages, compiled_pages) and not same_bits(eager_pages, batch.pages)
    assert all(same_bits(a, b) for a, b in zip(wanted, got, strict=True))
