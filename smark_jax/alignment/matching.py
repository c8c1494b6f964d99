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

from smark_jax.alignment.graph import Graph, Segment

_ROUNDS = 30
_TOLERANCE = 1e-4
_SWEEPS = 20
_COSINE = 0.5  # of a kernel's, before anything is known
_LEAST, _MOST = 0.01, 0.999
_CLEAR = 0.8  # cosine above which two kernels, or the slices of two units, are the same ones
_SLACK = 1e-3

Leaves = dict[str, np.ndarray]
Done = Mapping[int, tuple[np.ndarray, np.ndarray]]
"""For spaces that are assigned, the suspect's unit for each unit of the base, or -1, and +-1 for each."""


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
    axes = {axis: graph.entries(path, axis, sizes) for axis in range(leaf.ndim) if graph.spaces(path, axis)}
    if not axes:
        return {}
    power = np.square(leaf, dtype=np.float64).mean(axis=tuple(a for a in range(leaf.ndim) if a not in axes))
    factors = {axis: np.ones(leaf.shape[axis]) for axis in axes}
    density = graph.density(path)  # an RMS over the weights that the leaf's own form has
    for _ in range(_ROUNDS):
        change = 0.0
        for place, (axis, spaces) in enumerate(axes.items()):
            mean = power
            for other, factor in reversed(list(enumerate(factors.values()))):  # from the last, so that others stay
                if other != place:
                    mean = np.tensordot(mean, np.square(factor) / len(factor), (other, 0))
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


def match(
    graph: Graph,
    suspect: Leaves,
    ours: Leaves,
    sizes: Sequence[int],
    alive: Sequence[np.ndarray],
    before: Done | None = None,
) -> Match:
    """Finds the suspect's unit for each unit of the base.

    Args:
      graph: of the base.
      suspect: leaves by path, of the suspect's widths.
      ours: the base's kernels by path, balanced.
      sizes: the suspect's widths.
      alive: the units that may be matched.
      before: units and signs of some spaces, found when less was known.

    Returns:
      The most likely end of some descents. They start from what was found before, from the fixed entries (images,
      logits, windows), and, where all widths agree, from the suspect's own order; of the last two, first from the
      order if the kernels are alike in it. A descent that recognises all spaces is the last one.
    """
    paths = kernels(graph)
    theirs = {path: balanced(graph, path, suspect[path], sizes) for path in paths}
    search = _Search(graph, theirs, {path: ours[path] for path in paths}, tuple(sizes), alive)
    starts: list[Done | None] = [{}]
    if tuple(sizes) == graph.sizes and all(a.all() for a in alive):
        starts.append({s: (np.arange(n), np.ones(n, np.float32)) for s, n in enumerate(graph.sizes)})
        starts = starts[::-1] if search.in_order() else starts
    ends = []
    for start in [before, *starts] if before else starts:
        ends.append(search.descend(search.greedy(start or {})))
        if search.clear():
            return ends[-1]
    return max(ends, key=lambda end: end.likelihood)


