r"""Which unit of the suspect is which unit of the base: balanced kernels, assignment problems, coordinate descent.

A kernel's slices may have been scaled by any positive numbers, along its inputs and its outputs. Balancing (Sinkhorn
and Knopp: scale every slice to an RMS of one, axis by axis, until nothing changes) removes these factors. The balanced
kernels of suspect and base then differ only by the order of units and by changes to the weights. Units are matched
space by space: the inner products of all slices whose other axes are already known define a linear assignment problem.
It is solved first where most is known, then for each space in turn until nothing changes.
(Ainsworth, Hayase, Srinivasa 2023, "Git Re-Basin", section 3.2, without the scales.)

What is maximised is a likelihood, whose parameters are estimated on the way. A balanced kernel of the suspect is c
times the base's, plus noise of variance :math:`1 - c^2`: so a kernel of noise does not outvote one that was left alone.
A unit is where the base has it with probability :math:`\pi`, the share that was found there, and else anywhere: so
units of a suspect that nobody rearranged do not move because of noise.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax.alignment.graph import Graph

_ROUNDS = 30
_TOLERANCE = 1e-4
_SWEEPS = 20
_COSINE = 0.5  # of a kernel's, before anything is known
_LEAST, _MOST = 0.01, 0.999

Leaves = dict[str, np.ndarray]


class Match(NamedTuple):
    """Which unit of the suspect corresponds to which unit of the base.

    Attributes:
      units: for each space, the suspect's unit for each unit of the base, or -1; shape [units of the base].
      signs: for each space, +-1 for each unit of the base.
      likelihood: the logarithm of the likelihood, up to a constant.
    """

    units: tuple[np.ndarray, ...]
    signs: tuple[np.ndarray, ...]
    likelihood: float


def kernels(graph: Graph) -> list[str]:
    """The leaves by which units are recognised: those of two or more axes of which at least one belongs to a space."""
    return [
        path
        for path, shape in graph.shapes.items()
        if len(shape) > 1 and any(graph.spaces(path, axis) for axis in range(len(shape)))
    ]


def balance(graph: Graph, path: str, leaf: np.ndarray, sizes: Sequence[int]) -> dict[int, np.ndarray]:
    """By axis, the factor of each entry that brings every unit's slice to an RMS of one.

    Slices of zeros and entries of fixed places have the factor one. Computed in float64: somebody may have scaled units
    by factors whose squares float32 does not hold.
    """
    power = np.square(leaf, dtype=np.float64)
    axes = {axis: graph.entries(path, axis, sizes) for axis in range(leaf.ndim) if graph.spaces(path, axis)}
    factors = {axis: np.ones(leaf.shape[axis]) for axis in axes}
    density = graph.density(path)  # an RMS over the weights that the leaf's own form has
    for _ in range(_ROUNDS):
        change = 0.0
        for axis, spaces in axes.items():
            others = tuple(a for a in range(leaf.ndim) if a != axis)
            weights = power
            for other in set(axes) - {axis}:
                weights = weights * along(np.square(factors[other]), other, leaf.ndim)
            mean = weights.mean(axis=others)
            for entries in spaces.values():
                level = mean[entries].mean(axis=1) / density
                new = np.where(level > 0, 1 / np.sqrt(np.where(level > 0, level, 1)), 1)
                old = factors[axis][entries[:, 0]]
                change = max(change, float(np.abs(np.log(new / old)).max()))
                factors[axis][entries] = new[:, None]
        if change < _TOLERANCE or len(axes) == 1:
            break
    return factors


def balanced(graph: Graph, path: str, leaf: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The leaf times its factors."""
    for axis, factor in balance(graph, path, leaf, sizes).items():
        leaf = leaf * along(factor, axis, leaf.ndim)
    return leaf.astype(np.float32)


