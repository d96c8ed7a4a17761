"""Batched measuring: tokens and pairs are those it says, calibration finds what was put in, codes with memory gain."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvturbo.config import KVFormat
from kvturbo.eval.calibration import calibrate
from kvturbo.eval.codec import Codec, packed_codec, rescaled
from kvturbo.eval.goals import check
from kvturbo.eval.measure import Passages, RetrievalMeasure, TextMeasure, cut_passages, paired
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.scoring import PackedReadsError
from kvturbo.eval.simulation import Simulation, run
from kvturbo.eval.tasks.retrieval import RetrievalTask
from kvturbo.eval.trellis import STATES, encode, levels, trellis_values
from tiny_model import HEAD_DIM, LAYERS

CPU = torch.device("cpu")


def codec_of(name: str) -> Codec:
    return packed_codec(KVFormat.from_name(name, HEAD_DIM))


def measure_of(tiny: LoadedModel, batch: int = 2) -> TextMeasure:
    ids, _ = cut_passages(tiny.text, 3, 160, bos=1, reserve=100, device=CPU)
    return TextMeasure(tiny.model, Passages(ids, prefix=100, chunk=16, batch=batch))


def test_passages_do_not_overlap_and_leave_the_calibration_text() -> None:
    text = np.arange(1000, dtype=np.int64)
    ids, rest = cut_passages(text, 4, 200, bos=None, reserve=100, device=CPU)
    assert ids.shape == (4, 201) and rest.tolist() == list(range(900, 1000))
    assert len(ids.unique()) == ids.numel() and ids.max() < 900
    with pytest.raises(ValueError, match="need more than 1000"):
        cut_passages(text, 5, 200, bos=None, reserve=100, device=CPU)


def test_every_token_after_the_prefix_is_scored_once(tiny: LoadedModel) -> None:
    measure = measure_of(tiny)
    figures = measure.measure(Simulation(codec_of("k4v4")))
    assert figures["scored_tokens"] == measure.passages.scored == 3 * 60
    starts = range(100, 160, 16)
    assert figures["packed_tokens_read"] == LAYERS * 3 * sum(starts)


def test_figures_are_those_of_one_row_after_another(tiny: LoadedModel) -> None:
    together, alone = (measure_of(tiny, batch).measure(Simulation(codec_of("k2v2"))) for batch in (3, 1))
    for name in ("kl_mean", "kl_p99.9", "nll"):
        assert together[name] == pytest.approx(alone[name], rel=1e-3)
    assert together["nll"] != pytest.approx(measure_of(tiny).measure(Simulation())["nll"], rel=1e-6)


def test_the_16_bit_cache_diverges_nowhere_from_itself(tiny: LoadedModel) -> None:
    figures = measure_of(tiny).measure(Simulation())
    assert figures["kl_p99.9"] < 1e-7 and figures["same_top1"] == 1 and figures["packed_tokens_read"] == 0


def test_a_pass_that_bypasses_the_codec_is_an_error(tiny: LoadedModel) -> None:
    class Bypassed(Simulation):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return Simulation().attend(layer, q, k, v, scale)

    with pytest.raises(PackedReadsError, match="read 0 packed tokens where its chunks ask for"):
        measure_of(tiny).measure(Bypassed(codec_of("k4v4")))


def test_retrieval_is_that_of_the_task(tiny: LoadedModel) -> None:
    """The same samples, the same questions, the same answers as chunk by chunk through a cache."""
    measure = RetrievalMeasure(tiny, "multikey-1k", prompts=3, batch=2)
    task = RetrievalTask("multikey-1k", prompts=3)
    from kvturbo.eval.caches import CacheSpec

    records = [task.measure(tiny, i, [CacheSpec("16bit")])["16bit"] for i in range(3)]
    expected = [answer for record in records for answer in record["correct"]]
    assert measure.right(None).tolist() == measure.reference.tolist() == expected
    assert len(measure.right(codec_of("k4v4"), prompts=2)) == 2 * 8


def test_retrieval_notices_lost_contexts(tiny: LoadedModel) -> None:
    measure = RetrievalMeasure(tiny, "multikey-1k", prompts=1, batch=1)
    measure.prefixes = [{i: (k[:, :, :-1], v[:, :, :-1]) for i, (k, v) in p.items()} for p in measure.prefixes]
    with pytest.raises(PackedReadsError):
        measure.right(codec_of("k4v4"))


def test_paired_differences_by_hand() -> None:
    reference = np.array([1] * 90 + [0] * 10 + [1] * 50, dtype=bool)
    right = np.array([1] * 84 + [0] * 6 + [1] * 2 + [0] * 8, dtype=bool)
    figures = paired(reference, right)
    assert (figures["lost"], figures["gained"], figures["questions"]) == (6, 2, 100)
    assert figures["difference"] == pytest.approx(-0.04)
    error = math.sqrt(8 - 16 / 100) / 100
    assert figures["difference_high"] == pytest.approx(-0.04 + 1.96 * error)
    assert figures["accuracy"] == 0.86 and figures["reference"] == 0.9


def test_calibration_finds_the_moments_of_the_cache(tiny: LoadedModel) -> None:
    ids = torch.from_numpy(tiny.text[None, :200])
    found = calibrate(tiny.model, ids)
    rounded, exact = Simulation(keep=True), Simulation(keep=True, raw_dtype=None)
    for simulation in (rounded, exact):
        run(tiny.model, ids, simulation)
    k, v = exact.kept[1]
    torch.testing.assert_close(found.moments[1].key.float(), k.square().mean((0, 2)))
    torch.testing.assert_close(found.means("v")[1].float(), v.mean((0, 2)))
    torch.testing.assert_close(found.means("k")[1], rounded.kept[1][0].float().mean((0, 2)))
    assert all((tokens >= 1).all() and (tokens <= 200).all() for tokens in found.effective_tokens.values())
    sharp = torch.cat(list(found.sharp_heads().values()))
    every = torch.cat(list(found.effective_tokens.values()))
    assert every[sharp].max() <= every[~sharp].min()


@torch.no_grad()
def _scaled(model: Any, factors: Tensor) -> Any:
    """Keys of the first layer times factors [d / 2], one for both channels of a pair, queries by the inverse."""
    model = copy.deepcopy(model)
    attention = model.model.layers[0].self_attn
    both = torch.cat((factors, factors)).to(attention.k_proj.weight)
    attention.k_proj.weight *= both[:, None]
    attention.q_proj.weight /= both.repeat(attention.q_proj.weight.shape[0] // HEAD_DIM)[:, None]
    return model


def test_folding_the_factors_undoes_a_rewrite_of_the_weights(tiny: LoadedModel) -> None:
    """Factors of a rewritten model are those of the model over what the rewrite put in."""
    ids = torch.from_numpy(tiny.text[None, :300])
    spread = (torch.randn(HEAD_DIM // 2, generator=torch.Generator().manual_seed(0)) * 1.5).exp()
    spread = spread / spread.log().mean().exp()
    before, after = (calibrate(model, ids).pair_factors()[0] for model in (tiny.model, _scaled(tiny.model, spread)))
    expected = before / torch.cat((spread, spread))
    torch.testing.assert_close(after, expected / expected.log().mean(-1, keepdim=True).exp(), rtol=0.02, atol=0)


def test_folding_keeps_the_error_of_scores_where_channels_are_uneven(tiny: LoadedModel) -> None:
    from kvturbo.eval.codec import scaled_keys

    spread = (torch.randn(HEAD_DIM // 2, generator=torch.Generator().manual_seed(0)) * 1.5).exp()
    loaded = replace(tiny, model=_scaled(tiny.model, spread))
    factors = calibrate(loaded.model, torch.from_numpy(tiny.text[None, -300:])).pair_factors()
    codec = codec_of("k4v4")
    plain = measure_of(tiny).measure(Simulation(codec, sides=("k",)))["kl_mean"]
    hard = measure_of(loaded).measure(Simulation(codec, sides=("k",)))["kl_mean"]
    folded = measure_of(loaded).measure(Simulation(scaled_keys(codec, factors), sides=("k",)))["kl_mean"]
    assert hard > 2 * plain and folded < 0.6 * hard


def test_trellis_codes_beat_the_scalar_code_of_equal_bits() -> None:
    """D of 2-bit Lloyd-Max is 0.1175, Shannon's bound 0.0625; 256 states give about 0.079 (Marcellin and Fischer, table II)."""
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(5))
    codec = rescaled(trellis_values(), "least_squares", "v")
    error = ((codec.restore(x[None, None], "v", 0)[0, 0] - x).square().sum() / x.square().sum()).item()
    assert 0.0625 < error < 0.088
    own = trellis_values().restore(x[None, None], "v", 0)[0, 0]
    assert ((x * own).sum(-1) / x.square().sum(-1) - 1).abs().max() < 1e-3, "unbiased, as the formats are"
    assert codec.bits_per_element(128) == 2.125