class _Search:
    """Two sets of balanced kernels, and assignments between their units."""

    def __init__(
        self, graph: Graph, theirs: Leaves, ours: Leaves, sizes: tuple[int, ...], alive: Sequence[np.ndarray]
    ) -> None:
        self.graph, self.theirs, self.ours, self.sizes, self.alive = graph, theirs, ours, sizes, alive
        self.spaces = {
            (path, axis): graph.spaces(path, axis) for path, leaf in ours.items() for axis in range(leaf.ndim)
        }
        self.uses: dict[int, list[tuple[str, int]]] = {space: [] for space in range(len(sizes))}
        for place, some in self.spaces.items():
            for space in some:
                self.uses[space].append(place)
        self.cosines: dict[str, float] = dict.fromkeys(ours, _COSINE)

    def in_order(self) -> bool:
        """Whether the kernels are alike in the suspect's own order."""
        size = sum(self.graph.weights(path) for path in self.ours)
        return sum(float(np.vdot(leaf, self.ours[path])) for path, leaf in self.theirs.items()) > _COSINE * size

    def clear(self) -> bool:
        r"""Whether a kernel of every space is so much like the base's that no other order can be.

        Two orders of a kernel with cosines above :math:`\sqrt{1/2}` with the base's are alike themselves.
        """
        return all(max((self.cosines[path] for path, _ in uses), default=1.0) > _CLEAR for uses in self.uses.values())

    def known(self, place: tuple[str, int], space: int, done: Done) -> bool:
        path, axis = place
        others = (a for a in range(self.ours[path].ndim) if a != axis)
        return all(self.spaces[path, a] <= done.keys() for a in others) and self.spaces[place] <= {space, *done}

    def greedy(self, start: Done) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Assignments of the other spaces too, first where most is known."""
        self.cosines = dict.fromkeys(self.ours, _COSINE)
        done = dict(start)
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

    def descend(self, start: Done) -> Match:
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

    def assign(self, space: int, places: Sequence[tuple[str, int]], done: Done) -> tuple[np.ndarray, np.ndarray]:
        """The most likely assignment of a space's units, and their signs.

        Units that stand out already keep their partners, and only the others are assigned anew, so that the outcome is
        never less likely than what was found before.
        """
        from scipy import optimize  # here and not above: most suspects are read without alignment

        size = self.graph.sizes[space]
        sides = [self.sides(place, space, done) for place in places]
        weights = [self.cosines[path] / (1 - self.cosines[path] ** 2) for path, _ in places]
        units, agreed = np.full(size, -1), [np.zeros(size, np.float32) for _ in places]
        settled = np.zeros(size, bool)
        if space in done:
            held, inner = self.settled(sides, weights, done[space][0])
            if 2 * held.sum() >= size:
                settled = held
                units[held] = done[space][0][held]
                for number, (best, values) in enumerate(inner):
                    sides[number] = sides[number][0], [sides[number][1][best]]
                    agreed[number][held] = values[held]
        rows = np.flatnonzero(~settled)
        columns = np.setdiff1d(np.arange(self.sizes[space]), units[settled])
        total, products = np.zeros((len(rows), len(columns)), np.float32), []
        for weight, (ours, theirs) in zip(weights, sides, strict=True) if total.size else ():
            some, among = (ours, None) if len(rows) == size else (ours[rows], columns)
            options = [some @ (leaf if among is None else leaf[among]).T for leaf in theirs]
            products.append(max(options, key=lambda one: float(np.abs(one).max(axis=1).sum())))
            total += weight * np.abs(products[-1])
        if space in done:
            _, here, elsewhere = self.stay(space, done[space][0])
            total[rows[:, None] == columns] += here - elsewhere
        alive = self.alive[space][columns]
        total[:, ~alive] = -np.abs(total).max(initial=0) - 1
        first, second = np.arange(len(rows)), total.argmax(axis=1) if len(columns) else np.zeros(0, int)
        if len(np.unique(second)) < len(rows):  # else the best of each row is the best of all
            first, second = optimize.linear_sum_assignment(total, maximize=True)
        units[rows[first]] = np.where(alive[second], columns[second], -1)
        for values, best in zip(agreed, products, strict=False):
            values[rows[first]] = best[first, second]
        signed = sum((weight * values for weight, values in zip(weights, agreed, strict=True)), np.zeros(size))
        for (path, _), (ours, _), values in zip(places, sides, agreed, strict=True):
            cosine = float(np.abs(values[units >= 0]).sum()) / max(float(np.vdot(ours, ours)), 1e-30)
            self.cosines[path] = min(max(cosine, _LEAST), _MOST)
        return units, np.where(signed < 0, -1, 1).astype(np.float32)

    def settled(
        self, sides: Sequence[tuple[np.ndarray, list[np.ndarray]]], weights: Sequence[float], units: np.ndarray
    ) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
        """The units that agree with their partners as most units do, and better than two different units could.

        Also, for each place, which form of the suspect's slices agrees best, and its inner products.
        """
        inner, reached, possible = [], np.zeros(len(units)), np.zeros(len(units))
        for weight, (ours, theirs) in zip(weights, sides, strict=True):
            options = [np.einsum("nk,nk->n", ours, leaf[units]) for leaf in theirs]
            best = max(range(len(options)), key=lambda i: float(np.abs(options[i]).sum()))
            norms = np.sqrt(
                np.einsum("nk,nk->n", ours, ours) * np.einsum("nk,nk->n", theirs[best], theirs[best])[units]
            )
            reached, possible = reached + weight * np.abs(options[best]), possible + weight * norms
            inner.append((best, options[best]))
        missing = 1 - reached / np.where(possible > 0, possible, 1)
        usual = float(np.median(missing))
        return (units >= 0) & (possible > 0) & (missing < min(2 * usual + _SLACK, 1 - _CLEAR)), inner

    def sides(self, place: tuple[str, int], space: int, done: Done) -> tuple[np.ndarray, list[np.ndarray]]:
        """The base's slices of a space's units and the suspect's, these with the signs of other spaces and without."""
        path, axis = place
        rows = (self.graph.sizes[space], -1)
        ours = slices(self.graph, self.ours[path], place, space, self.graph.sizes).reshape(rows)
        around = set().union(*(self.spaces[path, a] for a in range(self.ours[path].ndim))) - {space}
        flips = any((done[s][1] < 0).any() for s in around & done.keys())
        found = []
        for flip in (True, False)[: 1 + flips]:
            leaf = self.theirs[path]
            for other in range(leaf.ndim):
                if other != axis and self.spaces[path, other]:
                    leaf = reorder(self.graph, leaf, (path, other), self.sizes, done, flip)
            found.append(slices(self.graph, leaf, place, space, self.sizes).reshape(self.sizes[space], -1))
        return ours, found


def reorder(
    graph: Graph,
    leaf: np.ndarray,
    place: tuple[str, int],
    sizes: Sequence[int],
    done: Done,
    flips: bool = False,
) -> np.ndarray:
    """A leaf with one axis in the base's order; entries without a unit in the suspect are zero."""
    path, axis = place
    runs = graph.layout[place]
    if len(runs) == 1 and runs[0]._replace(length=0) == Segment(runs[0].space, 1, 1, 0) and runs[0].space in done:
        index, sign = done[runs[0].space]
    else:
        theirs, ours = graph.entries(path, axis, sizes), graph.entries(path, axis, graph.sizes)
        index = np.full(graph.length(path, axis, graph.sizes), -1)
        sign = np.ones(index.size, np.float32)
        for space in ours.keys() & done.keys():
            units, signs = done[space]
            index[ours[space]] = np.where(units[:, None] >= 0, theirs[space][units], -1)
            sign[ours[space]] = signs[:, None]
        index[_fixed(graph, place, graph.sizes)] = _fixed(graph, place, sizes)
    taken = leaf.take(index, axis=axis)
    factor = np.where(index >= 0, sign if flips else 1, 0).astype(np.float32)
    return taken if (factor == 1).all() else taken * along(factor, axis, leaf.ndim)


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
