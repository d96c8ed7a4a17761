"""kvturbo's own decode: the fastest backend for the machine, and each backend by name."""

from __future__ import annotations

import torch

from kvturbo.bench.decode import Inputs
from kvturbo.bench.registry import PROVIDERS, Call, MissingError, Provider
from kvturbo.ops import backends


def prepare(inputs: Inputs, backend: str) -> Call:
    """A call of decode into a bf16 output, with the step's schedule made beforehand, as for every layer but the first."""
    device = inputs.pages.device
    if backend != "auto":
        reason = backends.unavailable(backend, "decode", device, inputs.fmt)
        if reason:
            raise MissingError(reason)
    out = torch.empty_like(inputs.q)
    schedule = inputs.schedule(backends.choose(backend, "decode", device, inputs.fmt))
    return lambda: inputs.decode(backend, out, schedule)


PROVIDERS.register("kvturbo")(Provider(lambda inputs: prepare(inputs, "auto"), packed=True))
PROVIDERS.register("kvturbo_triton")(
    Provider(lambda inputs: prepare(inputs, "triton"), packed=True, every_format=False)
)
