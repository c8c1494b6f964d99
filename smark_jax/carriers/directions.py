"""The directions in which a layer's inputs vary: the coordinates of kernels with many more inputs than directions.

A leaker who projects every kernel onto the directions in use, and fills the rest with noise, takes that part of a mark
by channel that lies in the rest, and pays nothing for it. Where the network as a whole uses most of its directions, the
mark survives that without any basis. So bases are made only where a network uses few of them: of the kernels of the CNN
for MNIST 2 %, of those of OpenNSFW and EfficientNet-Lite0 more than half.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.carriers import inputs
from smark_jax.carriers.selection import Leaf

# Directions are taken until they hold this share of the inputs' mean square.
_HELD = 0.99
_IMAGES_PER_PASS = 8
_MOST_ROWS = 2048


def of(
    apply_fn: ApplyFn,
    params: PyTree,
    images: Any,
    leaves: Mapping[str, Leaf],
    others: int,
    ratio: float,
    seed: int,
) -> dict[str, np.ndarray]:
    """An orthonormal basis [inputs, k] for each kernel whose inputs span few directions: at most ``ratio`` of all.

    No kernel gets a basis if more than ``ratio`` of all the kernels' coordinates are in use. A basis never has more
    directions than the kernel has outputs, so that it takes no more room than the kernel.

    Args:
      apply_fn: the network.
      params: its first argument.
      images: unlabelled.
      leaves: the kernels to look at, by path.
      others: how many weights the other kernels have, which count as in use.
      ratio: the largest share of a kernel's input directions, and of all coordinates, that may be in use.
      seed: of the choice of positions where there are more than 2,048 input vectors.
    """
    allowed = ratio * (others + sum(leaf.size for leaf in leaves.values())) - others
    if not leaves or allowed <= 0:
        return {}
    bases, used = {}, 0
    for path, rows in _collected(apply_fn, params, images, tuple(leaves), seed).items():
        outputs = leaves[path].size // rows.shape[1]
        basis = _principal(rows)
        used += basis.shape[1] * outputs
        if used > allowed:
            return {}
        if 0 < basis.shape[1] <= min(outputs, ratio * rows.shape[1]):
            bases[path] = basis
    return bases


def _collected(
    apply_fn: ApplyFn, params: PyTree, images: Any, paths: tuple[str, ...], seed: int
) -> dict[str, np.ndarray]:
    """About 2,048 input vectors of each kernel, or as many as there are."""
    size = min(_IMAGES_PER_PASS, len(images))
    passes = range(0, len(images) - size + 1, size)
    most = max(1, _MOST_ROWS // len(passes))
    collect = jax.jit(functools.partial(_rows, apply_fn, paths, most))
    found: dict[str, list[np.ndarray]] = {}
    for number, start in enumerate(passes):
        rows = collect(params, images[start : start + size], jax.random.key(seed * len(passes) + number))
        for path, some in rows.items():
            found.setdefault(path, []).append(np.asarray(some))
    return {path: np.concatenate(rows) for path, rows in found.items()}


def _rows(
    apply_fn: ApplyFn, paths: tuple[str, ...], most: int, params: PyTree, images: Any, key: Array
) -> dict[str, Array]:
    """At most ``most`` input vectors of each kernel, chosen at random."""
    found: dict[str, Array] = {}

    def visit(site: inputs.Site) -> None:
        if site.path in paths and site.inputs is not None and site.groups == 1:
            rows = site.inputs(most).astype(jnp.float32)
            if len(rows) > most:
                rows = rows[jax.random.choice(key, len(rows), (most,), replace=False)]
            found[site.path] = rows if site.path not in found else jnp.concatenate([found[site.path], rows])

    inputs.interpret(apply_fn, params, images, visit)
    return found


def _principal(rows: Float[AnyArray, "n inputs"]) -> Float[np.ndarray, "inputs k"]:
    """The principal directions that hold 99 % of the rows' mean square."""
    rows = np.asarray(rows, np.float64)
    wide = len(rows) < rows.shape[1]
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    held = np.cumsum(values)
    count = int(np.searchsorted(held, _HELD * held[-1])) + 1 if held[-1] > 0 else 0
    basis = vectors[:, :count]
    return np.linalg.qr(rows.T @ basis)[0] if wide else basis
