"""Outlier channels by layer name from a checkpoint, and the heads that a tensor-parallel rank has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvturbo import KVFormat
from kvturbo.guard import LayerPlan, Plan, read_plan, write_plan
from kvturbo.vllm import channels, report
from kvturbo.vllm.channels import SPIKED_SHARE, Checkpoint, heads_of_rank, outlier_channels

FMT = KVFormat.from_name("k4v4-o16", 128)
LAYER = "model.layers.3.self_attn.attn"
MODULE = SimpleNamespace(layer_name=LAYER, is_draft_layer=False)


def _folder(path: Path, **tensors: torch.Tensor) -> Path:
    save_file(
        {f"model.layers.3.self_attn.{name}": x.contiguous() for name, x in tensors.items()}, path / "a.safetensors"
    )
    save_file({"visual.layers.3.self_attn.k_proj.weight": torch.ones(4, 4)}, path / "b.safetensors")
    return path


def _weights(heads: int = 4) -> torch.Tensor:
    return torch.randn(heads * 128, 64, generator=torch.Generator().manual_seed(0)) / 8


def _config(folder: Path, heads: int, ranks: int = 1, load_format: str = "auto") -> Any:
    model = SimpleNamespace(
        model=str(folder), revision=None, get_total_num_kv_heads=lambda: heads,
        hf_text_config=SimpleNamespace(model_type="qwen2", rope_parameters={}),
    )  # fmt: skip
    load = SimpleNamespace(load_format=load_format, download_dir=None)
    return SimpleNamespace(
        model_config=model, load_config=load, parallel_config=SimpleNamespace(tensor_parallel_size=ranks)
    )


def _biased(heads: int = 4) -> tuple[torch.Tensor, list[list[int]]]:
    """A bias on 8 RoPE pairs of every head, other ones in each, and these channels."""
    bias, wanted = torch.zeros(heads, 128), []
    for head in range(heads):
        pairs = [5 * head + i for i in range(8)]
        bias[head, [p + 64 for p in pairs]] = 50.0
        wanted.append(sorted(pairs + [p + 64 for p in pairs]))
    return bias.flatten(), wanted


def test_a_constant_bias_decides(tmp_path: Path) -> None:
    bias, wanted = _biased()
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_proj.bias": bias})
    chosen = _chosen(folder, 4, 1, 0)
    assert chosen.tolist() == wanted and chosen.dtype == torch.int64


def _chosen(folder: Path, heads: int, ranks: int, rank: int, model_type: str = "qwen2") -> torch.Tensor:
    count, config = max(1, heads // ranks), _config(folder, heads, ranks)
    config.model_config.hf_text_config.model_type = model_type
    original = channels.tensor_rank
    channels.tensor_rank = lambda: rank
    try:
        return outlier_channels(MODULE, FMT, count, config)
    finally:
        channels.tensor_rank = original


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_have_the_channels_of_their_own_heads(tmp_path: Path, ranks: int) -> None:
    bias, wanted = _biased()
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_proj.bias": bias})
    for rank in range(ranks):
        heads = [rank * 4 // ranks] if ranks >= 4 else [2 * rank, 2 * rank + 1]
        assert _chosen(folder, 4, ranks, rank).tolist() == [wanted[head] for head in heads]


def test_heads_of_ranks_cover_all_heads_once_or_are_shared_evenly() -> None:
    assert [h for rank in range(4) for h in heads_of_rank(8, 2, 4, rank)] == list(range(8))
    assert [next(iter(heads_of_rank(2, 1, 8, rank))) for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_norm_of_keys_hides_the_projection(tmp_path: Path) -> None:
    gain = torch.ones(128)
    gain[[7, 9]] = 20
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_norm.weight": gain})
    chosen = _chosen(folder, 4, 1, 0)
    assert all({7, 71, 9, 73} <= set(row) for row in chosen.tolist())


@pytest.mark.parametrize(
    "model_type", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next_mtp", "gemma3_text", "gemma3"]
)
def test_norms_that_add_one_are_known_by_the_language_models_type_too(tmp_path: Path, model_type: str) -> None:
    gain = torch.full((128,), -0.9)  # channels are multiplied by 0.1, but for two
    gain[[7, 9]] = 0.0
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_norm.weight": gain})
    chosen = _chosen(folder, 4, 1, 0, model_type)
    assert all({7, 71, 9, 73} <= set(row) for row in chosen.tolist())


@pytest.mark.parametrize("model_type", ["glm4", "glm4v_text", "ernie4_5_vl_moe_text", "cohere2_moe"])
def test_neighbours_that_rope_turns_together_stay_together(tmp_path: Path, model_type: str) -> None:
    bias = torch.zeros(4, 128)
    bias[:, 21] = 50.0
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_proj.bias": bias.flatten()})
    chosen = _chosen(folder, 4, 1, 0, model_type)
    assert all({20, 21} <= set(row) for row in chosen.tolist())


def test_a_checkpoint_without_the_projection_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path, **{"qkv_proj.weight": _weights()})
    with pytest.raises(
        ValueError, match=r"no layers\.3\.self_attn\.k_proj\.weight of 4 heads, in 16 bits or more or in fp8"
    ):
        _chosen(folder, 4, 1, 0)


@pytest.mark.parametrize("layer", ["model.layers.3.attn.attn", "model.layers.3.attn"], ids=["gpt-oss", "Jamba"])
def test_a_layer_that_vllm_calls_otherwise_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    monkeypatch.setattr(channels, "tensor_rank", lambda: 0)
    bias, wanted = _biased()
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_proj.bias": bias})
    module = SimpleNamespace(layer_name=layer, is_draft_layer=False)
    assert outlier_channels(module, FMT, 4, _config(folder, 4)).tolist() == wanted
    assert Checkpoint(folder).biased(layer) and not Checkpoint(folder).biased(layer.replace("3", "4"))


@pytest.mark.parametrize(
    "name, shape",
    [("weight_scale", ()), ("weight_scale", (1,)), ("weight_scale", (512, 1)), ("weight_scale_inv", (4, 1)),
     ("weight_scale_inv", (4, 2))],
)  # fmt: skip
def test_weights_of_8_bits_count_with_their_scales(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    bias, wanted = _biased()
    scale = 0.01 * torch.ones(shape)
    tensors = {
        "k_proj.weight": (_weights() / 0.01).to(torch.float8_e4m3fn),
        "k_proj.bias": bias / 10,  # beside the weights themselves it is large, beside their 8 bits small
    }
    folder = _folder(tmp_path, **tensors, **{f"k_proj.{name}": scale})
    assert _chosen(folder, 4, 1, 0).tolist() == wanted
    assert Checkpoint(folder).key_weights(LAYER, 4, 128, False).second_moment.max() < 30


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_weights_without_a_scale_are_not_taken_for_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = _folder(tmp_path, **{"k_proj.weight": (10 * _weights()).to(dtype)})
    with pytest.raises(ValueError, match="or in fp8 or int8 with a weight_scale; -o formats need it"):
        _chosen(folder, 4, 1, 0)


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no safetensors in"):
        Checkpoint(tmp_path)


def test_random_weights_get_any_valid_channels(tmp_path: Path) -> None:
    chosen = outlier_channels(MODULE, FMT, 2, _config(tmp_path, 4, 2, "dummy"))
    assert chosen.shape == (2, 16)
    assert all(len(set(row)) == 16 and {c + 64 for c in row if c < 64} <= set(row) for row in chosen.tolist())


def test_a_bias_shows_in_the_share_of_energy_and_white_keys_do_not(tmp_path: Path) -> None:
    bias, _ = _biased()
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_proj.bias": bias})
    weights = Checkpoint(folder).key_weights(LAYER, 4, 128, False)
    assert weights.biased and weights.spiked_share() > SPIKED_SHARE
    plain = tmp_path / "plain"
    plain.mkdir()
    weights = Checkpoint(_folder(plain, **{"k_proj.weight": _weights()})).key_weights(LAYER, 4, 128, False)
    assert not weights.biased and weights.spiked_share() < SPIKED_SHARE / 2


def test_a_draft_model_has_channels_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "tensor_rank", lambda: 0)
    bias, wanted = _biased()
    folders = [tmp_path / name for name in ("target", "draft")]
    for folder, shift in zip(folders, (0, 1), strict=True):
        folder.mkdir()
        _folder(folder, **{"k_proj.weight": _weights(), "k_proj.bias": bias.roll(shift)})
    config = _config(folders[0], 4)
    draft_model = _config(folders[1], 4).model_config
    config.speculative_config = SimpleNamespace(draft_model_config=draft_model, method="draft_model")
    draft = SimpleNamespace(layer_name=LAYER, is_draft_layer=True)
    assert outlier_channels(MODULE, FMT, 4, config).tolist() == wanted
    assert outlier_channels(draft, FMT, 4, config).tolist() == [[c + 1 for c in row] for row in wanted]


def test_a_models_own_drafting_layers_have_channels_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channels, "tensor_rank", lambda: 0)
    bias, wanted = _biased()
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_proj.bias": bias})
    prefix = "mtp.layers.0.self_attn.k_proj"
    save_file({f"{prefix}.weight": _weights(), f"{prefix}.bias": bias.roll(1)}, folder / "c.safetensors")
    config = _config(folder, 4)
    config.speculative_config = SimpleNamespace(draft_model_config=config.model_config, method="mtp")
    draft = SimpleNamespace(layer_name="mtp.layers.0.self_attn.attn", is_draft_layer=True)
    for planned in (False, True):
        if planned:
            _write_plan(folder)
        assert outlier_channels(draft, FMT, 4, config).tolist() == [[c + 1 for c in row] for row in wanted]
    (folder / "kvturbo.json").unlink()
    prefix = "model.layers.0.self_attn.k_proj"
    save_file({f"{prefix}.weight": _weights(), f"{prefix}.bias": bias}, folder / "d.safetensors")
    channels._checkpoint.cache_clear()
    target = SimpleNamespace(layer_name="model.layers.0.self_attn.attn", is_draft_layer=False)
    assert outlier_channels(target, FMT, 4, config).tolist() == wanted


@pytest.mark.parametrize("name, warned", [("k4v4", True), ("k4v4-o16", False), ("k8v4", False)])
def test_a_large_bias_is_warned_of_once_where_the_format_will_not_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, warned: bool
) -> None:
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_proj.bias": _biased()[0]})
    layer = report.Layer(LAYER, KVFormat.from_name(name, 128), "", 1.0, 1.0, False)
    report._SAID.clear()
    for _ in range(2):
        report._warn_of_spikes([layer], _config(folder, 4))
    assert ("k_proj.bias; such models lose accuracy" in caplog.text) == warned
    assert len(caplog.records) == warned and (not warned or "kvturbo_k4v4-o16" in caplog.text)


def _write_plan(folder: Path, heads: int = 4, head_dim: int = 128, **formats: str) -> list[list[int]]:
    """A plan for layers 0 to 3 beside the model, whose channels the weights would not give."""
    rows = [[head + i for i in range(8)] + [head + 64 + i for i in range(8)] for head in range(heads)]
    layers = {i: LayerPlan(formats.get(f"layer{i}", "k4v4"), heads, head_dim, channels={16: rows}) for i in range(4)}
    write_plan(folder, Plan(layers))
    return rows


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_plan_beside_the_model_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load_format: str) -> None:
    folder = _folder(tmp_path, **{"k_proj.weight": _weights(), "k_proj.bias": _biased()[0]})
    wanted = _write_plan(folder)
    for rank in range(2):
        monkeypatch.setattr(channels, "tensor_rank", lambda rank=rank: rank)
        chosen = outlier_channels(MODULE, FMT, 2, _config(folder, 4, 2, load_format))
        assert chosen.tolist() == wanted[2 * rank : 2 * rank + 2] and chosen.dtype == torch.int64
    config = _config(folder, 4)
    assert channels.source_of_channels(config.model_config, config.load_config) == str(folder / "kvturbo.json")


@pytest.mark.parametrize(
    "plan, name, layer, message",
    [
        ({"heads": 2}, "k4v4-o16", LAYER, "is for another model: layer 3 has 2 KV heads of 128 there, 4 of 128 here"),
        ({}, "k4v4-o32", LAYER, r"has no 32 outlier channels for layer 3, but \[16\]"),
        (
            {},
            "k4v4-o16",
            "model.layers.7.self_attn.attn",
            "has no layer for model.layers.7.self_attn.attn; it has 0, 1, 2, 3",
        ),
    ],
    ids=["shape", "count", "layer"],
)
def test_a_plan_for_something_else_is_refused(
    tmp_path: Path, plan: dict[str, Any], name: str, layer: str, message: str
) -> None:
    _write_plan(tmp_path, **plan)
    module = SimpleNamespace(layer_name=layer, is_draft_layer=False)
    with pytest.raises(ValueError, match=message):
        outlier_channels(module, KVFormat.from_name(name, 128), 4, _config(tmp_path, 4))


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("k4v4", "k4v4-o16 for layers 0, 3; 16bit for layers 2; use --kv-cache-dtype kvturbo_k4v4-o16 and "
                 "--kv-cache-dtype-skip-layers 2"),
        ("k4v4-o16", "16bit for layers 2; use --kv-cache-dtype-skip-layers 2"),
    ],
)  # fmt: skip
def test_a_plan_that_wants_more_than_the_flag_gives_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str, wanted: str
) -> None:
    _write_plan(tmp_path, layer0="k4v4-o16", layer2="16bit", layer3="k4v4-o16")
    fmt = KVFormat.from_name(given, 128)
    layers = [report.Layer(f"model.layers.{i}.self_attn.attn", fmt, "", 1.0, 1.0, False) for i in range(4)]
    report._SAID.clear()
    for _ in range(2):
        report._warn_of_plan(layers, read_plan(tmp_path), "kvturbo.json")
    assert len(caplog.records) == 1
    assert caplog.text.rstrip().endswith(
        f"kvturbo.json asks for more than {given}, which --kv-cache-dtype gives to every packed layer: {wanted}"
    )


def test_a_plan_that_the_flag_satisfies_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write_plan(tmp_path, layer0="k4v3")
    layers = [
        report.Layer(LAYER.replace("3", str(i)), KVFormat.from_name("k4v4", 128), "", 1, 1, False) for i in range(4)
    ]
    report._SAID.clear()
    report._warn_of_plan(layers, read_plan(tmp_path), "kvturbo.json")
    assert not caplog.records
