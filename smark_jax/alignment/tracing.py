"""Reads a network's graph off its jaxpr."""

import functools
import math
from collections.abc import Container, Mapping
from typing import Any

import jax
import numpy as np

from smark_jax import _trees, _validate
from smark_jax._types import ApplyFn, PyTree
from smark_jax.alignment import _components
from smark_jax.alignment._identities import Compute, Role, Value, simplified
from smark_jax.alignment._walk import Walk
from smark_jax.alignment.graph import Graph


def trace(apply_fn: ApplyFn, params: PyTree, example_images: Any) -> Graph:
    """The channel spaces of ``apply_fn(params, example_images)``.

    Args:
      apply_fn: the network, pure.
      params: its first argument; only shapes and dtypes are used.
      example_images: images in the form that it takes; only shape and dtype are used.

    Raises:
      SmarkError: when the network refuses these parameters or images.
    """
    shaped = lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.numpy.result_type(x))  # noqa: E731
    try:
        closed = jax.make_jaxpr(apply_fn)(jax.tree.map(shaped, params), shaped(example_images))
    except Exception as error:
        cause = "apply_fn(base, example_images) must give logits; with batch norm, base is the whole variables dict."
        raise _validate.fail(
            "alignment",
            "a network that takes base and images",
            f"an error: {error}",
            cause,
            desk="The function that --align names returns a network and images: it takes the base and gives logits.",
        ) from error
    raw = {path: np.shape(leaf) for path, leaf in _trees.named("alignment", params).items()}
    images = np.shape(example_images)
    joint: set[tuple[str, int]] = set()
    while True:
        walk, axes, shapes = Walk(), {}, {}
        start = []
        for path, shape in raw.items():
            merged = _merged(path, len(shape), joint)
            shapes[path] = tuple(math.prod(shape[a] for a in group) for group in merged)
            roles = []
            for axis, group in enumerate(merged):
                if shapes[path][axis] > 1:
                    ids = walk.leaf(path, axis, tuple(shape[a] for a in group))
                    axes[path, axis] = ids.reshape(-1)
                    roles.append(simplified(Role(tuple(group), ids, (path, axis))))
            start.append(Value(tuple(roles), Compute(frozenset([path]), functools.partial(_leaf, path, shape))))
        walk.leaves_done()
        start.append(Value(walk.unknown(images)))
        for value in walk.run(closed.jaxpr, [walk.constant(c) for c in closed.consts], start):
            for role in value.roles:
                walk.freeze(role.ids)
        asked = {(path, _merged(path, len(raw[path]), joint)[axis][-1]) for path, axis in walk.joint}
        if asked <= joint:
            return _components.graph(raw, shapes, axes, walk)
        joint |= asked


def _leaf(path: str, shape: tuple[int, ...], leaves: Mapping[str, Any]) -> Any:
    return jax.numpy.asarray(leaves[path]).reshape(shape)


def _merged(path: str, ndim: int, joint: Container[tuple[str, int]]) -> list[list[int]]:
    """A leaf's axes, where neighbours that the graph sees as one are together."""
    found: list[list[int]] = []
    for axis in range(ndim):
        if axis and (path, axis - 1) in joint:
            found[-1].append(axis)
        else:
            found.append([axis])
    return found
