"""The codec of docs/codec.md once more, in float64 numpy; nothing of the package is used.

Golden vectors are integers: channel c of vector v is `word mod 2001 - 1000` of word 2^32 + 256 v + c of the generator of
`page_fields`. `golden` takes the first vectors for which no decision is close, so that rounding cannot turn one over.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from golden import page_spec
from golden.page_fields import MASK, mix

LEVELS = {
    2: (np.array([35.5, 118.5]), 78.46),
    3: (np.array([12.5, 38.5, 68.5, 109.5]), 50.90),
    4: (np.array([5.5, 16.5, 27.5, 39.5, 52.5, 67.5, 86.5, 114.5]), 41.86),
}
OUTLIER_CHANNELS = [3, 5, 8, 13, 21, 34, 55, 60, 2, 61, 33, 47, 11, 12, 48, 63]
CASES = [
    *(
        (name, d, side, 0)
        for name in ("k4v4", "k3v3", "k2v2")
        for d in (64, 80, 96, 112, 128, 192, 256)
        for side in "kv"
    ),
    ("k4v4", 128, "k", 7),
    ("k8v4", 80, "k", 0),
    ("lite4", 64, "k", 0),
    ("lite4", 64, "v", 0),
    ("k4v4-o16", 64, "k", 0),
    ("k2v2-o16", 80, "k", 0),
    ("tq3.5", 64, "k", 0),
    ("tq2.5", 128, "k", 0),
    ("tq2.5", 128, "v", 0),
    ("qjl4", 64, "k", 0),
    ("qjl3", 80, "k", 3),
]


@dataclass
class Encoded:
    """Codes and scales of one vector. `margin`: relative distance of the closest decision from its threshold."""

    codes: list[int] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    outliers: list[int] = field(default_factory=list)
    outlier_scale: float | None = None
    residual_signs: list[int] = field(default_factory=list)
    residual_norm: float | None = None
    margin: float = np.inf

    def near(self, *margins: float) -> None:
        self.margin = min(self.margin, *map(float, margins))


def words(seed: int, count: int) -> list[int]:
    """SplitMix64's output."""
    return [mix((seed + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i in range(count)]


def vector(v: int, d: int) -> np.ndarray:
    return np.array([mix(((1 << 32) + 256 * v + c + 1) * 0x9E3779B97F4A7C15 & MASK) % 2001 - 1000.0 for c in range(d)])


def hadamard(n: int) -> np.ndarray:
    """Paley times Sylvester, entry by entry."""
    m = next(m for m in (1, 12, 20, 28) if n % m == 0 and (n // m).bit_count() == 1)
    s = n // m
    return np.array(
        [[_paley(m, i // s, j // s) * (-1) ** ((i % s) & (j % s)).bit_count() for j in range(n)] for i in range(n)]
    )


def _paley(m: int, i: int, j: int) -> int:
    if m == 1:
        return 1
    if m != 28:
        return (i == j) + _conference(m - 1, i, j, corner=-1)
    block = np.array([[1, 1], [1, -1]])[i % 2, j % 2], np.array([[1, -1], [-1, -1]])[i % 2, j % 2]
    return int(_conference(13, i // 2, j // 2, corner=1) * block[0] + (i // 2 == j // 2) * block[1])


def _conference(q: int, i: int, j: int, corner: int) -> int:
    if i == 0 or j == 0:
        return 0 if i == j else (1 if i == 0 else corner)
    return _legendre(i - j, q)


def _legendre(a: int, q: int) -> int:
    power = pow(a % q, (q - 1) // 2, q)
    return -1 if power == q - 1 else power


def rotate(x: np.ndarray, seed: int) -> np.ndarray:
    n = len(x)
    sigma = np.array([-1.0 if word >> 63 else 1.0 for word in words(seed, n)])
    return hadamard(n) @ (sigma * x) / np.sqrt(n)


def gaussian(n: int, seed: int) -> np.ndarray:
    """S, by Box and Muller's method."""
    half = (n * n + 1) // 2
    uniform = np.array([(word >> 11) * 2.0**-53 for word in words(seed ^ 0x51A5000000000001, 2 * half)])
    radius, angle = np.sqrt(-2 * np.log(1 - uniform[:half])), 2 * np.pi * uniform[half:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: n * n].reshape(n, n).astype(np.float32)


def _fp16(out: Encoded, x: float) -> float:
    rounded = np.float16(x)
    middle = [(float(rounded) + float(np.nextafter(rounded, np.float16(to)))) / 2 for to in (-np.inf, np.inf)]
    out.near(*(abs(x - m) / x for m in middle))
    return float(rounded)


def _int8(out: Encoded, y: np.ndarray) -> tuple[list[int], float]:
    step = _fp16(out, np.abs(y).max() / 127)
    ratio = np.clip(y / step, -127, 127)
    out.near(np.abs(np.abs(ratio % 1) - 0.5)[np.abs(ratio) < 126.4].min() / 127)
    return [int(r) % 256 for r in np.rint(ratio)], step


def _lloyd_max(out: Encoded, y: np.ndarray, bits: int, plain: bool) -> tuple[list[int], float, np.ndarray]:
    levels, T = LEVELS[bits]
    rms = np.sqrt((y * y).mean())
    tried = []
    for j in (-2, -1, 0, 1, 2) if bits > 2 and not plain else (0,):
        bounds = (levels[1:] + levels[:-1]) / 2 * rms * (1 + 0.06 * j) / T
        index = (np.abs(y)[:, None] > bounds).sum(1)
        c = np.sign(y) * levels[index] / T
        tried.append(((y @ c) ** 2 / (c @ c), index, c, np.abs(np.abs(y)[:, None] / bounds - 1).min()))
    scores = sorted(((t[0], -i) for i, t in enumerate(tried)), reverse=True)
    _, index, c, margin = tried[-scores[0][1]]
    out.near(margin, np.abs(y).min() / rms, 1 - scores[1][0] / scores[0][0] if len(scores) > 1 else np.inf)
    scale = rms if plain else y @ y / (y @ c)
    codes = [int(i) + (1 << (bits - 1)) * bool(negative) for i, negative in zip(index, y < 0, strict=True)]
    rounded = _fp16(out, scale)
    return codes, rounded, rounded * c


def encode(x: np.ndarray, name: str, side: str, seed: int) -> Encoded:
    """Codes and scales of one vector; outlier formats and `tq` keys with OUTLIER_CHANNELS."""
    out, d = Encoded(), len(x)
    qjl = name.startswith("qjl") and side == "k"
    if "-o" in name and side == "k":
        out.outliers, out.outlier_scale = _int8(out, x[OUTLIER_CHANNELS])
        x = x.copy()
        x[OUTLIER_CHANNELS] = 0
    if name.startswith("tq"):
        first = split_channels(d) if side == "k" else list(range(d // 4))
        x = x[first + [c for c in range(d) if c not in first]]
    start = 0
    for channels, bits in page_spec.parts(name, side, d):
        y = x[start : start + channels] if name == "lite4" else rotate(x[start : start + channels], seed)
        start += channels
        if bits == 8:
            codes, scale = _int8(out, y)
        else:
            codes, scale, decoded = _lloyd_max(out, y, bits, plain=qjl)
        out.codes += codes
        out.scales.append(scale)
    if qjl:
        projected = gaussian(d, seed) @ (y - decoded)
        out.near(np.abs(projected).min() / np.linalg.norm(y))
        out.residual_signs = [int(p < 0) for p in projected]
        out.residual_norm = _fp16(out, np.linalg.norm(y - decoded))
    return out


def split_channels(d: int) -> list[int]:
    """The channels with more bits of golden `tq` keys."""
    special = OUTLIER_CHANNELS[: d // 4]
    return special + list(range(64, 64 + d // 4 - len(special)))


def golden() -> list[dict[str, object]]:
    """For every case the first vector whose decisions are all at least 2e-5 away from their thresholds."""
    found = []
    for name, d, side, seed in CASES:
        v = next(v for v in range(1000) if encode(vector(v, d), name, side, seed).margin > 2e-5)
        out = encode(vector(v, d), name, side, seed)
        case = {"format": name, "head_dim": d, "side": side, "seed": seed, "vector": v}
        case |= {"codes": bytes(out.codes).hex(), "scales": out.scales}
        if out.outliers:
            case |= {"outliers": bytes(out.outliers).hex(), "outlier_scale": out.outlier_scale}
        if out.residual_signs:
            case |= {"residual_signs": bytes(out.residual_signs).hex(), "residual_norm": out.residual_norm}
        found.append(case)
    return found
