"""The rows of benchmarks/quality.py: which codec is measured on which model and task, in the order of their weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from quality_codecs import ABLATIONS, FIXES, MAIN, Entry, every_entry, low_entries, seeded

from kvturbo.config import SIDES
from kvturbo.eval.calibration import Calibration, calibrate
from kvturbo.eval.codec import ByLayer, Codec
from kvturbo.eval.measure import Passages, RetrievalMeasure, TextMeasure, cut_passages
from kvturbo.eval.model import LoadedModel
from kvturbo.eval.registry import BASELINES
from kvturbo.eval.retrieval import get_setting
from kvturbo.eval.simulated_plans import PlanSearch, question_rows, text_rows
from kvturbo.eval.simulation import Simulation
from kvturbo.guard import Plan, make_plan
from kvturbo.hf.calibration import moments_of_text
from kvturbo.hf.fold import fold

PLAIN, CONTROL, REPAIRED = "plain", " control", ", weights folded"
REPAIRED_ENTRIES = ("k4v4", "k3v3")
"""Measured on a case whose weights `kvturbo.hf.fold` has rewritten."""
RETRIEVAL = ("hard-8k", "multikey-8k")
BY_LENGTH = ("multikey-1k", "multikey-4k", "needle-4k", "needle-8k", "hops-4k", "hops-8k", "hard-4k")
LENGTH_ENTRIES = ("k4v4", "k4v2", "k3v3", "k3v2", "k2v2", "vllm-4bit_nc", "vllm-3bit_nc", "kivi2")
EASY = (*MAIN, "k2v2", "tq3.5", "tq2.5", "qjl3", "pr38280")
"""Measured on the easier retrieval setting too."""
CASE_FORMATS = ("k4v4", "k4v3", "k4v2", "k3v3", "k3v2", "k8v4", "k4v4-o16", "k4v4-o32")
"""Measured on every case, beside all baselines and fixes."""
MOST_PROMPTS = 128
"""Contexts of a retrieval setting: those of one question each give fewer questions."""
PLAN_PROMPTS = 8
"""Retrieval contexts that plans are compared on, beside the calibration text."""
LAYER_FORMAT = "k3v3"
SIDE_FORMATS = ("k4v4", "k3v3", "k2v2")
HEAD_FORMATS = ("k4v2", "k3v3 without windows")
"""Of equal bits and without windows, so that only the split between keys and values differs."""
CONTEXT = 8192
"""Tokens for which bits with windows are given."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured; see the options of benchmarks/quality.py."""

    tokens: int
    length: int
    prefix: int
    chunk: int
    questions: int
    few: int
    batch: int
    calibration: int

    def facts(self) -> dict[str, int]:
        """What rows have to share to be compared; a batch changes fp8's scales only, but is among it."""
        return asdict(self)

    @property
    def rows(self) -> int:
        """Rows of text."""
        return math.ceil(self.tokens / (self.length - self.prefix))


