"""Decoding in one pass gives what decoding token by token gives."""

from __future__ import annotations

import pytest
import torch

from kvturbo.config import KVFormat
from kvturbo.eval.codec import packed_codec
from kvturbo.eval.decoding import Decoded
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.simulation import Simulation, run
from tiny_model import HEAD_DIM

CONTEXT, TOKENS = 60, 20
ROUNDING = 2e-4
"""Of keys and values to 16 bits, which a difference in the last place may turn."""


@pytest.mark.parametrize("newest", [1, 2, 7, 40, 100])
def test_tokens_read_what_they_read_one_by_one(tiny: LoadedModel, newest: int) -> None:
    ids = torch.from_numpy(tiny.text[: CONTEXT + TOKENS].copy())[None]
    codec = packed_codec(KVFormat.from_name("k2v2", HEAD_DIM), sink=0, recent=newest - 1)
    wanted = run(tiny.model, ids, Simulation(codec, first=CONTEXT, chunk=1), CONTEXT)
    raw = Simulation(keep=True)
    run(tiny.model, ids[:, :CONTEXT], raw)
    context = {i: (k.float(), v.float()) for i, (k, v) in raw.kept.items()}
    back = {i: (codec.restore(k, "k", i), codec.restore(v, "v", i)) for i, (k, v) in context.items()}
    got = run(tiny.model, ids[:, CONTEXT:], Decoded(codec, newest, context, back))
    torch.testing.assert_close(got, wanted, rtol=0, atol=ROUNDING)
    other = run(tiny.model, ids[:, CONTEXT:], Decoded(codec, newest - 1, context, back))
    assert newest > CONTEXT or (other - wanted).abs().max() > 5 * ROUNDING
