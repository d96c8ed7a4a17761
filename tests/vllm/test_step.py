"""Whole steps of vLLM's metadata builder and attention on the CPU, with the reference backend: mixed batches of prompts, chunks and
decoding, speculation and padding, against float64 attention over what the pages stand for.
"""

from __future__ import annotations

import dataclasses
import shutil
from typing import Any

import pytest
import torch

import vllm_rings
from vllm_dense import flash, merge
from vllm_pieces import cut
from vllm_steps import SCALE, Engine, LocalEngine

pytestmark = pytest.mark.usefixtures("vllm_python")

ROWS = 20
BOUND = 4 * torch.finfo(torch.bfloat16).eps  # bf16 queries, partial results and outputs


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch, vllm_python: None) -> None:
    from vllm.utils import torch_utils

    from kvturbo.vllm import attention, engine

    torch.manual_seed(0)
    monkeypatch.setattr(torch_utils, "PIN_MEMORY", False)
    monkeypatch.setattr(engine, "flash_attention", lambda head_size, scale, cap: flash(scale, cap))
    monkeypatch.setattr(engine, "merge", merge)
    monkeypatch.setattr(attention.PackedAttention, "backend", "reference")
    cut(monkeypatch.setattr, 48, ROWS)


@pytest.mark.parametrize("cache_dtype", ["turboquant", "kvturbo_k4v4-o16", "kvturbo_k3v2", "kvturbo_lite4"])
def test_prompts_chunks_and_decoding_in_one_batch(cache_dtype: str) -> None:
    engine = Engine(cache_dtype)
    errors = engine.step([(0, 30), (1, 70)])
    errors += engine.step([(0, 1), (2, 33), (1, 50)])
    errors += engine.step([(0, 1), (1, 1), (2, 1)])
    errors += engine.step([(2, 1), (0, 100)])
    assert max(errors) < BOUND, errors


