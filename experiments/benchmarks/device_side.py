"""A device by itself: its rates, its checks, and copies issued of a network that nobody had to train."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import device_checks, jax_side
from experiments.benchmarks.jax_side import device, device_peak
from smark_jax import chacha, files, models

__all__ = ["CASES", "device", "device_peak"]


def rates(megabytes: int, matrix: int) -> jax_side.Arms:
    """A copy of float32 (bytes read plus written), matmuls as JAX has them and exact, and the compiled cipher."""
    source, square = jnp.ones(megabytes * 250_000), jnp.ones((matrix, matrix))
    blocks = megabytes * 1_000_000 // 4 // 64  # of a quarter of the bytes: the cipher is far slower than a copy
    counters, nonces = jnp.arange(blocks, dtype=jnp.uint32), jnp.zeros((3, blocks), jnp.uint32)
    key = jnp.arange(8, dtype=jnp.uint32)

    def arm(work: Callable[..., jax.Array], amount: float, *args: jax.Array) -> Callable[[], dict[str, Any]]:
        compiled = jax.jit(work)

        def run() -> dict[str, Any]:
            jax.block_until_ready(compiled(*args))
            return {"amount": amount}

        return run

    highest = lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    return {
        "copy": arm(lambda vector: vector + 1, 2 * source.nbytes, source),
        "matmul": arm(jnp.matmul, 2 * matrix**3, square, square),
        "exact matmul": arm(highest, 2 * matrix**3, square, square),
        "keystream": arm(chacha.blocks, 64 * blocks, key, counters, nonces),
    }


def checks(parties: int, seed: int) -> jax_side.Arms:
    """The checks of :mod:`experiments.benchmarks.device_checks`."""
    jax_side.cpu_devices(parties)
    return device_checks.checks(parties, seed)


def issue(num_copies: int, folder: str, seed: int) -> jax_side.Arms:
    """:func:`experiments.benchmarks.jax_side.disk` with the CNN untrained."""
    leaves = files.flatten(models.init(models.CNN(), jax.random.key(seed), (28, 28, 1)))
    path = Path(folder) / "model.npz"
    arrays: dict[str, Any] = {f"weights:{name}": leaf for name, leaf in leaves.items()}
    np.savez(path, **arrays, test_images=np.zeros((10, 28, 28, 1), np.uint8), test_labels=np.arange(10))
    return jax_side.disk(num_copies, str(path), folder, 1, seed)


CASES: dict[str, Callable[..., jax_side.Arms]] = {"rates": rates, "checks": checks, "issue": issue}
