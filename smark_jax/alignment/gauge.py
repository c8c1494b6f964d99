"""What a fit of a linear space does to leaves, and the form without gains in which suspect and base are compared."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smark_jax.alignment import matching
from smark_jax.alignment._identities import gain_name
from smark_jax.alignment.graph import Graph
from smark_jax.alignment.matching import Leaves
from smark_jax.alignment.spaces import Group, Place


class Fit(NamedTuple):
    """How a linear space of the suspect becomes the base's.

    Attributes:
      order: the suspect's block for each block of the base, shape [blocks].
      matrices: for each block, A in ``base = A^T suspect`` for what makes the units, shape [blocks, units, units].
      inverses: of these; of what says too little of a space to have one, the pseudo-inverse.
    """

    order: np.ndarray
    matrices: np.ndarray
    inverses: np.ndarray


Fits = Mapping[int, Fit]


def fit(order: np.ndarray, matrices: np.ndarray, group: Group) -> Fit:
    """The fit by these matrices."""
    inverses = matrices.swapaxes(1, 2) if group == "orthogonal" else np.linalg.pinv(matrices, rcond=1e-10)
    return Fit(order, matrices, inverses)


def canonical(graph: Graph, leaves: Leaves) -> Leaves:
    """The leaves with gains folded into kernels, and without what normalisations remove.

    Whatever a kernel writes along the vector of ones of a space whose mean is removed has no effect, nor does what it
    reads along it. What all logits share has none on their softmax.
    """
    found = dict(leaves)
    for path in graph.factors.keys() & leaves.keys():
        for axis, factor in factors(graph, path, leaves).items():
            found[path] = found[path] * matching.along(factor, axis, found[path].ndim)
    for space in graph.linear:
        for place in space.places if space.ones else ():
            if place.path in found:
                leaf = np.moveaxis(found[place.path], place.axis, 0).astype(np.float64)
                if in_order(place.entries, len(leaf)) and len(place.entries) == 1:
                    leaf -= leaf.mean(axis=0)
                else:
                    taken = leaf[place.entries]
                    leaf[place.entries] = taken - taken.mean(axis=1, keepdims=True)
                found[place.path] = np.moveaxis(leaf, 0, place.axis)
    for path, axis in (place for place in graph.logits if place[0] in leaves):
        leaf = found[path].astype(np.float64)
        found[path] = leaf - leaf.mean(axis=axis, keepdims=True)
    return found


def factors(graph: Graph, path: str, leaves: Leaves) -> dict[int, np.ndarray]:
    """By axis, the gains that are folded into a kernel; leaves that are missing count as ones.

    So do gains that are no numbers, as those of a suspect's negative variances are.
    """
    found: dict[int, np.ndarray] = {}
    for factor in graph.factors.get(path, ()):
        if not factor.vector.paths <= leaves.keys():
            continue
        vector = np.asarray(factor.vector(leaves), np.float64)
        vector = np.where(np.isfinite(vector), vector, 1)
        whole = found.setdefault(factor.axis, np.ones(graph.shapes[path][factor.axis]))
        whole[factor.entries] *= vector[factor.positions]
    return found


def restored(graph: Graph, aligned: Leaves, plain: Leaves, ours: Leaves) -> Leaves:
    """The aligned leaves with the base's own gains taken out of them again.

    Args:
      graph: of the base.
      aligned: the suspect's leaves, in the base's order and basis, canonical.
      plain: the base's leaves, canonical.
      ours: the base's leaves.
    """
    found = dict(aligned)
    touched = {place.path for space in graph.linear for place in (*space.places, *space.vectors)}
    touched |= {path for path, _ in graph.logits}
    for path in touched & ours.keys():
        change = aligned[path].astype(np.float64) - plain[path]
        for axis, factor in factors(graph, path, ours).items():
            change = change * matching.along(
                np.where(factor == 0, 0, 1 / np.where(factor == 0, 1, factor)), axis, change.ndim
            )
        found[path] = (ours[path] + change).astype(ours[path].dtype)
    return found


def chances(graph: Graph, path: str) -> list[float]:
    r"""The cosines that a fit reaches by chance on a leaf of random weights, for each space that it touches.

    Least squares with a basis of d units explains d of the n dimensions of each unit's weights, so the cosine is
    :math:`\sqrt{d / n}`. A rotation is fitted to all leaves of its space at once: with N weights for each unit, the
    singular values of a product of random matrices add up to a cosine of about :math:`\sqrt{d / N}`. Leaves that nobody
    can move otherwise are fitted first and by themselves, so that N counts only these.
    """
    found = []
    for space in graph.linear:
        units = space.blocks * space.width
        sizes = {place.path: math.prod(graph.shapes.get(place.path, (0,))) / units for place in space.places}
        ends = {p: size for p, size in sizes.items() if p in graph.shapes and _is_end(graph, p)}
        for place in space.places:
            if place.path == path:
                rest = sum((ends if path in ends else sizes).values())
                rest = rest if space.group == "orthogonal" else sizes[path]
                found.append(min(1.0, math.sqrt(space.width / rest)))
    return found


def vectors(graph: Graph, leaves: Leaves) -> set[str]:
    """Vectors that change with linear spaces, or take part in folding gains: what is moved from one to another."""
    found = {place.path for space in graph.linear for place in space.vectors}
    for path, some in graph.factors.items():
        names = [path, *(gain_name(factor.gain) for factor in some)]
        found |= {graph.biases[name] for name in names if name in graph.biases}
        found |= {path for factor in some for path in factor.vector.paths}
    return {path for path in found & graph.shapes.keys() if leaves[path].ndim == 1}


def _is_end(graph: Graph, path: str) -> bool:
    """Whether nothing of a leaf may change places, but for one linear space."""
    linear = [place for space in graph.linear for place in space.places if place.path == path]
    return len(linear) == 1 and not any(graph.spaces(path, axis) for axis in range(len(graph.shapes[path])))


def carried(graph: Graph, path: str, leaf: np.ndarray, fits: Fits, skip: int | None = None) -> np.ndarray:
    """A leaf with its linear axes in the base's basis, but for the space ``skip``."""
    for number, fit in fits.items():
        for place in (*graph.linear[number].places, *graph.linear[number].vectors):
            if place.path == path and number != skip:
                leaf = mixed(leaf, place, fit)
    for number, places in enumerate(graph.heads):
        order = next((fits[s].order for s in fits if graph.linear[s].heads == number), None)
        for place in places:
            if place.path == path and order is not None:
                moved = np.moveaxis(leaf.copy(), place.axis, 0)
                moved[place.entries] = moved[place.entries[order]]
                leaf = np.moveaxis(moved, 0, place.axis)
    return leaf


def in_order(entries: np.ndarray, length: int) -> bool:
    """Whether a place's units, one entry each, are all of the axis, in its order."""
    return entries.shape[2] == 1 and np.array_equal(entries.reshape(-1), np.arange(length))


def mixed(leaf: np.ndarray, place: Place, fit: Fit) -> np.ndarray:
    """A leaf with the entries of one place in the base's basis, as float64 or, if it is that already, float32."""
    matrices = fit.inverses if place.reads else fit.matrices.swapaxes(1, 2)
    kind = np.float32 if leaf.dtype == np.float32 else np.float64
    moved = np.moveaxis(leaf, place.axis, 0).astype(kind, copy=False)
    if in_order(place.entries, len(moved)):
        taken = moved.reshape(*place.entries.shape[:2], -1)[fit.order]
        return np.moveaxis(np.matmul(matrices.astype(kind), taken).reshape(moved.shape), 0, place.axis)
    taken, moved = moved[place.entries[fit.order]], moved.copy()
    moved[place.entries] = np.matmul(matrices.astype(kind), taken.reshape(*taken.shape[:2], -1)).reshape(taken.shape)
    return np.moveaxis(moved, 0, place.axis)
