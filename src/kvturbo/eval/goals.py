"""The figures that the comparison is to reach, written down before it was run, and whether rows reach them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
MOST_BITS = 2.9
ENOUGH_QUESTIONS = 2000


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        text: what it is.
        target: the passing mark.
        found: the figure, or why there is none.
        reached: None if it was not measured.
    """

    text: str
    target: str
    found: str
    reached: bool | None

    @property
    def verdict(self) -> str:
        if self.reached is None:
            return "not measured"
        return "shown" if self.target == "shown" else "reached" if self.reached else "not reached"


RATIOS = (
    ("k4v4", "vllm-4bit_nc", 0.88),
    ("k3v3", "vllm-3bit_nc", 0.90),
    ("k3v3 without windows", "vllm-3bit_nc", 0.90),
    ("k4v3", "vllm-k3v4_nc", 0.90),
)
"""Format, baseline, largest ratio of mean KL."""
CASES = (
    ("key-bias", "k4v4 guarded", 1.2),
    ("key-bias, weights folded", "k4v4", 1.2),
    ("key-scale, weights folded", "k4v4", 1.2),
    ("value-mean, weights folded", "k4v4", 1.2),
)
"""Hard case, fix, largest ratio of mean KL to the plain model's k4v4."""


def check(rows: Sequence[Row]) -> list[Goal]:
    """All goals against the rows of a report."""
    return [*_ratios(rows), *_retrieval(rows), *_cases(rows), *_low(rows), *_reported(rows)]


def find(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """The row with these facts, or None."""
    return next((row for row in rows if all(row.get(name) == value for name, value in wanted.items())), None)


def over_rotations(rows: Sequence[Row], name: str) -> list[float]:
    """Mean KL of a format for every rotation that was measured, the format's own first."""
    own = _plain(rows, name)
    found = [row["kl_mean"] for row in rows if row["section"] == "seeds" and row["name"] == name]
    return found if own is None else [own["kl_mean"], *found]


def _ratios(rows: Sequence[Row]) -> Iterator[Goal]:
    for name, other, most in RATIOS:
        pair = [_plain(rows, which) for which in (name, other)]
        yield _ratio(f"mean KL of {name} over {other}", pair[0], pair[1], most)
        rotations = over_rotations(rows, name)
        if len(rotations) > 1:
            mean = {"kl_mean": sum(rotations) / len(rotations)}
            yield _ratio(f"the same, mean of {len(rotations)} rotations", mean, pair[1], most)


def _cases(rows: Sequence[Row]) -> Iterator[Goal]:
    plain = _plain(rows, "k4v4")
    for case, fix, most in CASES:
        row = find(rows, section="case", case=case, name=fix)
        yield _ratio(f"mean KL of {fix} on {case} over k4v4 on the plain model", row, plain, most)
        control = find(rows, section="case", case=f"{case.partition(',')[0]} control", name="k4v4")
        if control is not None:
            yield _ratio(f"mean KL of {fix} on {case} over k4v4 on its control", row, control, most)


def _plain(rows: Sequence[Row], name: str) -> Row | None:
    """A row of text on the plain model, an ablation's if there is no other."""
    found = [find(rows, section=section, case="plain", name=name) for section in ("text", "ablation")]
    return found[0] or found[1]


def _retrieval(rows: Sequence[Row]) -> Iterator[Goal]:
    for setting in ("hard-8k", "multikey-8k"):
        row = find(rows, section="retrieval", case="plain", name="k4v4", setting=setting)
        yield _points(f"{setting} with k4v4, of at least {ENOUGH_QUESTIONS:,} paired questions", row, 1.0)


def _low(rows: Sequence[Row]) -> Iterator[Goal]:
    small = [
        row for row in rows
        if row["section"] == "retrieval" and row["setting"] == "hard-8k" and row["bits_at_8k"] <= MOST_BITS
    ]  # fmt: skip
    best = max(small, key=lambda row: (row["questions"] >= ENOUGH_QUESTIONS, row["difference"]), default=None)
    name = "" if best is None else f" ({best['name']}, {best['bits_at_8k']:.2f} bits)"
    yield _points(f"hard-8k with the best setting of at most {MOST_BITS} bits, windows counted{name}", best, 5.0)


def _reported(rows: Sequence[Row]) -> Iterator[Goal]:
    """Figures that have no mark to reach, and have to be there."""
    biased, plain = find(rows, section="case", case="key-bias", name="k4v4"), _plain(rows, "k4v4")
    found, known = _quotient(biased, plain, 1)
    yield Goal("mean KL of k4v4 on key-bias without the guard, over the plain model", "shown", found, known)
    found, known = _quotient(_plain(rows, "k3v3 windows 4 + 0"), _plain(rows, "vllm-3bit_nc"), 3)
    yield Goal("mean KL of k3v3 with 4 sink tokens and no other window over vllm-3bit_nc", "shown", found, known)
    split = [find(rows, section="heads", name="k4v2", setting=setting) for setting in ("sharp", "diffuse")]
    both = all(row is not None for row in split)
    shown = ", ".join(f"{row['kl_mean']:.3g}" for row in split if row is not None) if both else "-"
    yield Goal("mean KL of k4v2 in sharp heads only, in diffuse heads only", "shown", shown, True if both else None)


def _quotient(row: Row | None, other: Row | None, digits: int) -> tuple[str, bool | None]:
    if row is None or other is None:
        return "-", None
    return ("NaN" if row["kl_mean"] is None else f"{row['kl_mean'] / other['kl_mean']:.{digits}f}"), True


def _ratio(text: str, row: Row | None, other: Row | None, most: float) -> Goal:
    if row is None or other is None:
        return Goal(text, f"<= {most}", "-", None)
    found = row["kl_mean"] / other["kl_mean"]
    return Goal(text, f"<= {most}", f"{found:.3f}", found <= most)


def _points(text: str, row: Row | None, points: float) -> Goal:
    target = f">= {-points:+.0f} points"
    if row is None:
        return Goal(text, target, "-", None)
    found = f"{100 * row['difference']:+.2f} points, n = {row['questions']:,}"
    if row["questions"] < ENOUGH_QUESTIONS:
        return Goal(text, target, f"{found} (too few)", None)
    return Goal(text, target, found, 100 * row["difference"] >= -points)
