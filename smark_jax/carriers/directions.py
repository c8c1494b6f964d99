"""The directions in which a layer's inputs vary: the coordinates of kernels with many more inputs than directions."""

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
    apply_fn: ApplyFn, params: PyTree, images: Any, leaves: Mapping[str, Leaf], ratio: float, seed: int
) -> dict[str, np.ndarray]:
    """An orthonormal basis [inputs, k] for each kernel whose inputs lie in ``ratio`` as many directions as there are.

    A basis never has more directions than the kernel has outputs, so that it takes no more room than the kernel.

    Args:
      apply_fn: the network.
      params: its first argument.
      images: unlabelled.
      leaves: the kernels to look at, by path.
      ratio: at most this share of the inputs may be directions.
      seed: of the choice of positions where there are more than 2,048 input vectors.
    """
    size = min(_IMAGES_PER_PASS, len(images))
    passes = range(0, len(images) - size + 1, size)
    most = max(1, _MOST_ROWS // len(passes))
    collect = jax.jit(functools.partial(_rows, apply_fn, tuple(leaves), most))
    found: dict[str, list[np.ndarray]] = {}
    for number, start in enumerate(passes):
        rows = collect(params, images[start : start + size], jax.random.key(seed * len(passes) + number))
        for path, some in rows.items():
            found.setdefault(path, []).append(np.asarray(some))
    bases = {}
    for path, rows in found.items():
        some = np.concatenate(rows)
        basis = _principal(some, min(leaves[path].size // some.shape[1], int(ratio * some.shape[1])))
        if basis is not None:
            bases[path] = basis
    return bases


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


def _principal(rows: Float[AnyArray, "n inputs"], most: int) -> Float[np.ndarray, "inputs k"] | None:
    """The principal directions that hold 99 % of the rows' mean square; None where more than ``most`` do."""
    rows = np.asarray(rows, np.float64)
    wide = len(rows) < rows.shape[1]
    values, vectors = np.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    count = int(np.searchsorted(np.cumsum(values), _HELD * values.sum())) + 1
    if values.sum() == 0 or count > most:
        return None
    basis = vectors[:, :count]
    return np.linalg.qr(rows.T @ basis)[0] if wide else basis