def test_trellis_paths_are_paths_and_no_single_change_is_better() -> None:
    """Every level of a path belongs to a state that the one before leads to: found by trying all 4^5 paths."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(6))
    table = levels()
    paths = torch.cartesian_prod(*[torch.arange(4)] * 5)
    state, reached = torch.zeros(len(paths), dtype=torch.int64), []
    for i in range(5):
        state = (state * 4 + paths[:, i]) % STATES
        reached.append(table[state])
    errors = (torch.stack(reached, 1)[None] - x[:, None]).square().sum(-1)
    best = (encode(x, table) - x).square().sum(-1)
    torch.testing.assert_close(best, errors.min(1).values)


def _row(name: str, kl: float, **facts: Any) -> dict[str, Any]:
    return {"section": "text", "case": "plain", "name": name, "setting": None, "kl_mean": kl} | facts


def test_goals_are_reached_missed_or_not_measured() -> None:
    rows = [_row("k4v4", 0.8), _row("vllm-4bit_nc", 1.0), _row("k3v3", 0.95), _row("vllm-3bit_nc", 1.0)]
    verdicts = {goal.text: goal.verdict for goal in check(rows)}
    assert verdicts["mean KL of k4v4 over vllm-4bit_nc"] == "reached"
    assert verdicts["mean KL of k3v3 over vllm-3bit_nc"] == "not reached"
    assert verdicts["mean KL of k4v3 over vllm-k3v4_nc"] == "not measured"


def test_too_few_questions_prove_nothing() -> None:
    row = {
        "section": "retrieval", "case": "plain", "name": "k4v4", "setting": "hard-8k",
        "difference": -0.001, "questions": 512, "bits_at_8k": 4.1,
    }  # fmt: skip
    goal = next(goal for goal in check([row]) if goal.text.startswith("hard-8k with k4v4"))
    assert goal.reached is None and "too few" in goal.found
    enough = next(goal for goal in check([row | {"questions": 2048}]) if goal.text.startswith("hard-8k with k4v4"))
    assert enough.reached
    low = [row | {"bits_at_8k": 2.8}, row | {"bits_at_8k": 2.9, "name": "k3v2", "questions": 2048, "difference": -0.03}]
    best = next(goal for goal in check(low) if "at most 2.9 bits" in goal.text)
    assert "(k3v2, 2.90 bits)" in best.text and best.found == "-3.00 points, n = 2,048" and best.reached
