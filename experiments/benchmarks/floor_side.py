"""The machine's own rates, and the floor (lower bound) that they set on each case's time.

A floor counts only what any method must do: read and write each weight once at the rate of a plain copy, multiply as
the network requires, generate the keystream of codewords that are not stored, and write the bytes of the files.
"""

import concurrent.futures
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

Arms = Mapping[str, Callable[[], dict[str, Any] | None]]

_KEYSTREAM_BLOCK = 64
# Multiplications and additions of the CNN for one image: two convolutions and two dense layers. The backward pass takes
# twice as many as the forward pass.
_CNN_FORWARD = 2 * (28 * 28 * 9 * 32 + 14 * 14 * 9 * 32 * 64 + 3136 * 128 + 128 * 10)


def device() -> str:
    return "cpu"


def device_peak() -> None:
    return None


def rates(megabytes: int, matrix: int, threads: int) -> Arms:
    """A copy of float32 (bytes read plus written), a float32 matmul, and OpenSSL's ChaCha20, on all threads."""
    source = np.ones(megabytes * 250_000, np.float32)
    target = np.empty_like(source)
    target[:] = 0  # writing maps its pages now, not during the measurement
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    a = np.random.default_rng(0).standard_normal((matrix, matrix), np.float32)
    product = np.empty_like(a)
    zeros = bytes(1 << 24)

    def copy() -> dict[str, Any]:
        list(pool.map(lambda pair: np.copyto(*pair), parts))
        return {"amount": 2 * source.nbytes}

    def matmul() -> dict[str, Any]:
        np.matmul(a, a, out=product)
        return {"amount": 2 * matrix**3}

    def keystream() -> dict[str, Any]:
        stream = lambda _: Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), None).encryptor().update(zeros)  # noqa: E731
        list(pool.map(stream, range(threads)))
        return {"amount": threads * len(zeros)}

    return {"copy": copy, "matmul": matmul, "keystream": keystream}


def disk(num_copies: int, num_bytes: int, folder: str) -> Arms:
    """Files of the same number and size, written and flushed one after the other."""
    content = np.random.default_rng(0).bytes(num_bytes)

    def write() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            began = time.perf_counter()
            for number in range(num_copies):
                handle = os.open(Path(name) / str(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
                left = memoryview(content)
                while left:
                    left = left[os.write(handle, left) :]
                os.fsync(handle)
                os.close(handle)
            return {"seconds": time.perf_counter() - began, "bytes": num_copies * num_bytes}

    return {"write": write}


class Rates(NamedTuple):
    """Bytes or operations a second."""

    copy: float
    matmul: float
    keystream: float


def floor(rates: Rates, case: str, arm: str, params: Mapping[str, Any]) -> float | None:
    """Seconds below which an arm cannot come on this machine; None where none is computed.

    Args:
      rates: as measured in the same run.
      case: of the worker.
      arm: of the case.
      params: of the case.
    """
    if case in ("weights", "losses"):
        d = params["num_weights"]
        # Float32 weights read, written, or both, plus two sign bits per weight.
        once, twice = 4 * d + d / 4, 8 * d + d / 4
        moved = {"copy": 8 * d, "spread": once, "despread": once, "embed": twice, "extract": twice}
        return moved.get(arm, twice) / rates.copy
    if case == "copies":
        return 4 * params["num_weights"] * (params["num_copies"] + 1) / rates.copy
    if case == "verdict":
        num_bytes = params["num_customers"] * -(-params["num_chips"] // (8 * _KEYSTREAM_BLOCK)) * _KEYSTREAM_BLOCK
        return num_bytes / rates.keystream + num_bytes / rates.copy
    if case == "train":
        return 3 * _CNN_FORWARD * params["parties"] * params["batch"] / rates.matmul
    if case == "party" and arm == "party":
        return 4 * params["num_words"] * (params["parties"] - 1) / rates.keystream
    if case == "party":
        return 4 * params["num_words"] * (params["parties"] + 1) / rates.copy
    return None


CASES: dict[str, Callable[..., Arms]] = {"rates": rates, "disk": disk}
