"""Which identities change alike, and which gains fold into the kernels before or behind them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse

from smark_jax.alignment._identities import Gain, Identities, Roots, gain_name
from smark_jax.alignment.spaces import Factor


class Keys(NamedTuple):
    """Components of identities that change alike, and for each identity whether it changes by the inverse transpose."""

    key: np.ndarray
    odd: np.ndarray
    selfdual: np.ndarray


def keys_of(walk: Identities, gains: Sequence[Gain]) -> Keys:
    n = walk.count
    same = np.concatenate(
        [np.zeros((2, 0), int), *walk.links, *(np.stack([gain.before, gain.after]) for gain in gains)], axis=1
    )
    flips = np.concatenate([np.zeros((2, 0), int), *walk.flips], axis=1)
    pairs = np.concatenate([same, same + n, flips + np.array([[0], [n]]), flips + np.array([[n], [0]])], axis=1)
    _, twice = _components(pairs, 2 * n)
    one, other = twice[:n], twice[n:]
    key = np.minimum(one, other)
    selfdual = np.zeros(2 * n, bool)
    selfdual[key[one == other]] = True
    _, key_of = np.unique(key, return_inverse=True)
    mapped = np.zeros(n, bool)
    mapped[key_of[one == other]] = True
    return Keys(key_of, one > other, mapped)


def _components(pairs: np.ndarray, n: int) -> tuple[int, np.ndarray]:
    matrix = sparse.coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(n, n))
    return sparse.csgraph.connected_components(matrix, directed=False)


class _Folding:
    """Components of keys that are joined by the gains that fold, and what stands in the way of folding."""

    def __init__(self, walk: Identities, axes: Mapping[tuple[str, int], np.ndarray], matrices: set[str], keys: Keys):
        self.roots = Roots()
        self.root = self.roots.of
        self.standing: dict[int, list[tuple[str, int, int]]] = {}
        self.vectors: tuple[dict[int, list[tuple[str, int, int]]], ...] = {}, {}
        self.makes, self.reads, self.bad, self.pending = (set[int]() for _ in range(4))
        self.ends: tuple[dict[int, set[int]], ...] = {}, {}
        reference = {}
        for number, gain in enumerate(walk.gains):
            for ends, ids in zip(self.ends, (gain.before, gain.after), strict=True):
                for key, odd in zip(keys.key[ids].tolist(), keys.odd[ids].tolist(), strict=True):
                    reference.setdefault(key, odd)
                    ends.setdefault(key, set()).add(number)
        even = keys.key[np.concatenate([np.zeros(0, int), *walk.even])]
        self.bad |= {*np.flatnonzero(keys.selfdual).tolist(), *even.tolist()} & reference.keys()
        for (path, axis), ids in axes.items():
            for entry, (key, odd) in enumerate(zip(keys.key[ids].tolist(), keys.odd[ids].tolist(), strict=True)):
                if key in reference:
                    other = odd != reference[key]
                    standing = self.standing if path in matrices else self.vectors[other]
                    standing.setdefault(key, []).append((path, axis, entry))
                    if path in matrices or other:
                        (self.reads if other else self.makes).add(key)

    def join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        if one != other:
            self.roots[other] = one
            for standing in (self.standing, *self.vectors):
                standing[one] = [*standing.get(one, []), *standing.get(other, [])]
            for ends in self.ends:
                ends[one] = ends.get(one, set()) | ends.get(other, set())
            for flags in (self.makes, self.reads, self.bad, self.pending):
                flags |= {one} if other in flags else set()

    def alone(self, number: int, sides: Sequence[tuple[list[int], list[int]]], end: int) -> bool:
        """Whether no other gain starts (``end`` 0) or ends (1) where this one does; those within count for nothing."""
        here = {self.root(key) for key in sides[number][end]}
        for other in set[int]().union(*(self.ends[end].get(key, ()) for key in here)) - {number}:
            if sides[other] != sides[number]:
                roots = [(self.root(before), self.root(after)) for before, after in zip(*sides[other], strict=True)]
                if any(pair[end] in here and pair[0] != pair[1] for pair in roots):
                    return False
        return True

    def free(self, some: Sequence[int], *flags: set[int]) -> bool:
        return not any(self.root(key) in flag for key in some for flag in flags)


def resolve(
    walk: Identities,
    axes: Mapping[tuple[str, int], np.ndarray],
    matrices: set[str],
    keys: Keys,
    tainted: np.ndarray,
) -> tuple[list[int], dict[str, list[Factor]]]:
    """The gains that fold into kernels, and these factors by path.

    A gain folds into the kernels that make what it multiplies if nothing else takes that, or else into the kernels that
    read its product if nothing else makes that. The first are sought in the order of the network's operations, the
    others from its end: gains may follow each other.
    """
    folding = _Folding(walk, axes, matrices, keys)
    sides = [(keys.key[gain.before].tolist(), keys.key[gain.after].tolist()) for gain in walk.gains]
    whole = [not (tainted[gain.before].any() or tainted[gain.after].any()) for gain in walk.gains]
    resolved: set[int] = set()
    found: dict[tuple[str, int, int], set[tuple[int, int]]] = {}

    def fold(number: int, end: int) -> None:
        if any(folding.root(one) == folding.root(other) for one, other in zip(*sides[number], strict=True)):
            return  # another vector stands between the same units
        resolved.add(number)
        for position, key in enumerate(sides[number][end]):
            for standing in (folding.standing, folding.vectors[end]):  # a bias behind the gain stays
                for path, axis, entry in standing.get(folding.root(key), []):
                    found.setdefault((path, axis, number), set()).add((entry, position))
        for one, other in zip(*sides[number], strict=True):
            folding.join(one, other)

    twins: dict[object, int] = {}
    for number, (before, after) in enumerate(sides):
        if twins.setdefault(_twin(walk, number, sides[number]), number) in resolved:
            resolved.add(number)
        elif (
            whole[number]
            and folding.free(before, folding.bad, folding.reads, folding.pending)
            and folding.alone(number, sides, 0)
        ):
            fold(number, 0)
        else:
            folding.pending |= {folding.root(key) for key in after}
    backward, twins = frozenset(resolved), {}
    for number in reversed(range(len(sides))):
        if number in resolved or twins.setdefault(_twin(walk, number, sides[number]), number) in resolved:
            resolved.add(number)
        elif (
            whole[number]
            and folding.free(sides[number][1], folding.bad, folding.makes)
            and folding.alone(number, sides, 1)
        ):
            fold(number, 1)
    factors: dict[str, list[Factor]] = {}
    for (path, axis, number), pairs in sorted(found.items()):
        entries, positions = np.array(sorted(pairs)).T
        factor = Factor(axis, entries, positions, walk.gains[number].vector, number, number not in backward)
        factors.setdefault(path, []).append(factor)
    return sorted(resolved), factors


def _twin(walk: Identities, number: int, sides: tuple[list[int], list[int]]) -> object:
    """What two gains share that are one: the same factors between the same units, with the same vector added behind."""
    gain = walk.gains[number]
    if gain.form < 0 and len(gain.vector.paths) != 1:
        return number
    factors = gain.vector.paths if len(gain.vector.paths) == 1 else gain.form
    return factors, walk.biases.get(gain_name(number)), *map(tuple, sides)
