"""Superfluous units of a wider suspect: dead units are dropped, and copies of one unit are merged."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smark_jax.alignment.graph import Graph
from smark_jax.alignment.matching import Leaves, slices

_PARALLEL = 1e-2
"""Two units are copies of one if one minus the cosine between their incoming weights is below this."""
_DEAD = 1e-8
"""A unit is dead if its outgoing power, relative to an average unit's, is below this."""


class Merged(NamedTuple):
    """A suspect whose units with parallel incoming weights were merged.

    Attributes:
      leaves: by path; units that were merged into another have no outgoing weights any more.
      alive: for each space, the units that remain to be matched.
      members: for each space, by unit, those that were merged into it.
    """

    leaves: Leaves
    alive: tuple[np.ndarray, ...]
    members: tuple[dict[int, list[int]], ...]


def merge_duplicates(graph: Graph, leaves: Leaves, sizes: Sequence[int]) -> Merged:
    """Drops dead units, and merges units with parallel incoming weights by adding up their outgoing weights.

    It does so only where a space is wider than the base's, and for no more units than the difference in width, since a
    base may have such units of its own. A unit with incoming weights c w and outgoing weights v contributes the same as
    a unit with w and c v. After a normalisation, which removes c, the ratio of the gains takes its place. That is good
    enough to match the sum; :func:`smark_jax.alignment.align` then fits the factors. The copies of a split unit are
    parallel only once the split units before them are merged, so the spaces are processed in turns.
    """
    leaves, alive = dict(leaves), [np.ones(size, bool) for size in sizes]
    members: list[dict[int, list[int]]] = [{} for _ in sizes]
    wide = [s for s, size in enumerate(sizes) if size > graph.sizes[s] and _consumers(graph, s) and _makers(graph, s)]
    changed = True
    while changed:
        changed = False
        for space in wide:
            for first, second in _parallel(graph, leaves, space, sizes, alive[space]):
                ratio = _ratio(graph, leaves, space, sizes, first, second)
                alive[space][second] = False
                members[space].setdefault(first, []).extend([second, *members[space].pop(second, [])])
                for place in _consumers(graph, space):
                    entries = graph.entries(*place, sizes)[space]
                    leaf = np.moveaxis(leaves[place[0]].copy(), place[1], 0)
                    leaf[entries[first]] += ratio * leaf[entries[second]]
                    leaf[entries[second]] = 0
                    leaves[place[0]] = np.moveaxis(leaf, 0, place[1])
                changed = True
            _bury(graph, leaves, space, sizes, alive[space])
    return Merged(leaves, tuple(alive), tuple(members))


def _makers(graph: Graph, space: int) -> list[tuple[str, int]]:
    """Where a space's units have incoming weights."""
    return [p for p in graph.places(space) if p not in graph.consumed and len(graph.shapes[p[0]]) > 1]


def _consumers(graph: Graph, space: int) -> list[tuple[str, int]]:
    """Where a space's units have outgoing weights."""
    return [p for p in graph.places(space) if p in graph.consumed]


def _bury(graph: Graph, leaves: Leaves, space: int, sizes: Sequence[int], alive: np.ndarray) -> None:
    """Marks units whose outgoing weights are negligible as dead, at most as many as the space is too wide by."""
    consumers = _consumers(graph, space)
    power = [_flat(graph, leaves, place, space, sizes) for place in consumers]
    power = [np.square(rows).sum(axis=1) / max(float(np.square(rows).sum()), 1e-30) for rows in power]
    reach = np.sum(power, axis=0) * sizes[space]
    weakest = np.flatnonzero(alive)[np.argsort(reach[alive], kind="stable")]
    for unit in weakest[: int(alive.sum()) - graph.sizes[space]]:
        alive[unit] = bool(reach[unit] > _DEAD)


def _parallel(
    graph: Graph, leaves: Leaves, space: int, sizes: Sequence[int], alive: np.ndarray
) -> list[tuple[int, int]]:
    """Disjoint pairs of units with parallel incoming weights in every kernel, the most alike first."""
    _bury(graph, leaves, space, sizes, alive)
    excess = int(alive.sum()) - graph.sizes[space]
    if excess <= 0:
        return []
    rows = [_flat(graph, leaves, place, space, sizes) for place in _makers(graph, space)]
    if not graph.normalised(space):  # a bias belongs to the direction
        single = [p for p in graph.places(space) if len(graph.shapes[p[0]]) == 1]
        rows = [np.concatenate([*rows, *(_flat(graph, leaves, p, space, sizes) for p in single)], axis=1)]
    cosines = np.ones((sizes[space], sizes[space]), np.float32)
    for row in rows:
        norms = np.linalg.norm(row, axis=1, keepdims=True)
        unit = row / np.where(norms > 0, norms, 1)
        cosines = np.minimum(cosines, unit @ unit.T)
    cosines[~alive] = cosines[:, ~alive] = -1
    first, second = np.nonzero(np.triu(cosines > 1 - _PARALLEL, 1))
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for at in np.argsort(-cosines[first, second], kind="stable"):
        pair = int(first[at]), int(second[at])
        if taken.isdisjoint(pair) and len(pairs) < excess:
            pairs.append(pair)
            taken |= set(pair)
    return pairs


def _ratio(graph: Graph, leaves: Leaves, space: int, sizes: Sequence[int], first: int, second: int) -> float:
    """The ratio of the outputs of two parallel units, the second's over the first's.

    Without a normalisation, it is the ratio of their incoming weights. With one, it is the ratio of their entries in
    gain and bias. Mean and variance scale with the kernel instead, by the kernel's ratio and its square.
    """
    norms = [
        np.linalg.norm(_flat(graph, leaves, p, space, sizes)[[first, second]], axis=1) for p in _makers(graph, space)
    ]
    made = [float(b / a) if a > 0 else 1.0 for a, b in norms]
    if not graph.normalised(space):
        return made[0]
    vectors = [leaves[p[0]] for p in graph.places(space) if len(graph.shapes[p[0]]) == 1]
    where = [graph.entries(p[0], 0, sizes)[space] for p in graph.places(space) if len(graph.shapes[p[0]]) == 1]
    ratios = []
    for vector, entries in zip(vectors, where, strict=True):
        a, b = float(vector[entries[first]].mean()), float(vector[entries[second]].mean())
        if abs(a) > 1e-3 * float(np.abs(vector).mean()):
            ratios.append(b / a)
    free = [r for r in ratios if all(abs(r / m**power - 1) > 0.02 for m in made for power in (1, 2))]
    return float(np.median(free or [1.0]))


def _flat(graph: Graph, leaves: Leaves, place: tuple[str, int], space: int, sizes: Sequence[int]) -> np.ndarray:
    """The slices of a space's units as rows, shape [units, entries]."""
    return slices(graph, leaves[place[0]], place, space, sizes).reshape(sizes[space], -1)
