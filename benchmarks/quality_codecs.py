"""What benchmarks/quality.py measures: formats, baselines, fixes and ablations, each a function from a model to a codec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from kvturbo.config import ALIASES, KVFormat, Side, SideFormat, format_names
from kvturbo.eval.codec import (
    SIXTEEN_BIT,
    Codec,
    OtherRule,
    by_layer,
    centred,
    mixed,
    packed_codec,
    plan_codec,
    rescaled,
    scaled_keys,
)
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.trellis import trellis_values
from kvturbo.guard import make_plan, moments_of_weights

if TYPE_CHECKING:
    from quality_rows import Subject

Entry = Callable[["Subject"], Codec]
MAIN = (
    *("16bit", "k8v4", "k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "fp8", "kivi4", "kivi2", "kvarn-k4v2", "quarot-int4"),
    *("vllm-k8v4", "vllm-4bit_nc", "vllm-k3v4_nc", "vllm-3bit_nc"),
)
"""Measured on all questions."""


def every_entry(head_dim: int) -> dict[str, Entry]:
    """All formats for a head_dim, then all baselines."""
    formats = {name: format_entry(name) for name in format_names(head_dim) if name not in ALIASES}
    codecs = {name: BASELINES.get(name).codec for name in BASELINES.names()}
    return formats | {name: _constant(codec) for name, codec in codecs.items() if codec is not None}


def format_entry(name: str) -> Entry:
    """A format by name, with outlier channels from the weights and its own windows."""

    def make(subject: Subject) -> Codec:
        fmt = KVFormat.from_name(name, subject.head_dim)
        return packed_codec(fmt, subject.loaded.outlier_channels(name))

    return make


def folded(base: Entry, alpha: float = 0.5) -> Entry:
    """Keys scaled per RoPE pair, as folding the factors into the projections does."""
    return lambda subject: scaled_keys(base(subject), subject.calibration.pair_factors(alpha))


def without_mean(base: Entry, side: Side) -> Entry:
    """The mean of the calibration text taken off keys or values."""

    def make(subject: Subject) -> Codec:
        return centred(base(subject), subject.calibration.means(side), side)

    return make


def windows(base: Entry, sink: int, recent: int) -> Entry:
    """Other 16-bit windows."""
    return lambda subject: replace(base(subject), sink=sink, recent=recent)


def guarded(base: str) -> Entry:
    """Every layer in the format that the guard chooses from the weights alone."""

    def make(subject: Subject) -> Codec:
        model = subject.loaded.model
        return plan_codec(make_plan(moments_of_weights(model.state_dict(), model.config.to_dict()), base))

    return make


def planned(bits: float) -> Entry:
    """The plan within so many bits that the losses of layers give, as `kvturbo plan` finds it."""
    return lambda subject: plan_codec(subject.plan(bits))


def altered(
    name: str,
    *,
    search: bool | None = None,
    k_rule: OtherRule | None = None,
    v_rule: OtherRule | None = None,
    rotate: bool | None = None,
    seed: int = 0,
) -> Entry:
    """A format with choices of the codec made otherwise."""

    def side(form: SideFormat) -> SideFormat:
        parts = tuple(replace(part, search=part.search if search is None else search) for part in form.parts)
        return replace(form, parts=parts, rotate=form.rotate if rotate is None else rotate)

    def make(subject: Subject) -> Codec:
        fmt = KVFormat.from_name(name, subject.head_dim, seed=seed)
        codec = packed_codec(replace(fmt, k=side(fmt.k), v=side(fmt.v)))
        if k_rule:
            codec = rescaled(codec, k_rule, "k")
        return rescaled(codec, v_rule, "v") if v_rule else codec

    return make


def edges_in_16_bits(name: str) -> Entry:
    """The first and the last layer are not packed."""

    def make(subject: Subject) -> Codec:
        last = subject.loaded.model.config.num_hidden_layers - 1
        codec = format_entry(name)(subject)
        layers = {i: SIXTEEN_BIT if i in (0, last) else codec for i in range(last + 1)}
        return by_layer(layers, (codec.sink, codec.recent))

    return make


def sharp_layers(more: str, less: str, sink: int | None = None, recent: int | None = None) -> Entry:
    """The half of the layers whose heads attend to the fewest tokens in `more`, the others in `less`, whose windows hold."""

    def make(subject: Subject) -> Codec:
        tokens = {i: t.log().mean().item() for i, t in subject.calibration.effective_tokens.items()}
        ranked = sorted(tokens, key=lambda i: tokens[i])
        sharp = set(ranked[: len(ranked) // 2])
        low = format_entry(less)(subject)
        layers = {i: format_entry(more)(subject) if i in sharp else low for i in tokens}
        return by_layer(layers, (low.sink if sink is None else sink, low.recent if recent is None else recent))

    return make


def with_trellis(name: str) -> Entry:
    """2-bit values by a trellis code, keys as the format has them."""

    def make(subject: Subject) -> Codec:
        fmt = KVFormat.from_name(name, subject.head_dim)
        return mixed(format_entry(name)(subject), trellis_values(), subject.head_dim, fmt.bytes_per_token)

    return make


def _constant(codec: Codec) -> Entry:
    return lambda _: codec


FOLDED = "folded"
PLAN_BITS = (2.5, 2.9, 3.2, 3.6)
FIXES: dict[str, Entry] = {
    "k4v4 guarded": guarded("k4v4"),
    f"k4v4 {FOLDED}": folded(format_entry("k4v4")),
    f"k3v3 {FOLDED}": folded(format_entry("k3v3")),
    "k4v4 value mean removed": without_mean(format_entry("k4v4"), "v"),
    f"k4v4 {FOLDED}, value mean removed": without_mean(folded(format_entry("k4v4")), "v"),
}
"""What helps on a hard case."""


def low_entries() -> dict[str, Entry]:
    """Settings of at most 2.9 bits at 8k beside the formats, and plans."""
    return {
        **{f"plan of at most {bits} bits": planned(bits) for bits in PLAN_BITS},
        f"k3v2 {FOLDED}": folded(format_entry("k3v2")),
        "k3v2 value mean removed": without_mean(format_entry("k3v2"), "v"),
        f"k3v2 {FOLDED}, value mean removed": without_mean(folded(format_entry("k3v2")), "v"),
        "k4v2 in sharp layers, k2v2": sharp_layers("k4v2", "k2v2"),
        f"k4v2 in sharp layers, k2v2, {FOLDED}": folded(sharp_layers("k4v2", "k2v2")),
        "k4v2 in sharp layers, k3v2, windows 4 + 0": sharp_layers("k4v2", "k3v2", 4, 0),
        "k3v3 in sharp layers, k3v2, windows 4 + 0": sharp_layers("k3v3", "k3v2", 4, 0),
        f"k3v3 in sharp layers, k3v2, windows 4 + 0, {FOLDED}": folded(sharp_layers("k3v3", "k3v2", 4, 0)),
        f"k4v2 in sharp layers, k3v2, windows 4 + 0, {FOLDED}": folded(sharp_layers("k4v2", "k3v2", 4, 0)),
    }


SEEDED = ("k4v4", "k4v3", "k4v2", "k3v3", "k3v2")
SEEDS = (1, 2, 3, 4)
"""Of the rotation, beside 0, which formats have."""


def seeded() -> dict[str, dict[int, Entry]]:
    """Formats with other rotations, by name and seed: as they are, without windows, with the least-squares scale for values."""
    found = {name: {seed: altered(name, seed=seed) for seed in SEEDS} for name in SEEDED}
    found["k3v3 without windows"] = {seed: windows(altered("k3v3", seed=seed), 0, 0) for seed in SEEDS}
    other = {
        f"{name} value scale least squares": {
            seed: altered(name, v_rule="least_squares", seed=seed) for seed in (0, *SEEDS)
        }
        for name in SEEDED
    }
    return found | other


def _ablations() -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for name in ("k4v4", "k4v3", "k4v2", "k3v3", "k3v2"):
        base = format_entry(name)
        found |= {
            f"{name}": base,
            f"{name} without search": altered(name, search=False),
            f"{name} key scale norm": altered(name, k_rule="norm"),
            f"{name} key scale least squares": altered(name, k_rule="least_squares"),
            f"{name} value scale norm": altered(name, v_rule="norm"),
            f"{name} value scale least squares": altered(name, v_rule="least_squares"),
            f"{name} both scales least squares": altered(name, k_rule="least_squares", v_rule="least_squares"),
            f"{name} without rotation": altered(name, rotate=False),
            f"{name} 16 outlier channels": format_entry(f"{name}-o16"),
            f"{name} without windows": windows(base, 0, 0),
            f"{name} windows 4 + 0": windows(base, 4, 0),
            f"{name} windows 4 + 128": windows(base, 4, 128),
            f"{name} first and last layer in 16 bits": edges_in_16_bits(name),
            f"{name} {FOLDED}": folded(base),
            f"{name} {FOLDED}, alpha 1": folded(base, 1.0),
            f"{name} key mean removed": without_mean(base, "k"),
            f"{name} value mean removed": without_mean(base, "v"),
            f"{name} {FOLDED}, value mean removed": without_mean(folded(base), "v"),
        }
    return found | {f"{name} trellis values": with_trellis(name) for name in ("k4v2", "k3v2")}


ABLATIONS = _ablations()
