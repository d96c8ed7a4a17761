"""The plugin's contract with the real vLLM: model on the meta device, cache specs, layout, groups, tensors and their views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vllm_models as models
import vllm_standin
from kvturbo import KVFormat
from kvturbo.config import PAGE_SIZE
from kvturbo.layout import PageLayout
from kvturbo.vllm.formats import cache_dtypes, format_of

pytestmark = pytest.mark.usefixtures("vllm_python")


@dataclass
class Planned:
    """What vLLM makes of a model: its layers, their specs, the layout, the groups of the cache."""

    config: Any
    specs: dict[str, Any]
    layout: Any
    cache: Any

    def backend(self, layer: str) -> type:
        backend: type = self.config.compilation_config.static_forward_context[layer].get_attn_backend()
        return backend

    def views(self) -> dict[str, torch.Tensor]:
        """The tensors that layers get, as the worker makes them, on the CPU."""
        from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs, create_kv_cache_views
        from vllm.v1.worker.gpu.attn_utils import init_attn_backend

        _, _, sizes = init_attn_backend(self.cache, self.config, torch.device("cpu"))
        views = {}
        for group, size in zip(self.cache.kv_cache_groups, sizes, strict=True):
            for tensor in self.cache.kv_cache_tensors:
                names = [name for name in tensor.layers if name in group.layer_names]
                if names:
                    spec = group.kv_cache_spec
                    spec = spec.kv_cache_specs[names[0]] if isinstance(spec, UniformTypeKVCacheSpecs) else spec
                    raw = torch.zeros(tensor.size, dtype=torch.int8)
                    made = create_kv_cache_views(raw, spec, self.cache.num_blocks, self.layout, tensor, size)
                    views |= {name: view for name, view in zip(tensor.layers, made, strict=True) if name in names}
        return views


def planned(model: dict[str, Any], cache_dtype: str = "turboquant", blocks: int = 6, **options: Any) -> Planned:
    from vllm.config import set_current_vllm_config
    from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups_from_builder
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    config = vllm_standin.config_of(model, cache_dtype, **options)
    vllm_standin.build(config)
    specs = get_kv_cache_spec(config)
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(get_current_attn_backends(config))]
    with set_current_vllm_config(config):
        layout = resolve_kv_cache_layout(config, [layouts], list(specs.values()))
        builder = get_kv_cache_config_builder(config)
        groups = get_kv_cache_groups_from_builder(builder, config, specs)
        return Planned(
            config, specs, layout, builder.get_kv_cache_config_from_groups(config, groups, num_blocks=blocks)
        )


def packed_layers(plan: Planned) -> list[str]:
    from kvturbo.vllm.backend import PackedBackend

    return [name for name in plan.specs if issubclass(plan.backend(name), PackedBackend)]


@pytest.mark.parametrize("cache_dtype", cache_dtypes())
def test_every_cache_dtype_packs_all_layers_of_a_dense_model(cache_dtype: str) -> None:
    plan = planned(models.DENSE, cache_dtype)
    fmt = format_of(cache_dtype, 128)
    assert packed_layers(plan) == list(plan.specs)
    for name, spec in plan.specs.items():
        assert plan.backend(name).cache_dtype == cache_dtype  # type: ignore[attr-defined]
        assert spec.page_size_bytes == 2 * fmt.page_bytes(PAGE_SIZE), name


def test_a_token_of_qwen_7b_takes_its_bytes_and_nothing_else() -> None:
    plan = planned(models.QWEN_7B)
    tensors = plan.cache.kv_cache_tensors
    assert sum(tensor.size for tensor in {tensor.offset: tensor for tensor in tensors}.values()) == sum(
        6 * spec.page_size_bytes for spec in plan.specs.values()
    )
    assert sum(spec.page_size_bytes / spec.block_size for spec in plan.specs.values()) == 28 * 4 * 132


@pytest.mark.parametrize(
    "model, options",
    [
        (models.DENSE, {}),
        (models.DENSE, {"block_size": 64}),
        (models.DENSE, {"block_size": 128}),
        (models.DENSE, {"kv_cache_dtype_skip_layers": ["0", "5"]}),
        (models.SLIDING, {}),
        (models.MAMBA, {}),
        (models.GATED_DELTA, {}),
        (models.LOCAL_CHUNKS, {}),
    ],
    ids=["dense", "block 64", "block 128", "skip layers", "sliding", "Mamba", "gated delta", "local chunks"],
)
def test_layers_get_whole_aligned_pages(
    model: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvturbo.vllm.attention import PackedAttention

    monkeypatch.setattr(PackedAttention, "backend", "reference")
    plan = planned(model, **options)
    views = plan.views()
    fmt = KVFormat.from_name("k4v4", 128)
    assert packed_layers(plan)
    for name in packed_layers(plan):
        impl = plan.config.compilation_config.static_forward_context[name].impl
        pages = impl._pages(views[name])
        assert PageLayout.page_size_of(fmt, pages.shape[2]) in (16, 32, 64)
        assert pages.data_ptr() == views[name].data_ptr() and pages.stride(0) % 16 == 0
        views[name].fill_(7)
        assert (pages == 7).all(), "a page reaches beyond its layer's tensor"


@pytest.mark.parametrize("model", [models.DENSE, models.SLIDING], ids=["dense", "sliding"])
@pytest.mark.parametrize("given, tokens", [(None, PAGE_SIZE), (16, 16), (32, 32), (64, 64)])
def test_blocks_are_of_the_faster_size_unless_the_user_says_otherwise(
    model: dict[str, Any], given: int | None, tokens: int
) -> None:
    plan = planned(model, **({} if given is None else {"block_size": given}))
    assert plan.config.cache_config.block_size == tokens
    assert all(plan.specs[name].block_size == tokens for name in packed_layers(plan))


def test_mamba_models_get_pages_of_the_faster_size() -> None:
    from kvturbo.vllm.backend import BACKENDS

    plan = planned(models.MAMBA)
    assert all(plan.specs[name].block_size % PAGE_SIZE == 0 for name in packed_layers(plan))
    assert not BACKENDS["turboquant"].supports_block_size(16) and BACKENDS["turboquant"].supports_block_size(528)


def test_blocks_that_are_not_split_into_pages_are_refused() -> None:
    from types import SimpleNamespace

    from kvturbo.vllm.metadata import _check_page

    with pytest.raises(ValueError, match="blocks of 128 tokens can't be split .* --block-size 16 or 32 or 64"):
        _check_page(SimpleNamespace(block_size=128))


@pytest.mark.parametrize(
    "model, packed",
    [(models.SLIDING, 2), (models.SOFT_CAP, 2), (models.SINKS, 2), (models.MAMBA, 2), (models.GATED_DELTA, 1),
     (models.HEAD_DIM_64, 4), (models.HEAD_DIM_256, 4), (models.LOCAL_CHUNKS, 4)],
    ids=["sliding", "soft cap", "sinks", "Mamba", "gated delta", "head_dim 64", "head_dim 256", "local chunks"],
)  # fmt: skip
def test_random_weights_are_made_loud_and_packed_layers_can_be_silenced(model: dict[str, Any], packed: int) -> None:
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    from vllm_engines import SINK, louder, outputs_of

    config = vllm_standin.config_of(model)
    built = vllm_standin.build(config, "cpu")
    for name, weight in built.named_parameters():
        initialize_single_dummy_weight(weight, name=name)
    louder(built, config)
    layers = config.compilation_config.static_forward_context
    names = [name for name, layer in layers.items() if getattr(getattr(layer, "impl", None), "fmt", None)]
    assert len(names) == packed
    assert all(0.1 < weight.abs().max() < 0.31 for weight in outputs_of(built, names))
    weights = dict(built.named_parameters())
    loud = [name for name in weights if "qkv_proj.weight" in name or "embed" in name]
    assert loud and all(0.01 < weights[name].abs().max() < 0.031 for name in loud)
    assert all(layers[name].impl.has_sinks == (model is models.SINKS) for name in names)
    if model is models.SINKS:
        assert all((layers[name].impl._sinks == SINK).all() for name in names)


def test_sinks_that_are_loaded_again_stay_where_graphs_look_for_them() -> None:
    from vllm.config import set_current_vllm_config

    from kvturbo.vllm.attention import PackedAttention

    weights = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    with set_current_vllm_config(vllm_standin.config_of(models.DENSE)):
        impl = PackedAttention(4, 128, 0.1, 2, kv_cache_dtype="turboquant", sinks=weights)
    impl.process_weights_after_loading(torch.bfloat16)
    before = impl._sinks
    weights.data.fill_(2)
    impl.process_weights_after_loading(torch.bfloat16)
    assert impl._sinks is before and (before == 2).all() and before.dtype == torch.float32


def test_a_result_that_flash_attention_puts_elsewhere_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.v1.attention.backends.fa_utils as fa

    from kvturbo.vllm import engine

    q, lse = torch.randn(1, 4, 128), torch.zeros(4, 1)
    monkeypatch.setattr(fa, "flash_attn_varlen_func", lambda q, k, v, out, **options: (q + 1, lse), raising=False)
    out = torch.zeros_like(q)
    bounds = torch.tensor([0, 1])
    got = engine.flash_attention(128, 0.1, None)(q, q, q, (bounds, bounds), (1, 1), False, out)
    assert got is lse and torch.equal(out, q + 1)


@pytest.mark.parametrize("bounds, causal, splits", [([0, 1], False, 0), ([0, 1, 2], False, 1), ([0, 1, 2], True, 0)])
def test_keys_of_several_prefixes_are_not_split(
    bounds: list[int], causal: bool, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.v1.attention.backends.fa_utils as fa

    from kvturbo.vllm import engine

    seen: list[int] = []
    flash = lambda q, k, v, out, **options: (seen.append(options["num_splits"]), (out, q))[1]  # noqa: E731
    monkeypatch.setattr(fa, "flash_attn_varlen_func", flash, raising=False)
    q, starts = torch.zeros(2, 4, 128), torch.tensor(bounds)
    engine.flash_attention(128, 0.1, None)(q, q, q, (starts, starts), (1, 1), causal, torch.empty_like(q))
    assert seen == [splits]


def test_pages_of_another_layout_are_refused_with_their_strides() -> None:
    plan = planned(models.DENSE)
    impl = plan.config.compilation_config.static_forward_context[next(iter(plan.specs))].impl
    tokens_first = torch.zeros(6, 16, 2, 132, dtype=torch.uint8).transpose(1, 2)
    with pytest.raises(ValueError, match="2 pages of 2112 bytes after one another.*strides"):
        impl._pages(tokens_first)


def test_skipped_layers_keep_16_bits_on_the_engines_backend() -> None:
    plan = planned(models.DENSE, kv_cache_dtype_skip_layers=["0", "5"])
    names = list(plan.specs)
    assert packed_layers(plan) == names[1:5]
    for name in (names[0], names[5]):
        assert plan.backend(name).__name__ == "FlashAttentionBackend"
        assert plan.specs[name].dtype == torch.bfloat16
    total = sum(spec.page_size_bytes / spec.block_size for spec in plan.specs.values())
    assert total == 4 * 2 * 132 + 2 * 2 * 512


@pytest.mark.parametrize("cache_dtype", ["turboquant", "kvturbo_k2v2", "kvturbo_k4v4-o16"])
def test_sliding_layers_keep_16_bits_and_the_pool_wastes_little(cache_dtype: str) -> None:
    plan = planned(models.SLIDING, cache_dtype)
    fmt = format_of(cache_dtype, 128)
    full = packed_layers(plan)
    assert [name.split(".")[2] for name in full] == ["2", "5"]
    for name in set(plan.specs) - set(full):
        spec = plan.specs[name]
        assert spec.dtype == torch.bfloat16 and spec.sliding_window == 256
        assert spec.page_size_bytes < 1.2 * PAGE_SIZE * 2 * 512
        assert issubclass(plan.backend(name), _flash_backend())
        impl = plan.config.compilation_config.static_forward_context[name].impl
        assert impl.kv_cache_dtype == "auto"
    for group in plan.cache.kv_cache_groups:
        spec = group.kv_cache_spec
        if set(group.layer_names) <= set(full):
            assert spec.page_size_padded is None, "a packed page is padded"
            assert spec.page_size_bytes == spec.block_size * 2 * fmt.bytes_per_token


def _flash_backend() -> type:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    backend: type = FlashAttentionBackend
    return backend


@pytest.mark.parametrize("cache_dtype", ["turboquant", "kvturbo_k2v2", "kvturbo_k4v4-o16"])
@pytest.mark.parametrize("model, packed", [(models.MAMBA, 2), (models.GATED_DELTA, 1)], ids=["Mamba", "gated delta"])
def test_layers_with_states_share_the_pool_and_attention_is_packed(
    model: dict[str, Any], packed: int, cache_dtype: str
) -> None:
    plan = planned(model, cache_dtype)
    assert len(packed_layers(plan)) == packed and len(plan.specs) == 4
    for name in packed_layers(plan):
        spec = plan.specs[name]
        size = format_of(cache_dtype, 128).bytes_per_token
        assert spec.page_size_padded is None and spec.page_size_bytes == spec.block_size * 2 * size


@pytest.mark.parametrize(
    "cache_dtype, backend, layout",
    [("auto", "FlashAttentionBackend", "LBNHC"), ("fp8", "FlashAttentionBackend", "LBNHC"),
     ("turboquant_4bit_nc", "TurboQuantAttentionBackend", "LBNHC"),
     ("turboquant_k8v4", "TurboQuantAttentionBackend", "LBNHC")],
)  # fmt: skip
def test_stock_cache_dtypes_are_served_as_without_the_plugin(cache_dtype: str, backend: str, layout: str) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plan = planned(models.DENSE, cache_dtype)
    override = AttentionBackendEnum.TURBOQUANT.is_overridden()
    from vllm.v1.attention.selector import _cached_get_attn_backend

    AttentionBackendEnum.TURBOQUANT.clear_override()
    _cached_get_attn_backend.cache_clear()
    try:
        without = planned(models.DENSE, cache_dtype)
    finally:
        from kvturbo.vllm.plugin import register

        register()
        _cached_get_attn_backend.cache_clear()
    assert override
    names = list(plan.specs)
    assert [plan.backend(name) for name in names] == [without.backend(name) for name in names]
    assert plan.specs == without.specs and plan.layout == without.layout
    assert plan.cache.kv_cache_tensors == without.cache.kv_cache_tensors
    assert plan.backend(names[3]).__name__ == backend and plan.layout.name == layout


def test_registering_twice_changes_nothing() -> None:
    from vllm.config.cache import KV_CACHE_DTYPES

    from kvturbo.vllm.plugin import register

    before = list(KV_CACHE_DTYPES)
    register()
    assert before == KV_CACHE_DTYPES


def test_padding_that_undoes_the_packing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvturbo.vllm.attention import PackedAttention

    monkeypatch.setattr(PackedAttention, "backend", "reference")
    plan = planned(models.SLIDING, kv_cache_dtype_skip_layers=["sliding_window"])
    with pytest.raises(ValueError, match="would be padded to 16384.*leave --kv-cache-dtype-skip-layers out"):
        plan.views()


def test_a_draft_models_chunk_sees_the_whole_prefix_although_the_host_knows_one_token_less() -> None:
    from types import SimpleNamespace

    from kvturbo.vllm.metadata import PackedMetadataBuilder

    layer = SimpleNamespace(impl=SimpleNamespace(piece_tokens=8192))
    builder: Any = SimpleNamespace(_unknown=1, kv_cache_spec=SimpleNamespace(block_size=32), layers=[layer])
    starts = torch.tensor([0, 514, 614], dtype=torch.int32)  # 513 and 99 tokens, and the sampled one of each
    common: Any = SimpleNamespace(
        query_start_loc=starts, query_start_loc_cpu=starts, num_reqs=2, block_table_tensor=torch.arange(80).view(2, 40),
        seq_lens_cpu_upper_bound=torch.tensor([1025, 99]),
    )  # fmt: skip
    [piece] = PackedMetadataBuilder._prompt_rows(builder, common, 0, 0).pieces
    assert piece.table.tolist() == [list(range(40))] and (piece.start, piece.stop) == (0, 512)


def test_the_line_at_the_start_names_what_is_packed() -> None:
    from kvturbo.vllm.report import layers_of, summary

    plan = planned(models.DENSE, kv_cache_dtype_skip_layers=["0", "5"])
    line = summary(layers_of(plan.config), 64 << 20, "no tokens are kept raw (why)")
    assert "k4v4 at head_dim 128, 132 bytes per token and KV head (512 in 16 bits)" in line
    assert "4 of 6 attention layers packed, 16 bits: 0,5 (skipped by flag)" in line
    assert f"hold {6 * 512 / (4 * 132 + 2 * 512):.2f} times the tokens" in line and "64 MiB" in line
    assert line.endswith("; no tokens are kept raw (why)")
