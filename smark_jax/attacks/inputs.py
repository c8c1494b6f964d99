"""Second moments of the inputs of a network's kernels, over unlabelled images."""

import functools
import math
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from smark_jax import _trees
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.carriers import inputs
from smark_jax.carriers.inputs import Site

_IMAGES_PER_PASS = 16


class Inputs(NamedTuple):
    """A kernel's inputs x over all rows: images, and the positions of a convolution.

    Attributes:
      path: the kernel's.
      entries: the numbers of its weights in the flattened leaf, shape [groups, inputs, outputs].
      power: E[x^2], shape [groups, inputs].
      rows: the inputs themselves, shape [groups, inputs, rows], where there are fewer rows than inputs; else None.
      square: E[x x^T], shape [groups, inputs, inputs], where there are not fewer.
    """

    path: str
    entries: Int[np.ndarray, "groups inputs outputs"]
    power: Float[np.ndarray, "groups inputs"]
    rows: Float[np.ndarray, "groups inputs rows"] | None
    square: Float[np.ndarray, "groups inputs inputs"] | None

    def principal(self) -> tuple[Float[np.ndarray, "groups n"], Float[np.ndarray, "groups inputs n"]]:
        """Eigenvalues of E[x x^T] in falling order, and the eigenvectors as columns."""
        if self.rows is None:
            assert self.square is not None
            values, vectors = np.linalg.eigh(self.square)
            return np.maximum(values[:, ::-1], 0), vectors[:, :, ::-1]
        rows = self.rows / self.rows.shape[2] ** 0.5
        values, vectors = np.linalg.eigh(rows.swapaxes(1, 2) @ rows)
        values, vectors = values[:, ::-1], vectors[:, :, ::-1]
        sure = values > 1e-12 * values[:, :1]  # the others may not be orthogonal to these
        roots = np.sqrt(np.where(sure, values, 1))
        return np.where(sure, values, 0), np.where(sure, 1 / roots, 0)[:, None] * (rows @ vectors)


def enter(params: PyTree, apply_fn: ApplyFn, images: AnyArray) -> list[Inputs]:
    """The inputs of every kernel that :func:`smark_jax.carriers.inputs.interpret` finds, in the order of the network.

    Memory holds the result, and the inputs of 16 images at a time.

    Args:
      params: the network's weights.
      apply_fn: ``apply_fn(params, images) -> logits``, any JAX function.
      images: shape [N, ...].
    """
    images = np.asarray(images)
    sites = _sites(params, apply_fn, images)
    rows = [count * len(images) for _, _, count in sites]
    few = tuple(count < entries.shape[1] for (_, entries, _), count in zip(sites, rows, strict=True))
    passes = []
    for start in range(0, len(images), _IMAGES_PER_PASS):
        found = _summaries(apply_fn, few, params, images[start : start + _IMAGES_PER_PASS])
        passes.append(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found))
    result = []
    for number, (path, entries, _) in enumerate(sites):
        power, parts = zip(*(found[number] for found in passes), strict=True)
        kept = np.concatenate(parts, axis=2) if few[number] else None
        square = None if few[number] else np.sum(parts, axis=0) / rows[number]
        result.append(Inputs(path, entries, np.sum(power, axis=0) / rows[number], kept, square))
    return result


def kernels(params: PyTree, apply_fn: ApplyFn, images: AnyArray) -> list[tuple[str, Int[np.ndarray, "G I O"]]]:
    """Path and entries of every kernel, in the order of the network; of the images, only shape and dtype are used."""
    return [(path, entries) for path, entries, _ in _sites(params, apply_fn, images)]


def _sites(params: PyTree, apply_fn: ApplyFn, images: AnyArray) -> list[tuple[str, np.ndarray, int]]:
    """For each kernel its path, its entries, and the rows that enter it for each image."""
    shapes = {path: np.shape(leaf) for path, leaf in _trees.named("attacks", params).items()}
    sites: list[Site] = []

    def shaped(params: PyTree, images: Array) -> list[Array]:
        found = _entering(apply_fn, params, images)
        sites[:] = [site for site, _ in found]
        return [x for _, x in found]

    one = jax.ShapeDtypeStruct((1, *np.shape(images)[1:]), jnp.result_type(images))
    entering = jax.eval_shape(shaped, params, one)
    result = []
    for site, x in zip(sites, entering, strict=True):
        numbers = np.arange(math.prod(shapes[site.path])).reshape(shapes[site.path])
        first = np.moveaxis(numbers, site.rows, range(len(site.rows))).reshape(x.shape[1], site.groups, -1)
        result.append((site.path, first.swapaxes(0, 1), x.shape[2]))
    return result


def _entering(apply_fn: ApplyFn, params: PyTree, images: Array) -> list[tuple[Site, Array]]:
    """Every kernel with its inputs, shape [groups, inputs, rows]; to be traced."""
    found: list[tuple[Site, Array]] = []

    def visit(site: Site) -> None:
        if site.inputs is not None:
            x = site.inputs(sys.maxsize).astype(jnp.float32)
            found.append((site, jnp.moveaxis(x.reshape(x.shape[0], site.groups, -1), 0, 2)))

    inputs.interpret(apply_fn, params, images, visit)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _summaries(apply_fn: ApplyFn, few: tuple[bool, ...], params: PyTree, images: Array) -> list[tuple[Array, Array]]:
    """For each kernel, the sum of x^2 over the rows, and the rows themselves (if few) or the sum of x x^T."""
    entering = [x for _, x in _entering(apply_fn, params, images)]
    return [
        (jnp.square(x).sum(axis=2), x if keep else jnp.einsum("gir,gjr->gij", x, x))
        for x, keep in zip(entering, few, strict=True)
    ]
