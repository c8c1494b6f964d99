r"""Finding the base's basis for a suspect's linear spaces: Procrustes, and least squares on both factors.

Where units may be mixed (:mod:`smark_jax.alignment.spaces`), an order of units is not enough. A stream of residual
additions between layer norms may have been rotated by any orthogonal matrix, the queries and keys of a head multiplied
by any invertible one and its inverse transpose. Such a matrix is fitted wherever the other axes of kernels that touch
the space are known, first of all those that nobody can move (windows, positions, logits):

* orthogonal matrices by Procrustes (Schönemann 1966): the Q that minimises :math:`\sum_k \|Q^T S_k - B_k\|^2` is
  :math:`U V^T` for the singular value decomposition of :math:`\sum_k S_k B_k^T`;
* others by least squares on what makes the units, :math:`A^T F_s \approx F_b`, and on what reads them,
  :math:`A^{-1} G_s \approx G_b`. Blocks (heads) are told apart by the products :math:`F^T G`, which no A changes.

A fit sees suspect and base only, so that no innocent's codeword enters. What it costs a mark is the dimensions of the
group: half the square of a stream's width, the square of a head's.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from smark_jax.alignment import matching
from smark_jax.alignment.gauge import Fit, carried, fit, mixed
from smark_jax.alignment.graph import Graph
from smark_jax.alignment.matching import Leaves
from smark_jax.alignment.spaces import Place

_ROUNDS = 8
"""Passes over all spaces after the first in which each has a fit."""
_SETTLED = 1e-4
"""Fits that changed by less, relative to their norms, count as the same."""
_STEPS = 8
_TOLERANCE = 1e-6
_RIDGE = 1e-9
_PRIOR = 1e-7
"""Weight of the identity: directions that no leaf shows stay, so that the base's own fit is the identity."""
_CERTAIN = 0.8
"""Blocks whose products have a higher cosine are the same."""
_LARGE = 1e30
_MANY = 10**5
_SHOWN = 1e-9
"""Leaves show a direction if its share of their squares is larger: below is rounding."""

Evidence = Sequence[tuple[bool, np.ndarray, np.ndarray]]
"""For each place of a space: whether it reads, and the suspect's and the base's units, [blocks, units, weights]."""


def solve(
    graph: Graph, theirs: Leaves, ours: Leaves, sizes: Sequence[int], alive: Sequence[np.ndarray]
) -> tuple[dict[int, Fit], matching.Match, list[int]]:
    """Finds a fit for every linear space, the suspect's unit for each unit of the others, and spaces that are in doubt.

    In doubt is a space that no leaf shows, or of which the first leaves show fewer dimensions than it has: what is
    found from there may be far from the truth.

    Args:
      graph: of the base.
      theirs: the suspect's leaves by path, canonical, of the suspect's widths.
      ours: the base's, canonical.
      sizes: the suspect's widths.
      alive: the units that may be matched.
    """
    ours = {path: matching.balanced(graph, path, ours[path], graph.sizes) for path in theirs.keys() & _used(graph)}
    if not graph.linear:
        return {}, matching.match(graph, theirs, ours, sizes, alive), []
    search = _Search(graph, theirs, ours, sizes, alive)
    before = -1
    while search.progress > before:  # each pass makes more axes known
        before = search.progress
        search.fit_new(enough=True)
        search.match()
        if search.progress == before:
            search.fit_new(enough=False)
    for _ in range(_ROUNDS):
        search.fit_again()
    search.match()
    for _ in range(2):
        search.fit_again()
    present = {n for n, space in enumerate(graph.linear) if any(place.path in theirs for place in space.places)}
    return search.fits, search.found, sorted((present - search.fits.keys()) | search.weak)


