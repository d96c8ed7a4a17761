"""What the plugin says when an engine starts: one line on the cache, and a warning where a format will not do."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvturbo.config import KVFormat
from kvturbo.guard import Plan
from kvturbo.guard.plan import SIXTEEN_BIT
from kvturbo.vllm.channels import (
    SPIKED_SHARE,
    checkpoint_of,
    layer_number,
    plan_of,
    plan_path,
    source_of_channels,
    unit_offset,
)
from kvturbo.vllm.formats import PREFIX
from kvturbo.vllm.rings import line_of

_LOG = logging.getLogger("vllm.kvturbo")
_SAID: set[str] = set()


@dataclass(frozen=True)
class Layer:
    """A layer's cache.

    Attributes:
        name: vLLM's.
        packed: its format, or None.
        why: why it is not packed.
        nbytes: of a token, all heads of this rank, padding included.
        dense: of a token in 16 bits.
        window: whether its cache stops growing.
    """

    name: str
    packed: KVFormat | None
    why: str
    nbytes: float
    dense: float
    window: bool


def layers_of(vllm_config: Any) -> list[Layer]:
    """The attention layers of a model in order, and what a token costs in each."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.utils import customize_attention_spec

    layers = []
    for name, module in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(module, Attention) or module.kv_sharing_target_layer_name:
            continue
        spec = module.get_kv_cache_spec(vllm_config)
        if spec is None:
            continue
        spec = customize_attention_spec(module.get_attn_backend(), spec)
        packed, window = getattr(module.impl, "fmt", None), module.sliding_window is not None
        why = "" if packed else "sliding window" if window else "skipped by flag"
        dense = 2 * spec.num_kv_heads * (spec.head_size + spec.head_size_v)
        layers.append(Layer(name, packed, why, spec.page_size_bytes / spec.block_size, dense, window))
    return layers


def summary(layers: Iterable[Layer], workspace_bytes: int, rings: str) -> str:
    """The line; `rings` says which tokens are kept raw."""
    layers = list(layers)
    packed = [layer for layer in layers if layer.packed]
    fmts = {(f.name, f.head_dim): f.bytes_per_token for f in (layer.packed for layer in packed) if f}
    what = ", ".join(
        f"{name} at head_dim {d}, {size} bytes per token and KV head ({4 * d} in 16 bits)"
        for (name, d), size in fmts.items()
    )
    others: dict[str, list[str]] = {}
    for i, layer in enumerate(layers):
        if not layer.packed:
            others.setdefault(layer.why, []).append(str(i))
    rest = "".join(f", 16 bits: {','.join(numbers)} ({why})" for why, numbers in others.items())
    growing = [layer for layer in layers if not layer.window]
    capacity = sum(layer.dense for layer in growing) / sum(layer.nbytes for layer in growing)
    return (
        f"kvturbo: {what}; {len(packed)} of {len(layers)} attention layers packed{rest}; the layers that grow with the context "
        f"hold {capacity:.2f} times the tokens of a 16-bit cache; prompts take {workspace_bytes / 2**20:.0f} MiB of workspace, "
        f"whatever their length; {rings}"
    )


def report(vllm_config: Any) -> None:
    """Logs the line and the warning, each once per process, on the first rank only."""
    from vllm.distributed.parallel_state import is_global_first_rank

    if not is_global_first_rank():
        return
    layers = layers_of(vllm_config)
    modules = vllm_config.compilation_config.static_forward_context
    packed = [modules[layer.name] for layer in layers if layer.packed]
    plans, nbytes = [x.impl.ring_plan(x) for x in packed], sum(x.impl.ring_bytes(x) for x in packed)
    _say(logging.INFO, summary(layers, max(x.impl.workspace_bytes for x in packed), line_of(plans, nbytes)))
    model, load = vllm_config.model_config, vllm_config.load_config
    if any(layer.packed and layer.packed.outliers for layer in layers):
        _say(logging.INFO, f"kvturbo: outlier channels from {source_of_channels(model, load)}")
    own, plan = [layer for layer in layers if not modules[layer.name].is_draft_layer], plan_of(model)
    if plan is not None:
        _warn_of_plan(own, plan, str(plan_path(model)))
    elif load.load_format != "dummy":
        _warn_of_spikes(own, vllm_config)


def _warn_of_plan(layers: list[Layer], plan: Plan, path: str) -> None:
    """A plan may want more for a layer than the one format that the flag gives to all."""
    wanted: dict[str, list[int]] = {}
    given = set()
    for layer in layers:
        number = layer_number(layer.name)
        if layer.packed is None or number is None or number not in plan.layers:
            continue
        given.add(layer.packed.name)
        if _wants_more(plan.layers[number].format, layer.packed):
            wanted.setdefault(plan.layers[number].format, []).append(number)
    if not wanted:
        return
    what = "; ".join(f"{name} for layers {', '.join(map(str, numbers))}" for name, numbers in wanted.items())
    dense = wanted.pop(SIXTEEN_BIT, [])
    advice = [f"--kv-cache-dtype-skip-layers {' '.join(map(str, dense))}"] if dense else []
    if wanted:
        head_dim = next(layer.packed.head_dim for layer in layers if layer.packed)
        most = max(wanted, key=lambda name: KVFormat.from_name(name, head_dim).k.nbytes)
        advice.insert(0, f"--kv-cache-dtype {PREFIX}{most}")
    _say(
        logging.WARNING,
        f"kvturbo: {path} asks for more than {', '.join(sorted(given))}, which --kv-cache-dtype gives to every packed layer: "
        f"{what}; use {' and '.join(advice)}",
    )


def _wants_more(wanted: str, given: KVFormat) -> bool:
    """Whether a plan's format stores more of keys or values than the given one does."""
    if wanted == SIXTEEN_BIT:
        return True
    fmt = KVFormat.from_name(wanted, given.head_dim)
    return fmt.k.nbytes > given.k.nbytes or fmt.v.nbytes > given.v.nbytes


def _warn_of_spikes(layers: list[Layer], vllm_config: Any) -> None:
    """Keys with a large constant bias (Qwen2, Qwen2.5) lose their small channels at 4 bits and fewer."""
    model = vllm_config.model_config
    shares: dict[str, float] = {}
    for layer in layers:
        fmt = layer.packed
        if fmt is None or fmt.outliers or fmt.k.parts[0].bits == 8:
            continue
        try:
            checkpoint = checkpoint_of(model, vllm_config.load_config)
            if not checkpoint.biased(layer.name):
                continue
            weights = checkpoint.key_weights(
                layer.name, model.get_total_num_kv_heads(), fmt.head_dim, unit_offset(model.hf_text_config)
            )
        except (OSError, ValueError) as error:
            _say(logging.WARNING, f"kvturbo: the keys' outliers were not looked at: {error}")
            return
        if weights.biased:
            shares[layer.name] = weights.spiked_share()
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is not None and shares[worst] > SPIKED_SHARE:
        _say(
            logging.WARNING,
            f"kvturbo: {shares[worst]:.0%} of the energy of a head's keys lies in 16 channels ({worst}), because of "
            "k_proj.bias; such models lose accuracy unless these channels are kept apart: use a format with -o16, such as "
            "--kv-cache-dtype kvturbo_k4v4-o16",
        )


def _say(level: int, text: str) -> None:
    if text not in _SAID:
        _SAID.add(text)
        _LOG.log(level, text)