def match(graph: Graph, suspect: Leaves, base: Leaves, sizes: Sequence[int], alive: Sequence[np.ndarray]) -> Match:
    """Finds the suspect's unit for each unit of the base.

    Args:
      graph: of the base.
      suspect: leaves by path, of the suspect's widths.
      base: leaves by path.
      sizes: the suspect's widths.
      alive: the units that may be matched.

    Returns:
      The more likely end of two descents: one starts from the fixed entries (images, logits, windows), the other, where
      all widths agree, from the suspect's own order.
    """
    paths = kernels(graph)
    theirs = {path: balanced(graph, path, suspect[path], sizes) for path in paths}
    ours = {path: balanced(graph, path, base[path], graph.sizes) for path in paths}
    search = _Search(graph, theirs, ours, tuple(sizes), alive)
    starts: list[dict[int, tuple[np.ndarray, np.ndarray]]] = [search.greedy()]
    if tuple(sizes) == graph.sizes and all(a.all() for a in alive):
        starts.append({s: (np.arange(n), np.ones(n, np.float32)) for s, n in enumerate(graph.sizes)})
    ends = [search.descend(start) for start in starts]
    return max(ends, key=lambda end: end.likelihood)


class _Search:
    """Two sets of balanced kernels, and assignments between their units."""

    def __init__(
        self, graph: Graph, theirs: Leaves, ours: Leaves, sizes: tuple[int, ...], alive: Sequence[np.ndarray]
    ) -> None:
        self.graph, self.theirs, self.ours, self.sizes, self.alive = graph, theirs, ours, sizes, alive
        self.uses: dict[int, list[tuple[str, int]]] = {
            space: [place for place in graph.places(space) if place[0] in theirs] for space in range(len(sizes))
        }
        self.cosines: dict[str, float] = dict.fromkeys(ours, _COSINE)

    def known(self, place: tuple[str, int], space: int, done: Mapping[int, object]) -> bool:
        path, axis = place
        others = (a for a in range(self.ours[path].ndim) if a != axis)
        return all(self.graph.spaces(path, a) <= set(done) for a in others) and (
            self.graph.spaces(path, axis) <= {space, *done}
        )

    def greedy(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        while len(done) < len(self.sizes):
            evidence = {
                space: sum(
                    self.graph.weights(p[0]) // self.graph.sizes[space] for p in uses if self.known(p, space, done)
                )
                for space, uses in self.uses.items()
                if space not in done
            }
            space = max(evidence, key=lambda s: evidence[s])
            places = [p for p in self.uses[space] if self.known(p, space, done)]
            done[space] = self.assign(space, places, done)
        return done

    def descend(self, start: dict[int, tuple[np.ndarray, np.ndarray]]) -> Match:
        now = dict(start)
        self.cosines = dict.fromkeys(self.ours, _COSINE)
        for _ in range(_SWEEPS):
            before = {space: units.copy() for space, (units, _) in now.items()}
            for space in now:
                now[space] = self.assign(space, self.uses[space], now)
            if all((before[space] == now[space][0]).all() for space in now):
                break
        likelihood = -sum(self.graph.weights(path) * math.log1p(-(c**2)) for path, c in self.cosines.items()) / 2
        likelihood += sum(self.prior(space, now[space][0]) for space in now)
        order = range(len(self.sizes))
        return Match(tuple(now[s][0] for s in order), tuple(now[s][1] for s in order), likelihood)

    def stay(self, space: int, units: np.ndarray) -> tuple[int, float, float]:
        """How many units are where the base has them, and the log probabilities of that and of each other place.

        Where widths differ, no place is the base's own.
        """
        size = len(units)
        if size != self.sizes[space] or size == 1:
            return 0, -math.log(size), -math.log(size)
        kept = int((units == np.arange(size)).sum())
        share = (kept + 0.5) / (size + 1)
        return kept, math.log(share), math.log1p(-share) - math.log(size - 1)

    def prior(self, space: int, units: np.ndarray) -> float:
        """The log probability of an assignment before the weights are seen."""
        kept, here, elsewhere = self.stay(space, units)
        return kept * here + (len(units) - kept) * elsewhere

    def assign(
        self, space: int, places: Sequence[tuple[str, int]], done: Mapping[int, tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The most likely assignment of a space's units, and their signs."""
        from scipy import optimize  # here and not above: most suspects are read without alignment

        size = self.graph.sizes[space]
        total = np.zeros((size, self.sizes[space]), np.float32)
        signed = np.zeros_like(total)
        found = {}
        for place in places:
            ours = slices(self.graph, self.ours[place[0]], place, space, self.graph.sizes).reshape(size, -1)
            products = [
                ours @ self.carried(place, space, done, flips).reshape(self.sizes[space], -1).T
                for flips in (True, False)[: 1 + any((done[s][1] < 0).any() for s in done if s != space)]
            ]
            best = max(products, key=lambda product: float(np.abs(product).max(axis=1).sum()))
            cosine = self.cosines[place[0]]
            total += cosine / (1 - cosine**2) * np.abs(best)
            signed += cosine / (1 - cosine**2) * best
            found[place] = best
        if space in done:
            _, here, elsewhere = self.stay(space, done[space][0])
            total[np.diag_indices(min(total.shape))] += here - elsewhere
        total[:, ~self.alive[space]] = -np.abs(total).max() - 1
        columns = total.argmax(axis=1)
        rows = np.arange(size)
        if len(np.unique(columns)) < size:  # else the best of each row is the best of all
            rows, columns = optimize.linear_sum_assignment(total, maximize=True)
        units = np.full(size, -1)
        units[rows] = np.where(self.alive[space][columns], columns, -1)
        signs = np.ones(size, np.float32)
        signs[rows] = np.where(signed[rows, columns] < 0, -1, 1)
        alive = units[rows] >= 0
        for (path, _), best in found.items():
            cosine = float(np.abs(best[rows, columns][alive]).sum()) / self.graph.weights(path)
            self.cosines[path] = min(max(cosine, _LEAST), _MOST)
        return units, signs

    def carried(
        self, place: tuple[str, int], space: int, done: Mapping[int, tuple[np.ndarray, np.ndarray]], flips: bool
    ) -> np.ndarray:
        """The suspect's slices of a space's units, with their other axes in the base's order."""
        path, axis = place
        leaf = self.theirs[path]
        for other in range(leaf.ndim):
            if other != axis and self.graph.spaces(path, other):
                leaf = reorder(self.graph, leaf, (path, other), self.sizes, done, flips)
        return slices(self.graph, leaf, place, space, self.sizes)


def reorder(
    graph: Graph,
    leaf: np.ndarray,
    place: tuple[str, int],
    sizes: Sequence[int],
    done: Mapping[int, tuple[np.ndarray, np.ndarray]],
    flips: bool = False,
) -> np.ndarray:
    """A leaf with one axis in the base's order; entries without a unit in the suspect are zero."""
    path, axis = place
    theirs, ours = graph.entries(path, axis, sizes), graph.entries(path, axis, graph.sizes)
    index = np.full(graph.length(path, axis, graph.sizes), -1)
    sign = np.ones(index.size, np.float32)
    for space, (units, signs) in done.items():
        if space in ours:
            index[ours[space]] = np.where(units[:, None] >= 0, theirs[space][units], -1)
            sign[ours[space]] = signs[:, None]
    index[_fixed(graph, place, graph.sizes)] = _fixed(graph, place, sizes)
    taken = leaf.take(index, axis=axis)
    factor = np.where(index >= 0, sign if flips else 1, 0).astype(np.float32)
    return taken * along(factor, axis, leaf.ndim)


def _fixed(graph: Graph, place: tuple[str, int], sizes: Sequence[int]) -> np.ndarray:
    """The entries of an axis that belong to no space."""
    everything = np.ones(graph.length(*place, sizes), bool)
    for entries in graph.entries(*place, sizes).values():
        everything[entries] = False
    return np.flatnonzero(everything)


def slices(graph: Graph, leaf: np.ndarray, place: tuple[str, int], space: int, sizes: Sequence[int]) -> np.ndarray:
    """The slices of a space's units along an axis, shape [units, entries of each, ...]."""
    path, axis = place
    return np.moveaxis(leaf, axis, 0)[graph.entries(path, axis, sizes)[space]]


def along(vector: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """A vector as an array that broadcasts along one axis of ``ndim``."""
    return vector.reshape([-1 if a == axis else 1 for a in range(ndim)])
