"""Reads a network's graph off its jaxpr."""

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from smark_jax import _trees, _validate
from smark_jax._types import ApplyFn, PyTree
from smark_jax.alignment import _components
from smark_jax.alignment._identities import Compute, Grouped, Role, Roots, Value, simplified
from smark_jax.alignment._walk import Walk
from smark_jax.alignment.graph import Graph, View


def trace(apply_fn: ApplyFn, params: PyTree, example_images: Any, dense: Mapping[str, int] | None = None) -> Graph:
    """The channel spaces of ``apply_fn(params, example_images)``.

    A convolution in groups counts as one with a dense kernel of blocks (:class:`smark_jax.alignment.graph.View`), whose
    inputs and outputs are spaces of their own.

    Args:
      apply_fn: the network, pure.
      params: its first argument; only shapes and dtypes are used.
      example_images: images in the form that it takes; only shape and dtype are used.
      dense: depthwise kernels, by path, that count as dense too, and the axes of their inputs: the suspect has them in
        that form. The channels that they make are then others than those that they read.

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
    joint: set[tuple[str, int, int]] = set()
    grouped: dict[str, Grouped] = {}
    while True:
        walk, axes, shapes, orders = Walk(dense or {}, grouped), {}, {}, {}
        start = []
        for path, shape in raw.items():
            merged = _merged(path, len(shape), joint)
            own = grouped.get(path)
            seen = _blown_up(shape, own)
            orders[path] = tuple(a for group in merged for a in group)
            shapes[path] = tuple(math.prod(seen[a] for a in group) for group in merged)
            roles = []
            for axis, group in enumerate(merged):
                if shapes[path][axis] > 1:
                    ids = walk.leaf(path, axis, tuple(seen[a] for a in group))
                    axes[path, axis] = ids.reshape(-1)
                    role = Role(tuple(group), ids, (path, axis))
                    roles.append(simplified(_of_groups(role, shape, own) if own and axis == own.inputs else role))
            compute = Compute(frozenset([path]), functools.partial(_leaf, path, shape))
            start.append(Value(tuple(roles), compute, walk.forms.leaf(path, shape)))
        walk.leaves_done()
        start.append(Value(walk.unknown(images)))
        outputs = walk.run(closed.jaxpr, [walk.constant(c) for c in closed.consts], start)
        for value, value_shape in zip(outputs, (aval.shape for aval in closed.out_avals), strict=True):
            for role in value.roles:
                walk.freeze(role.ids)
                if role.axes == (len(value_shape) - 1,):
                    walk.logits = role.ids
        merged = {path: _merged(path, len(shape), joint) for path, shape in raw.items()}
        asked = {(path, merged[path][one][0], merged[path][other][0]) for path, one, other in walk.joint}
        asked = {place for place in asked if place[0] not in walk.grouped | grouped}
        if not asked and walk.grouped.keys() <= grouped.keys():
            views = {
                path: View(shape, shapes[path], orders[path], *_groups(grouped.get(path)))
                for path, shape in raw.items()
                if shape != shapes[path]
            }
            return _components.graph(views, shapes, axes, walk)
        grouped |= walk.grouped
        joint = {place for place in joint | asked if place[0] not in grouped}


def _groups(own: Grouped | None) -> tuple[int, int, int]:
    return (own.groups, own.inputs, own.outputs) if own else (1, 0, 0)


def _blown_up(shape: tuple[int, ...], own: Grouped | None) -> tuple[int, ...]:
    """A leaf's shape with the inputs of all groups of a convolution, where it is its kernel."""
    return tuple(n * own.groups if own and axis == own.inputs else n for axis, n in enumerate(shape))


def _of_groups(role: Role, shape: tuple[int, ...], own: Grouped) -> Role:
    """The inputs of a convolution in groups as its kernel has them: those of the group that an output belongs to."""
    each = role.ids.reshape(own.groups, shape[own.inputs])
    ids = np.repeat(each, shape[own.outputs] // own.groups, axis=0)
    axes = own.outputs, own.inputs
    return role._replace(axes=tuple(sorted(axes)), ids=ids if axes[0] < axes[1] else ids.T)


def _leaf(path: str, shape: tuple[int, ...], leaves: Mapping[str, Any]) -> Any:
    return jax.numpy.asarray(leaves[path]).reshape(shape)


def _merged(path: str, ndim: int, joint: Iterable[tuple[str, int, int]]) -> list[list[int]]:
    """A leaf's axes, where those that the graph sees as one are together, at the place of the last of them."""
    roots = Roots()
    for one, other in ((one, other) for name, one, other in joint if name == path):
        roots[roots.of(min(one, other))] = roots.of(max(one, other))
    found: dict[int, list[int]] = {}
    for axis in range(ndim):
        found.setdefault(roots.of(axis), []).append(axis)
    return sorted(found.values(), key=max)