class _Search:
    """Fits and orders found so far."""

    def __init__(
        self, graph: Graph, theirs: Leaves, ours: Leaves, sizes: Sequence[int], alive: Sequence[np.ndarray]
    ) -> None:
        self.graph, self.sizes, self.alive = graph, sizes, alive
        self.theirs = {path: _single(leaf) for path, leaf in theirs.items()}
        self.ours = ours
        self.fits: dict[int, Fit] = {}
        self.changes: dict[int, float] = {}
        self.known: set[int] = set()
        self.weak: set[int] = set()
        self.orders: dict[int, np.ndarray] = {}
        units, signs = (tuple(make(n) for n in graph.sizes) for make in (np.arange, np.ones))
        self.found = matching.Match(units, signs, 0.0)
        self.spaces: dict[str, set[int]] = {}
        for number, space in enumerate(graph.linear):
            for place in space.places:
                self.spaces.setdefault(place.path, set()).add(number)

    def match(self) -> None:
        """Matches the units of the other spaces by the leaves whose linear axes are known."""
        away = {path for path in self.theirs if not self.spaces.get(path, set()) <= self.fits.keys()}
        graph = self.graph.without(away)
        before = {space: (self.found.units[space], self.found.signs[space]) for space in self.known}
        self.known = {s for s in range(len(graph.sizes)) if any(len(graph.shapes[p]) > 1 for p, _ in graph.places(s))}
        theirs = {p: carried(graph, p, self.theirs[p], self.fits) for p in matching.kernels(graph)}
        last, self.found = self.found, matching.match(graph, theirs, self.ours, self.sizes, self.alive, before)
        if any((a != b).any() for a, b in zip(last[0] + last[1], self.found[0] + self.found[1], strict=True)):
            self.changes.clear()

    def usable(self, path: str, number: int) -> bool:
        """Whether all of a leaf is known but for the space."""
        if path not in self.theirs:
            return False
        others = {s for axis in range(len(self.graph.shapes[path])) for s in self.graph.spaces(path, axis)}
        return self.spaces[path] <= {number, *self.fits} and others <= self.known

    @property
    def progress(self) -> int:
        """How many spaces are known."""
        return len(self.fits) + len(self.known)

    def fit_new(self, enough: bool) -> None:
        """Fits spaces without a fit; ``enough``: only those of which as many dimensions are seen as they have."""
        for together in self.sets():
            found = {number: self.evidence(number) for number in together if number not in self.fits}
            seen = {n: sum(a.shape[2] for _, a, _ in some) for n, some in found.items() if some}
            if seen and all(not enough or seen.get(n, 0) >= self.graph.linear[n].width for n in found):
                self.weak |= {number for number, count in seen.items() if count < self.graph.linear[number].width}
                self.fit({number: found[number] for number in seen})

    def fit_again(self) -> None:
        """Fits spaces once more, each with what is known of the others by now, if any beside it changed."""
        for together in self.sets():
            some = [number for number in together if number in self.fits]
            beside = {
                n for number in some for place in self.graph.linear[number].places for n in self.spaces[place.path]
            }
            if any(self.changes.get(number, np.inf) > _SETTLED for number in beside & self.fits.keys()):
                last = [self.fits[number] for number in some]
                self.fit({number: self.evidence(number) for number in some})
                change = max(_difference(one, self.fits[number]) for one, number in zip(last, some, strict=True))
                self.changes |= dict.fromkeys(some, change)

    def sets(self) -> list[list[int]]:
        """The spaces, those together whose blocks have one order."""
        found: dict[int, list[int]] = {}
        for number, space in enumerate(self.graph.linear):
            found.setdefault(space.heads if space.heads >= 0 else -1 - number, []).append(number)
        return list(found.values())

    def fit(self, evidence: Mapping[int, Evidence]) -> None:
        """Fits spaces whose blocks have one order."""
        order = self.order(evidence)
        for number, some in evidence.items():
            space = self.graph.linear[number]
            pairs = [(reads, a[order], b) for reads, a, b in some]
            if space.group == "orthogonal":
                matrices = _rotation(pairs, space.ones)
            else:
                bases = [_basis([(reads, a[i], b[i]) for reads, a, b in pairs]) for i in range(space.blocks)]
                matrices = np.stack(bases)
            self.fits[number] = fit(order, matrices, space.group)

    def order(self, evidence: Mapping[int, Evidence]) -> np.ndarray:
        """The suspect's block for each of the base's, in which these spaces are most alike; kept once it is certain."""
        from scipy import optimize

        spaces = [self.graph.linear[number] for number in evidence]
        blocks, heads = max((space.blocks for space in spaces), default=1), min((s.heads for s in spaces), default=-1)
        if blocks == 1 or heads < 0:
            return np.arange(blocks)
        if heads not in self.orders:
            total = np.mean([_alike(some) for some in evidence.values()], axis=0)
            order = optimize.linear_sum_assignment(total, maximize=True)[1]
            if total[np.arange(blocks), order].min() < _CERTAIN:
                return order
            self.orders[heads] = order
        return self.orders[heads]

    def evidence(self, number: int) -> Evidence:
        """For each place whose other axes are known: whether it reads, and the suspect's and the base's units."""
        space = self.graph.linear[number]
        found = []
        for place in space.places:
            if not self.usable(place.path, number):
                continue
            theirs = self.ordered(place.path, number)
            for axis, factor in self.levels(place, number, theirs).items():
                theirs = theirs * matching.along(factor.astype(theirs.dtype), axis, theirs.ndim)
            a, b = (
                np.moveaxis(leaf, place.axis, 0)[place.entries].reshape(space.blocks, space.width, -1)
                for leaf in (theirs, self.ours[place.path])
            )
            if space.group == "orthogonal":  # which does not change the norm
                a = a * (float(np.linalg.norm(b)) / (float(np.linalg.norm(a)) or 1.0))
            else:
                a, b = a.astype(np.float64), b.astype(np.float64)
            found.append((place.reads, a, b))
        return found

    def ordered(self, path: str, skip: int | None) -> np.ndarray:
        """A leaf of the suspect in the base's order, signs and bases, but for the space ``skip``."""
        leaf = carried(self.graph, path, self.theirs[path], self.fits, skip)
        done = dict(enumerate(zip(self.found.units, self.found.signs, strict=True)))
        for axis in range(leaf.ndim):
            if self.graph.spaces(path, axis):
                leaf = matching.reorder(self.graph, leaf, (path, axis), self.sizes, done, True)
        return leaf

    def levels(self, place: Place, number: int, leaf: np.ndarray) -> dict[int, np.ndarray]:
        """By axis, the factors that bring units of the other spaces to an RMS of one, measured in the base's basis.

        A basis that is not orthogonal distorts them, so that there are none before its first fit.
        """
        if self.graph.linear[number].group == "linear":
            if number not in self.fits:
                return {}
            for own in self.graph.linear[number].places:
                if own.path == place.path:
                    leaf = mixed(leaf, own, self.fits[number])
        return matching.balance(self.graph, place.path, leaf, self.graph.sizes)


