"""References in float64 NumPy and plain integers. This file never imports smark_jax."""

import hashlib
import hmac
import math

import numpy as np


def chacha20_block(key: bytes, counter: int, nonce: bytes) -> bytes:
    """RFC 8439, section 2.3, on Python integers."""
    mask = 0xFFFFFFFF
    state = [int.from_bytes(b"expand 32-byte k"[i : i + 4], "little") for i in range(0, 16, 4)]
    state += [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)]
    state += [counter]
    state += [int.from_bytes(nonce[i : i + 4], "little") for i in range(0, 12, 4)]
    x = list(state)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for p, q, r, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            x[p] = (x[p] + x[q]) & mask
            turned = x[r] ^ x[p]
            x[r] = ((turned << bits) | (turned >> (32 - bits))) & mask

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return b"".join(((a + b) & mask).to_bytes(4, "little") for a, b in zip(x, state, strict=True))


def hkdf_sha256(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 with an empty salt and 32 bytes of output."""
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(extracted, info + b"\x01", hashlib.sha256).digest()


def hadamard(size: int) -> np.ndarray:
    """Orthonormal Walsh-Hadamard matrix by Sylvester's recursion."""
    h = np.ones((1, 1))
    while h.shape[0] < size:
        h = np.block([[h, h], [h, -h]])
    return h / math.sqrt(size)


def mixed(x: np.ndarray) -> np.ndarray:
    """H x, or for a length that is no power of two H over the first window and then over the last."""
    window = 1 << (len(x).bit_length() - 1)
    h, x = hadamard(window), x.copy()
    x[:window] = h @ x[:window]
    if window < len(x):
        x[-window:] = h @ x[-window:]
    return x


def carrier_matrix(inner: np.ndarray, outer: np.ndarray, positions: np.ndarray, num_weights: int) -> np.ndarray:
    """The dense m x D matrix that a carrier's arrays stand for, block by block: (S2 H S1 H P)^T / sqrt(n)."""
    n, m = positions.shape
    length = num_weights if n == 1 and num_weights < 32 * inner.shape[1] else 32 * inner.shape[1]
    dense = np.zeros((m, num_weights))
    for b in range(n):
        columns = np.zeros((length, m))
        columns[positions[b], np.arange(m)] = 1.0
        for packed in (inner[b], outer[b]):
            bits = [(int(packed[i // 32]) >> (i % 32)) & 1 for i in range(length)]
            columns = (1.0 - 2.0 * np.array(bits))[:, None] * mixed(columns)
        dense[:, b * length : (b + 1) * length] = columns.T / math.sqrt(n)
    return dense


def all_words(m: int) -> np.ndarray:
    """All 2^m words of -1 and +1."""
    index = np.arange(2**m)
    return 1.0 - 2.0 * ((index[:, None] >> np.arange(m)) & 1)


def chernoff_log(t: float, u: np.ndarray) -> float:
    """Minimum over a fine grid of s of sum ln cosh(s u) - s t, by brute force."""
    s = np.concatenate([np.linspace(0, 60, 60_001), np.geomspace(60, 1e5, 2_000)])
    x = np.abs(s[:, None] * u[None, :])
    return float((np.sum(x + np.log1p(np.exp(-2 * x)) - math.log(2), axis=1) - s * t).min())


def softmax_cross_entropy_gradient(w: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple:
    """Loss of a linear classifier and its gradient with respect to (w, b), in float64."""
    logits = x @ w + b
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = -np.log(p[np.arange(len(y)), y]).mean()
    p[np.arange(len(y)), y] -= 1
    return loss, x.T @ p / len(y), p.mean(axis=0)


def fixed_point_words(x: np.ndarray, resolution: float, offset: int, bits: np.ndarray) -> np.ndarray:
    """Stochastic rounding: the low halves of all random words decide first, then the high ones.

    The steps are float32 quotients by a constant, which XLA computes as products with its float32 reciprocal.
    """
    halves = np.concatenate([bits & 0xFFFF, bits >> 16])[: x.size]
    uniform = (halves.astype(np.float64) + 0.5) / 2**16
    steps = np.clip(np.float32(x) * (np.float32(1) / np.float32(resolution)), np.float32(-offset), np.float32(offset))
    floor = np.floor(steps.astype(np.float64))
    up = uniform < steps - floor
    return (floor.astype(np.int64) + up + offset).astype(np.uint32)