class Subject:
    """A model with its passages, contexts and calibration, each made when first asked for.

    Args:
        loaded: the model.
        sizes: how much.
    """

    def __init__(self, loaded: LoadedModel, sizes: Sizes) -> None:
        self.loaded, self.sizes = loaded, sizes
        ids, rest = cut_passages(
            loaded.text, sizes.rows, sizes.length, bos=loaded.tokenizer.bos_token_id,
            reserve=sizes.calibration, device=loaded.device,
        )  # fmt: skip
        self._passages, self._rest = Passages(ids, sizes.prefix, sizes.chunk, sizes.batch), rest
        self._text: TextMeasure | None = None
        self._calibration: Calibration | None = None
        self._retrieval: tuple[str, int, RetrievalMeasure] | None = None
        self._search: PlanSearch | None = None
        self._plans: dict[float, Plan] = {}

    @property
    def head_dim(self) -> int:
        return self.loaded.model.config.head_dim

    @property
    def calibration_ids(self) -> torch.Tensor:
        """[1, T] int64, text that is not scored."""
        return self._rest[None]

    @property
    def calibration(self) -> Calibration:
        if self._calibration is None:
            self._calibration = calibrate(self.loaded.model, self.calibration_ids)
        return self._calibration

    @property
    def text(self) -> TextMeasure:
        if self._text is None:
            self._text = TextMeasure(self.loaded.model, self._passages)
        return self._text

    def plan(self, bits: float) -> Plan:
        """The best plan of at most so many bits, measured on the calibration text and on contexts that are not scored."""
        if self._search is None:
            model, sizes = self.loaded.model, self.sizes
            rows = [
                text_rows(model, self.calibration_ids, min(sizes.prefix, sizes.calibration // 2), sizes.chunk),
                question_rows(self.loaded, get_setting(RETRIEVAL[0]), PLAN_PROMPTS),
            ]
            self._search = PlanSearch(rows, make_plan(self.calibration.moments))
        if bits not in self._plans:
            self._plans[bits] = self._search.find(bits, CONTEXT)
        return self._plans[bits]

    def retrieval(self, setting: str, questions: int) -> RetrievalMeasure:
        """Contexts for at least so many questions; those of one setting are kept."""
        if self._retrieval is None or self._retrieval[0] != setting or self._retrieval[1] < questions:
            self._retrieval = None  # frees the contexts before others are read
            prompts = _prompts(questions, get_setting(setting).questions)
            measure = RetrievalMeasure(self.loaded, setting, prompts, self.sizes.batch)
            self._retrieval = setting, questions, measure
        return self._retrieval[2]


class Bench:
    """All subjects; one besides the plain model is kept at a time.

    Args:
        loaded: the plain model.
        sizes: how much.
        cases: rewrites of the model by name, which keep its function.
    """

    def __init__(self, loaded: LoadedModel, sizes: Sizes, cases: Mapping[str, Callable[[Any], Any]]) -> None:
        self.loaded, self.sizes, self.cases = loaded, sizes, cases
        self._kept: dict[str, Subject] = {}

    def subject(self, case: str) -> Subject:
        """The plain model ("plain") or a case of it."""
        if case not in self._kept:
            self._kept = {name: kept for name, kept in self._kept.items() if name == PLAIN}
            loaded = self.loaded if case == PLAIN else replace(self.loaded, model=self._rewritten(case), _channels={})
            self._kept[case] = Subject(loaded, self.sizes)
        return self._kept[case]

    def _rewritten(self, case: str) -> Any:
        device = self.loaded.device
        if case.endswith(REPAIRED):
            hard = self._rewritten(case.removesuffix(REPAIRED))
            calibration = self.subject(PLAIN).calibration_ids
            return fold(hard, moments_of_text(hard, calibration)).to(device).eval()
        source = self.loaded.model.to("cpu")
        model = self.cases[case](source).to(device).eval()
        source.to(device)
        return model


@dataclass(frozen=True)
class Job:
    """A row to measure."""

    section: str
    case: str
    name: str
    setting: str | None
    measure: Callable[[Bench], dict[str, Any]]

    def facts(self) -> dict[str, Any]:
        return {"section": self.section, "case": self.case, "name": self.name, "setting": self.setting}


def jobs(bench: Bench) -> Iterator[Job]:
    """All rows, those that figures to reach need first."""
    head_dim = bench.loaded.model.config.head_dim
    entries, low = every_entry(head_dim), low_entries()
    yield from (_text("text", PLAIN, name, entry) for name, entry in entries.items())
    for setting in RETRIEVAL:
        for name, entry in {"16bit": None, **entries, **low}.items():
            if setting == RETRIEVAL[0] or name in EASY or name in low:
                yield _retrieval("retrieval", PLAIN, name, entry, setting, name in MAIN or name in low, bench.sizes)
    yield from (_text("text", PLAIN, name, entry) for name, entry in low.items())
    for name, by_seed in seeded().items():
        yield from (_text("seeds", PLAIN, name, entry, str(seed)) for seed, entry in by_seed.items())
    for case in bench.cases:
        yield from _case(case, entries, bench.sizes)
    yield from (_text("ablation", PLAIN, name, entry) for name, entry in ABLATIONS.items())
    yield from _heads(entries)
    yield from _sides(bench, entries)
    for setting in BY_LENGTH:
        for name in ("16bit", *LENGTH_ENTRIES):
            yield _retrieval("length", PLAIN, name, entries.get(name), setting, False, bench.sizes)


def _case(case: str, entries: dict[str, Entry], sizes: Sizes) -> Iterator[Job]:
    if case.endswith(CONTROL):
        yield _text("case", case, "k4v4", entries["k4v4"])
        return
    names = [name for name in entries if name in CASE_FORMATS or name in BASELINES.names()]
    chosen = {name: entries[name] for name in names} | FIXES
    for name, entry in chosen.items():
        yield _text("case", case, name, entry)
    for name in ("16bit", *chosen):
        yield _retrieval("case-retrieval", case, name, chosen.get(name), RETRIEVAL[0], False, sizes)
    for name in REPAIRED_ENTRIES:
        yield _text("case", case + REPAIRED, name, entries[name])
    for name in ("16bit", *REPAIRED_ENTRIES):
        yield _retrieval("case-retrieval", case + REPAIRED, name, entries.get(name), RETRIEVAL[0], False, sizes)


def _heads(entries: dict[str, Entry]) -> Iterator[Job]:
    """Only the sharp half of all KV heads packed, or only the diffuse half."""
    for name in HEAD_FORMATS:
        for sharp in (True, False):

            def measure(bench: Bench, name: str = name, sharp: bool = sharp) -> dict[str, Any]:
                subject = bench.subject(PLAIN)
                chosen = subject.calibration.sharp_heads()
                heads = {layer: mask if sharp else ~mask for layer, mask in chosen.items()}
                tokens = torch.cat([subject.calibration.effective_tokens[i][heads[i]] for i in sorted(heads)])
                figures = subject.text.measure(Simulation((entries | ABLATIONS)[name](subject), heads=heads))
                return figures | {"heads": len(tokens), "effective_tokens": tokens.log().mean().exp().item()}

            yield Job("heads", PLAIN, name, "sharp" if sharp else "diffuse", measure)


def _sides(bench: Bench, entries: dict[str, Entry]) -> Iterator[Job]:
    """Only keys or only values packed, in all layers or in one."""
    layers = range(bench.loaded.model.config.num_hidden_layers)
    kv_heads = bench.loaded.model.config.num_key_value_heads
    plan: list[tuple[str, int | None]] = [(name, None) for name in SIDE_FORMATS]
    plan += [(LAYER_FORMAT, layer) for layer in layers]
    for name, only in plan:
        for side in SIDES:

            def measure(bench: Bench, name: str = name, only: int | None = only, side: Any = side) -> dict[str, Any]:
                subject = bench.subject(PLAIN)
                heads = None if only is None else {i: torch.full((kv_heads,), i == only) for i in layers}
                return subject.text.measure(Simulation(entries[name](subject), heads=heads, sides=(side,)))

            yield Job("sides", PLAIN, name, f"{side} {'all' if only is None else only}", measure)


def _text(section: str, case: str, name: str, entry: Entry, setting: str | None = None) -> Job:
    def measure(bench: Bench) -> dict[str, Any]:
        subject = bench.subject(case)
        codec = entry(subject)
        return _size(codec, subject) | subject.text.measure(Simulation(codec))

    return Job(section, case, name, setting, measure)


def _retrieval(section: str, case: str, name: str, entry: Entry | None, setting: str, many: bool, sizes: Sizes) -> Job:
    def measure(bench: Bench) -> dict[str, Any]:
        subject = bench.subject(case)
        asked = sizes.questions if section == "retrieval" else sizes.few
        measured = subject.retrieval(setting, asked)
        codec = None if entry is None else entry(subject)
        prompts = _prompts(sizes.questions if many else sizes.few, measured.questions_each)
        return _size(codec, subject) | measured.measure(codec, prompts)

    return Job(section, case, name, setting, measure)


def _prompts(questions: int, each: int) -> int:
    return min(math.ceil(questions / each), MOST_PROMPTS)


def _size(codec: Codec | None, subject: Subject) -> dict[str, Any]:
    if codec is None:
        return {"bits": 16.0, "bits_at_8k": 16.0, "source": "bf16"}
    layers = {"layers": codec.described()} if isinstance(codec, ByLayer) else {}
    return {
        "bits": codec.bits_per_element(subject.head_dim),
        "bits_at_8k": codec.bits_at(subject.head_dim, CONTEXT),
        "source": codec.source,
    } | layers