def _used(graph: Graph) -> set[str]:
    """The leaves by which spaces are matched or fitted."""
    return {*matching.kernels(graph), *(place.path for space in graph.linear for place in space.places)}


def _single(leaf: np.ndarray) -> np.ndarray:
    """A leaf of many entries as float32, for speed, if sums of them do not overflow there."""
    fits = leaf.ndim > 1 and leaf.size > _MANY and float(np.abs(leaf).max()) < _LARGE
    return leaf.astype(np.float32) if fits else leaf


def _difference(one: Fit, other: Fit) -> float:
    """The largest difference of two fits of a block, relative to its norm."""
    if (one.order != other.order).any():
        return np.inf
    norms = np.linalg.norm(other.matrices, axis=(1, 2))
    return float((np.linalg.norm(one.matrices - other.matrices, axis=(1, 2)) / np.maximum(norms, 1e-30)).max())


def _alike(evidence: Evidence) -> np.ndarray:
    """For each block of the base and each of the suspect, the cosine of their products F^T G; shape [base, suspect]."""
    makes = [(a, b) for reads, a, b in evidence if not reads]
    reads = [(a, b) for reads, a, b in evidence if reads]
    if not makes or not reads:
        makes = reads = makes or reads

    def gram(sides: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:  # [base, suspect, units, units]
        blocks, width = sides[0][0].shape[:2]
        flat = sum((b.reshape(blocks * width, -1) @ a.reshape(blocks * width, -1).T for a, b in sides), np.zeros(()))
        return flat.reshape(blocks, width, blocks, width).swapaxes(1, 2)

    def norms(one: int) -> np.ndarray:
        makers, readers = (
            sum((np.matmul(pair[one], pair[one].swapaxes(1, 2)) for pair in sides), np.zeros(()))
            for sides in (makes, reads)
        )
        return np.sqrt((makers * readers).sum((1, 2)))

    inner = (gram(makes) * gram(reads)).sum((2, 3))
    return inner / np.maximum(norms(1)[:, None] * norms(0)[None], 1e-30)


def _rotation(pairs: Evidence, ones: bool) -> np.ndarray:
    """The orthogonal matrix of each block; leaves count by their numbers of entries."""
    total = 0
    for _, a, b in pairs:
        norms = np.linalg.norm(a, axis=(1, 2)) * np.linalg.norm(b, axis=(1, 2))
        total = total + np.matmul(a, b.swapaxes(1, 2)) * (a[0].size / np.maximum(norms, 1e-30))[:, None, None]
    matrix = np.asarray(total)
    seen = np.linalg.norm(matrix, axis=(1, 2))[:, None, None]
    matrix = matrix + _PRIOR * seen * np.eye(matrix.shape[1])
    if ones:  # no kernel says anything of it, and it stays
        matrix = matrix + np.linalg.norm(matrix, axis=(1, 2))[:, None, None] / matrix.shape[1]
    left, _, right = np.linalg.svd(matrix)
    return np.matmul(left, right)


def _basis(pairs: Evidence) -> np.ndarray:
    r"""The matrix A of one block, by least squares on what makes its units and on what reads them.

    Either side alone would shrink it, as noise in a regressor does; both together do not. From their mean on, by
    Gauss-Newton: with F' = A^T F_s, G' = A^{-1} G_s, the step A (1 + E) solves the Sylvester equation
    :math:`F' F'^T E + E G' G'^T = F' (F_b - F')^T - (G_b - G') G'^T`.
    """
    grams = []
    for side in (False, True):
        some = [(a, b) for reads, a, b in pairs if reads == side]
        if some:
            own = np.sum([a @ a.T for a, _ in some], axis=0)
            both = np.sum([a @ b.T for a, b in some], axis=0)
            ridge = _RIDGE * (float(np.trace(own)) or 1.0) / len(own)
            prior = ridge * np.eye(len(own))
            grams.append((side, own, both, np.linalg.solve(own + prior, both + prior)))
    starts = [np.linalg.pinv(start).T if side else start for side, _, _, start in grams]
    matrix = np.mean(starts, axis=0)
    if len(starts) < 2:
        return matrix
    (_, f, f_base, _), (_, g, g_base, _) = grams

    def parts(matrix: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        inverse = np.linalg.inv(matrix)
        makes, reads = matrix.T @ f @ matrix, inverse @ g @ inverse.T
        to_base, from_base = matrix.T @ f_base, inverse @ g_base
        cost = float(np.trace(makes) - 2 * np.trace(to_base) + np.trace(reads) - 2 * np.trace(from_base))
        return cost, makes, reads, to_base - makes - from_base.T + reads

    best, least = matrix, np.inf
    try:
        for _ in range(_STEPS):
            cost, makes, reads, rest = parts(matrix)
            gain, best, least = least - cost, matrix if cost < least else best, min(cost, least)
            if not gain > _TOLERANCE * abs(least):
                break
            matrix = matrix + matrix @ _sylvester(makes, reads, rest)
    except np.linalg.LinAlgError:
        pass
    return best


def _sylvester(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The E of a E + E b = c, for positive semidefinite a and b, by their eigenvectors; none where both are zero."""
    (left, u), (right, v) = np.linalg.eigh(a), np.linalg.eigh(b)
    sums = left[:, None] + right[None]
    shown = sums > _SHOWN * float(sums.max())
    return u @ np.where(shown, u.T @ c @ v / np.where(shown, sums, 1), 0) @ v.T