@pytest.mark.parametrize("page", [16, 32, 64])
def test_several_short_chunks_after_short_prefixes_are_attended_together(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvturbo.vllm import prefill

    cut(monkeypatch.setattr, 2 * page, ROWS)
    engine, pieces = Engine(block_size=page), []
    engine.step([(0, page), (1, 15)])
    add = prefill._Prefix.add
    monkeypatch.setattr(
        prefill._Prefix, "add", lambda self, piece, *rest: (pieces.append(piece), add(self, piece, *rest))
    )
    assert max(engine.step([(0, 5), (1, 7)])) < BOUND
    assert [piece.bounds[1].tolist() for piece in pieces] == [[0, page, page + 15]]


@pytest.mark.parametrize("padding", [1, 5])
def test_a_decode_batch_padded_for_a_graph(padding: int) -> None:
    engine = Engine()
    engine.step([(0, 30), (1, 70)])
    assert max(engine.step([(0, 1), (1, 1)], padding)) < BOUND


def _drafting(tokens: int = 3) -> dict[str, Any]:
    draft = {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    return {"speculative_config": draft}


@pytest.mark.parametrize("counts", [(4, 4), (4, 1), (2, 3)], ids=str)
def test_drafts_are_verified_in_the_decode_kernel(counts: tuple[int, int]) -> None:
    engine = Engine(**_drafting())
    engine.step([(0, 30), (1, 70)])
    assert max(engine.step([(0, counts[0]), (1, counts[1])])) < BOUND


def test_a_uniform_batch_of_drafts_padded_for_a_graph() -> None:
    engine = Engine(**_drafting())
    engine.step([(0, 30), (1, 70)])
    assert max(engine.step([(0, 4), (1, 4)], padding=8)) < BOUND


def test_drafts_beside_a_prompt() -> None:
    engine = Engine(**_drafting())
    engine.step([(0, 30), (1, 70)])
    assert max(engine.step([(0, 4), (1, 1), (2, 60)])) < BOUND


def test_a_rejected_draft_leaves_no_trace() -> None:
    engine = Engine(**_drafting())
    engine.step([(0, 40)])
    engine.step([(0, 4)])
    for side in (engine.k, engine.v):
        side[0] = side[0][:-3]  # the engine goes on at the first rejected token, over slots that are taken
    assert max(engine.step([(0, 4)])) < BOUND


def test_sinks_and_soft_caps_reach_both_paths() -> None:
    engine = Engine()
    engine.impl.soft_cap, engine.impl._sinks = 2.0, torch.tensor([0.5, 3.0, -1.0, 6.0])
    engine.impl._flash = flash(SCALE, 2.0)
    engine.impl._prompts = None
    errors = engine.step([(0, 30), (1, 70)])
    errors += engine.step([(0, 1), (1, 50)])
    assert max(errors) < BOUND, errors


def test_local_attention_sees_its_chunk_and_nothing_before() -> None:
    engine = LocalEngine()
    errors = engine.step([(0, 30), (1, 150)])
    errors += engine.step([(0, 1), (2, 63), (1, 50)])  # the chunk's end lies within the last one's tokens
    errors += engine.step([(0, 1), (1, 1), (2, 1)])
    errors += engine.step([(2, 66)])  # sequence 2 has 64 tokens: one chunk is full
    assert max(errors) < BOUND, errors


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
def test_drafts_beyond_a_local_chunk_are_verified_in_two_parts() -> None:
    engine = LocalEngine(**_drafting(), max_num_seqs=3)
    engine.step([(0, 62), (1, 63), (2, 61)])
    assert max(engine.step([(0, 4), (1, 4), (2, 4)])) < BOUND


def test_attention_that_is_not_causal_is_refused() -> None:
    engine = Engine()
    common = dataclasses.replace(engine._common([(0, 5)], torch.arange(5), 0), causal=False)
    with pytest.raises(NotImplementedError, match="not causal is not supported \\(causal=False\\)"):
        engine.builder.build(0, common)


def test_measuring_memory_takes_the_workspace_and_gives_zeros() -> None:
    engine = Engine()
    taken: list[int] = []
    prompts = engine.impl._prompts_on(torch.device("cpu"))
    engine.impl._prompts = dataclasses.replace(prompts, workspace=lambda: taken.append(1))
    q = torch.randn(5, 4, 128).bfloat16()
    out = engine.impl.forward(
        engine.layer, q, q[:, :2], q[:, :2], torch.tensor([]), None, torch.full_like(q, torch.nan)
    )
    assert taken and not out.any()


def test_a_quantised_output_is_refused() -> None:
    engine = Engine()
    q = torch.randn(5, 4, 128).bfloat16()
    with pytest.raises(NotImplementedError, match="quantised attention outputs"):
        engine.impl.forward(engine.layer, q, q, q, engine.cache, None, q, output_scale=torch.ones(1))


needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def with_rings(monkeypatch: pytest.MonkeyPatch, _on_the_cpu: None) -> None:
    vllm_rings.on_the_cpu(monkeypatch)


@needs_gxx
@pytest.mark.parametrize("size", [8, 16, 32])
def test_decode_reads_the_newest_tokens_raw(with_rings: None, size: int) -> None:
    engine = Engine("kvturbo_k2v2", additional_config={"kvturbo": {"recent": size}})
    errors = engine.step([(0, 30), (1, 70)])
    assert engine.recent == [0, 0], "prompts are raw anyway"
    errors += engine.step([(1, 1), (0, 1), (2, 3)])
    assert engine.recent == [size, min(size, 31), 0]
    errors += engine.step([(2, 1), (0, 1), (1, 1)], padding=1)
    assert engine.recent == [4, min(size, 32), size]
    for _ in range(5):
        errors += engine.step([(2, 1), (0, 1)])
    errors += engine.step([(1, 1), (2, 1), (0, 40)])
    assert engine.recent == [size, min(size, 10), 0]
    errors += engine.step([(0, 1)])
    assert engine.recent == [size]
    assert max(errors) < BOUND, errors


@needs_gxx
def test_what_is_read_raw_shows(with_rings: None) -> None:
    engine = Engine("kvturbo_k2v2")
    engine.step([(0, 40)])
    engine._recent = lambda metadata, rows: [0] * rows  # type: ignore[method-assign]
    assert min(engine.step([(0, 1)])) > 5 * BOUND


@needs_gxx
@pytest.mark.parametrize("rejected", [0, 1, 3])
def test_rejected_drafts_are_not_read_from_rings(with_rings: None, rejected: int) -> None:
    engine = Engine(**_drafting())
    errors = engine.step([(0, 40), (1, 31)])
    for _ in range(6):
        errors += engine.step([(0, 4), (1, 4)])
        for side in (engine.k, engine.v) if rejected else ():
            side[0], side[1] = side[0][:-rejected], side[1][:-rejected]
    assert engine.recent == [16, 16]
    assert max(errors) < BOUND, errors


@needs_gxx
def test_blocks_of_another_sequence_bring_no_ring_along(with_rings: None) -> None:
    engine = Engine()
    errors = engine.step([(0, 40)])
    engine.table[1] = engine.table[0]
    engine.k[0], engine.v[0] = engine.k[0][:0], engine.v[0][:0]
    errors += engine.step([(1, 40)])  # in the same blocks, while the first one waits
    errors += engine.step([(1, 1)])
    assert engine.recent == [16]
    assert max(errors) < BOUND, errors


@needs_gxx
def test_more_sequences_than_rings(with_rings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvturbo.vllm import rings

    monkeypatch.setattr(rings, "MAX_RINGS", 1)
    engine = Engine()
    errors = engine.step([(0, 30), (1, 70)])
    errors += engine.step([(1, 1), (0, 1)])
    assert engine.recent == [0, 16]
    assert max(errors) < BOUND, errors


@needs_gxx
def test_rings_of_outlier_formats_sinks_and_soft_caps(with_rings: None) -> None:
    engine = Engine("kvturbo_k4v4-o16")
    engine.impl.soft_cap, engine.impl._sinks = 2.0, torch.tensor([0.5, 3.0, -1.0, 6.0])
    engine.impl._flash = flash(SCALE, 2.0)
    engine.impl._prompts = None
    errors = engine.step([(0, 30), (1, 70)])
    errors += engine.step([(0, 1), (1, 50)])
    assert engine.recent == [16, 0]
    assert max(errors) < BOUND, errors


@needs_gxx
def test_local_attention_has_no_rings(with_rings: None) -> None:
    engine = LocalEngine()
    errors = engine.step([(0, 30), (1, 150)])
    errors += engine.step([(0, 1), (1, 1)])
    assert engine.recent == [0, 0] and max(errors) < BOUND


@needs_gxx
def test_a_capture_gives_no_rings_and_stores_into_none(with_rings: None) -> None:
    engine = Engine()
    engine.step([(0, 40)])
    rows = engine.impl._ring_rows.clone()
    common = dataclasses.replace(engine._common([(0, 1), (1, 1)], torch.full((2,), -1), 0))
    metadata = engine.builder.build_for_cudagraph_capture(common)
    assert metadata.decode.counts.tolist() == [0, 0]
    k = torch.ones(2, 2, 128).bfloat16()
    engine.impl.do_kv_cache_update(engine.layer, k, k, engine.cache, common.slot_mapping)
    assert torch.equal(engine.impl._ring_rows, rows)
    assert max(engine.step([(0, 1)])) < BOUND and engine.recent == [16]


@needs_gxx
def test_rings_are_there_when_memory_is_measured(with_rings: None) -> None:
    engine = Engine(max_num_seqs=5)
    engine.impl._ring_rows = None
    q = torch.randn(5, 4, 128).bfloat16()
    engine.impl.forward(engine.layer, q, q[:, :2], q[:, :2], torch.tensor([]), None, torch.zeros_like(q))
    rows = engine.impl._ring_rows
    assert rows.shape == (5, 2, 2, 16, 128) and rows.dtype == torch.bfloat16
    assert engine.impl.ring_bytes(engine.layer) == rows.nbytes == 5 * 2 * 2 * 16 * 128 * 2


@needs_gxx
def test_what_graphs_hold_is_there_before_the_first_step_and_stays(with_rings: None) -> None:
    engine = Engine()
    held = engine.impl._rings.token_slots.data_ptr(), engine.impl._ring_rows.data_ptr()
    assert (engine.impl._rings.token_slots == -1).all()
    engine.step([(0, 40)])
    engine.step([(0, 1), (1, 7)])
    assert held == (engine.impl._rings.token_slots.data_ptr(), engine.impl._ring_rows.data_ptr())
