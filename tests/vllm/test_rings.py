"""Which engines have rings of raw tokens, of what size, and what the log says; with the real vLLM's configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_models as models
import vllm_standin
from emulated_decode import SM_90
from kvturbo import KVFormat
from kvturbo.vllm import rings
from kvturbo.vllm.rings import Plan


@pytest.mark.parametrize(
    "given, size",
    [({}, 16), ({"kvturbo": {}}, 16), ({"kvturbo": {"recent": 0}}, 0), ({"kvturbo": {"recent": 32}}, 32),
     ({"other": {"recent": 3}}, 16), (SimpleNamespace(), 16)],
)  # fmt: skip
def test_the_size_is_what_the_user_gives_or_16(given: Any, size: int) -> None:
    assert rings.ring_size(given) == size


@pytest.mark.parametrize("size", [1, -1, 64, 16.0, "16", True, None])
def test_sizes_that_do_not_exist_are_refused(size: Any) -> None:
    with pytest.raises(
        ValueError, match="recent in --additional-config must be one of 0, 8, 16, 32, got " + repr(size)
    ):
        rings.ring_size({"kvturbo": {"recent": size}})


@pytest.mark.parametrize("options", [16, {"recents": 16}, {"recent": 16, "size": 1}], ids=str)
def test_other_options_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match='must be like {"recent": 16}, got '):
        rings.ring_size({"kvturbo": options})


def _plan(model: dict[str, Any] = models.DENSE, backend: str = "cuda", **options: Any) -> Plan:
    return rings.plan_of(vllm_standin.config_of(model, **options), backend)


@pytest.mark.parametrize("most, plan", [(1, Plan(16, 1)), (256, Plan(16, 256)), (257, Plan(16, 256, rings.IDLE))])
def test_there_are_as_many_rings_as_sequences_and_no_more_than_the_kernel_takes(
    vllm_python: None, most: int, plan: Plan
) -> None:
    assert _plan(max_num_seqs=most, max_num_batched_tokens=2048) == plan


def test_the_size_comes_from_the_command_line(vllm_python: None) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(["--additional-config", '{"kvturbo": {"recent": 8}}']).additional_config
    assert _plan(additional_config=given, max_num_seqs=4) == Plan(8, 4)
    assert _plan(additional_config={"kvturbo": {"recent": 0}}) == Plan(why="recent is 0")
    assert _plan(additional_config={}, max_num_seqs=4) == Plan(16, 4)


def test_a_wrong_size_stops_the_engine_at_the_start(vllm_python: None) -> None:
    config = vllm_standin.config_of(models.DENSE, additional_config={"kvturbo": {"recent": 4}})
    with pytest.raises(ValueError, match="recent in --additional-config must be one of 0, 8, 16, 32, got 4"):
        vllm_standin.build(config)


def test_connectors_take_the_rings_away(vllm_python: None) -> None:
    assert _plan(kv_offloading_size=1.0) == Plan(why="a KV connector fills blocks")


def test_hybrid_models_have_rings_unless_prefixes_end_within_blocks(vllm_python: None) -> None:
    assert _plan(models.SLIDING).count > 0
    assert _plan(models.MAMBA, enable_prefix_caching=False).count > 0
    align = _plan(models.MAMBA, enable_prefix_caching=True)
    assert align == Plan(why="blocks are copied where Mamba states are cached within blocks")


def test_microbatches_other_backends_dtypes_and_context_parallelism_have_none(vllm_python: None) -> None:
    assert _plan(backend="triton").why == "the triton backend is not given any"
    config = vllm_standin.config_of(models.DENSE)
    config.parallel_config.enable_dbo = True
    assert rings.plan_of(config, "cuda").why == "batches are cut into microbatches"
    config.parallel_config.decode_context_parallel_size = 2
    assert rings.plan_of(config, "cuda").why == "context parallelism"
    config.model_config.dtype = torch.float32
    assert rings.plan_of(config, "cuda").why == "dtype torch.float32 has none"


def test_drafting_layers_and_local_attention_have_none() -> None:
    plan = Plan(16, 256)
    assert rings.of_layer(SimpleNamespace(is_draft_layer=False), plan) is plan
    assert rings.of_layer(SimpleNamespace(is_draft_layer=True), plan) == Plan(why="drafting layers have none")
    local = SimpleNamespace(is_draft_layer=False, attention_chunk_size=8192)
    assert rings.of_layer(local, plan) == Plan(why="attention in local chunks has none")
    off = Plan(why="turned off")
    assert rings.of_layer(SimpleNamespace(is_draft_layer=True), off) is off


def test_vllms_layers_say_what_they_are(vllm_python: None) -> None:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention

    config = vllm_standin.config_of(models.DENSE)
    vllm_standin.build(config)
    layer = next(iter(config.compilation_config.static_forward_context.values()))
    assert isinstance(layer, Attention) and layer.is_draft_layer is False and not hasattr(layer, "attention_chunk_size")
    assert "attention_chunk_size" in ChunkedLocalAttention.__init__.__annotations__


def test_the_log_says_how_many_bytes_rings_take_on_this_rank(
    vllm_python: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvturbo.vllm import report

    said: list[str] = []
    monkeypatch.setattr(report, "_say", lambda level, text: said.append(text))
    config = vllm_standin.config_of(models.DENSE, max_num_seqs=128, kv_cache_dtype_skip_layers=["0", "5"])
    vllm_standin.build(config)
    report.report(config)
    mib = 4 * 128 * 2 * 2 * 16 * 128 * 2 / 2**20
    line = f"the newest 16 tokens of up to 128 sequences are also kept raw, in {mib:.0f} MiB of rings for 4 layers"
    assert line in said[0]


def test_the_log_says_why_there_are_none(vllm_python: None) -> None:
    plans = [Plan(why="a KV connector fills blocks"), Plan(why="drafting layers have none")]
    assert rings.line_of(plans, 0) == "no tokens are kept raw (a KV connector fills blocks)"
    assert "for 1 layers" in rings.line_of([*plans, Plan(8, 3)], 1 << 20)


@pytest.mark.parametrize("size", [0, 16])
def test_the_kernels_of_rings_are_loaded_before_the_first_step(
    vllm_python: None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvturbo.ops import warmup as operations
    from kvturbo.ops.decode import loading
    from kvturbo.vllm import schedules

    fmt, dtype, device = KVFormat.from_name("k4v4", 128), torch.bfloat16, torch.device("cpu")
    planned, loaded = [], []
    for module in (schedules, loading):
        monkeypatch.setattr(module, "limits_of", lambda device: SM_90)
    monkeypatch.setattr(schedules, "Schedule", lambda variant, *rest: planned.append(variant) or SimpleNamespace())
    monkeypatch.setattr(loading, "_code", lambda variant, device: b"")
    monkeypatch.setattr(loading, "kernels", lambda variant, device: loaded.append(variant))
    monkeypatch.setattr(operations.backends, "OPERATIONS", ("decode",))
    monkeypatch.setattr(operations.backends, "choose", lambda *arguments: "cuda")
    schedules.Schedules(fmt, 32, 28, 4, dtype, 256, 8, device, size)
    operations.warmup(
        fmt, num_q_heads=28, num_kv_heads=4, page_size=32, dtype=dtype, device=device, max_q_len=8, backend="cuda", ring_size=size
    )  # fmt: skip
    assert {variant.recent for variant in loaded} == {size} and set(planned) <= set(loaded)
