"""The rotation: random signs, then an orthonormal Hadamard transform over all channels of a vector.

y = H (sigma * x) / sqrt(n). For a power of two H is Sylvester's matrix. Otherwise it is the Kronecker product of a Paley
matrix of order 12, 20 or 28 and a Sylvester matrix, so that every channel reaches every other one: a block-diagonal rotation
would leave a spike inside its block. Sources: QuaRot (arXiv 2404.00456) for the use on KV caches; R. Paley, 1933.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> np.ndarray:
    """`count` 64-bit words of Steele, Lea and Flood's SplitMix64 generator, as uint64: the same on every version of everything."""
    words = np.empty(count, dtype=np.uint64)
    state = seed & _MASK
    for i in range(count):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        words[i] = z ^ (z >> 31)
    return words


@lru_cache(maxsize=64)
def _signs(n: int, seed: int) -> Tensor:
    bits = (splitmix64(seed, n) >> np.uint64(63)).astype(np.float32)
    return torch.from_numpy(1 - 2 * bits)


def signs(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The rotation's signs sigma: [n] fp32 of +-1, the top bit of SplitMix64's words (1 is minus)."""
    return _signs(n, seed).to(device)


def factor(n: int) -> tuple[int, int]:
    """n = m * s with s a power of two and m the order of the Paley matrix (1: none).

    Raises:
        ValueError: there is no such factorisation with m in 1, 12, 20, 28.
    """
    for m in (1, 12, 20, 28):
        s = n // m
        if n == m * s and s & (s - 1) == 0 and s > 0:
            return m, s
    raise ValueError(f"no Hadamard matrix here for {n} channels; need a power of two times 1, 12, 20 or 28")


def _jacobsthal(q: int) -> np.ndarray:
    squares = {i * i % q for i in range(1, q)}
    chi = np.array([0] + [1 if i in squares else -1 for i in range(1, q)])
    i = np.arange(q)
    return chi[(i[:, None] - i[None, :]) % q]


@lru_cache(maxsize=4)
def paley(m: int) -> np.ndarray:
    """Paley's Hadamard matrix of order 12, 20 (construction I, q = 11, 19) or 28 (construction II, q = 13), int64 +-1."""
    q = m - 1 if m in (12, 20) else m // 2 - 1
    core = np.zeros((q + 1, q + 1), dtype=np.int64)
    core[1:, 1:] = _jacobsthal(q)
    core[0, 1:] = 1
    core[1:, 0] = -1 if m in (12, 20) else 1
    eye = np.eye(q + 1, dtype=np.int64)
    if m in (12, 20):
        return eye + core
    return np.kron(core, np.array([[1, 1], [1, -1]])) + np.kron(eye, np.array([[1, -1], [-1, -1]]))


@lru_cache(maxsize=32)
def _paley_tensor(m: int, transpose: bool, device: str) -> Tensor:
    matrix = paley(m).T if transpose else paley(m)
    return torch.from_numpy(np.ascontiguousarray(matrix)).to(torch.float32).to(device)


def hadamard_matrix(n: int) -> Tensor:
    """The unnormalised matrix H of order n, [n, n] fp64 of +-1, with H H^T = n I."""
    m, s = factor(n)
    sylvester = np.ones((1, 1), dtype=np.int64)
    while len(sylvester) < s:
        sylvester = np.kron(np.array([[1, 1], [1, -1]]), sylvester)
    matrix = sylvester if m == 1 else np.kron(paley(m), sylvester)
    return torch.from_numpy(matrix).double()


def _hadamard(x: Tensor, transpose: bool) -> Tensor:
    n = x.shape[-1]
    m, s = factor(n)
    y = x.reshape(-1, n).T.contiguous()  # channels first, so that every butterfly adds whole rows
    h = 1
    while h < s:  # butterflies of order 1, 2, 4, ...: every backend adds in this order
        pair = y.view(n // (2 * h), 2, h, -1)
        y = torch.stack((pair[:, 0] + pair[:, 1], pair[:, 0] - pair[:, 1]), 1).view(n, -1)
        h *= 2
    y = y.T.contiguous().view(-1, m, s)
    if m > 1:
        y = torch.matmul(_paley_tensor(m, transpose, str(x.device)), y)
    return (y * n**-0.5).view(x.shape)


def rotate(x: Tensor, seed: int) -> Tensor:
    """y = H (sigma * x) / sqrt(n) in fp32.

    Args:
        x: [..., n], any floating dtype.
        seed: seed of the signs.

    Returns:
        [..., n] fp32, the same norm as x.
    """
    return _hadamard(x.float() * signs(x.shape[-1], seed, x.device), transpose=False)


def unrotate(y: Tensor, seed: int) -> Tensor:
    """x = sigma * (H^T y) / sqrt(n) in fp32: the inverse of `rotate`.

    Args:
        y: [..., n], any floating dtype.
        seed: seed of the signs.

    Returns:
        [..., n] fp32.
    """
    return _hadamard(y.float(), transpose=True) * signs(y.shape[-1], seed, y.device)


@lru_cache(maxsize=16)
def _gaussian(n: int, seed: int) -> Tensor:
    words = splitmix64(seed ^ 0x51A5_0000_0000_0001, 2 * ((n * n + 1) // 2)).reshape(2, -1)
    u, v = ((w >> np.uint64(11)).astype(np.float64) * 2.0**-53 for w in words)
    radius, angle = np.sqrt(-2 * np.log1p(-u)), 2 * np.pi * v
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[: n * n]
    return torch.from_numpy(normal.astype(np.float32).reshape(n, n))


def gaussian_matrix(n: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The QJL matrix S: [n, n] fp32, independent N(0, 1), by Box and Muller's method from SplitMix64's words."""
    return _gaussian(n, seed).to(device)
