r"""Spaces whose units may not only change places but be mixed: which they are, and by which matrices.

Only linear operations touch them: a kernel makes them, kernels read them, and in between they are added, moved, and
summed over as a whole. Multiplying what makes them by any invertible matrix A and what reads them by its inverse
transpose leaves the function alone (queries and keys of an attention head, its values and outputs). Where sums of
squares are taken (a normalisation over channels), A must be orthogonal; where plain sums are taken too (the mean of a
layer norm), it must keep the vector of ones. A gain between the normalisation and the kernel that reads it is folded
into the kernel first, one between the kernel that makes a unit and its first use into that kernel.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from smark_jax.alignment._gains import Keys, keys_of, resolve
from smark_jax.alignment._identities import Identities, Roots
from smark_jax.alignment.spaces import Factor, Group, Linear, Place


class Found(NamedTuple):
    """The linear spaces of a network.

    Attributes:
      spaces: the spaces.
      heads: for each set of blocks, the places of leaves that follow their order, entries [blocks, 1, entries of each].
      factors: by path, the gains that are folded into a kernel.
      labels: components of identities that the spaces take, and with which nothing else is to be done.
      moving: components that stand for blocks of the spaces that change places.
      beyond: what is free and not undone: matrices that keep sums over units, gains that do not fold, blocks that stay.
      held: leaves on which gains depend that do not fold.
      levels: axes of kernels whose units are summed up, and may not be mixed.
    """

    spaces: tuple[Linear, ...]
    heads: tuple[tuple[Place, ...], ...]
    factors: Mapping[str, tuple[Factor, ...]]
    labels: frozenset[int]
    moving: frozenset[int]
    beyond: tuple[str, ...]
    held: frozenset[str]
    levels: tuple[tuple[str, int], ...]


def find(walk: Identities, axes: Mapping[tuple[str, int], np.ndarray], matrices: set[str], label: np.ndarray) -> Found:
    """The linear spaces.

    Args:
      walk: after the pass.
      axes: identities of each leaf's axes, flattened.
      matrices: leaves of two or more axes with several entries: the others are vectors, and no evidence.
      label: for each identity, its component under all ties.
    """
    keys = keys_of(walk, [])
    tainted = _tainted(walk, label)
    resolved, factors = resolve(walk, axes, matrices, keys, tainted[label])
    linear, unfolded = ~tainted[label], np.zeros(walk.count, bool)
    for number, gain in enumerate(walk.gains):
        if number not in resolved:
            tainted[label[gain.before]] = tainted[label[gain.after]] = True
            for ids in (gain.before, gain.after):  # else orthogonal matrices on both sides of factors leave no choice
                unfolded[label[ids[linear[ids] & ~keys.selfdual[keys.key[ids]]]]] = True
    keys = keys_of(walk, [walk.gains[number] for number in resolved])
    even = np.zeros(walk.count, bool)
    even[keys.key[np.concatenate([np.zeros(0, int), *walk.even])]] = True
    summed = even[keys.key] & ~keys.selfdual[keys.key] & ~tainted[label]
    ids = np.concatenate([np.zeros(0, int), *(ids for (path, _), ids in axes.items() if path in matrices)])
    beyond = ["sums over channels that may be mixed"] * bool(summed[ids].any())
    beyond += ["gains that do not fold"] * bool((np.bincount(label[ids[unfolded[label[ids]]]]) > 1).any())
    tainted[label[summed]] = True
    levels = tuple(place for place, ids in axes.items() if place[0] in matrices and even[keys.key[ids]].all())
    levels = tuple(place for place in levels if place not in walk.consumed and tainted[label[axes[place]]].all())
    units = _units(walk, axes, matrices, keys, label, tainted)
    spaces, heads, moving, staying = _spaces(walk, axes, keys, matrices, label, units, even)
    beyond += ["blocks of channels that may change places"] * staying
    held = frozenset[str]().union(*(g.vector.paths for n, g in enumerate(walk.gains) if n not in resolved))
    used = frozenset(
        int(label[axes[place.path, place.axis][e]])
        for places in (*(s.places for s in spaces), *heads)
        for place in places
        for e in place.entries.reshape(-1)
    )
    standing = {(place.path, place.axis) for space in spaces for place in (*space.places, *space.vectors)}
    kept = {path: tuple(f for f in some if (path, f.axis) in standing) for path, some in factors.items()}
    return Found(
        spaces, heads, {path: some for path, some in kept.items() if some}, used, moving, tuple(beyond), held, levels
    )


def _tainted(walk: Identities, label: np.ndarray) -> np.ndarray:
    """Components that something else than a linear operation touches."""
    tainted = np.zeros(walk.count, bool)
    tainted[label[np.concatenate([np.zeros(0, int), *walk.singles, *walk.frozen])]] = True
    return tainted


def _units(
    walk: Identities,
    axes: Mapping[tuple[str, int], np.ndarray],
    matrices: set[str],
    keys: Keys,
    label: np.ndarray,
    tainted: np.ndarray,
) -> dict[tuple[Any, ...], dict[Any, list[int]]]:
    """Keys of units that may be mixed: by the places that they touch, and then by the cells that they lie in."""
    places: dict[int, list[tuple[str, int, bool]]] = {}
    for (path, axis), ids in axes.items():
        if path in matrices:
            for at in np.flatnonzero(~tainted[label[ids]]):
                places.setdefault(int(keys.key[ids[at]]), []).append((path, axis, bool(keys.odd[ids[at]])))
    cells: dict[int, set[tuple[int, int]]] = {key: set() for key in places}
    relevant = np.zeros(walk.count, bool)
    relevant[list(places)] = True
    for number, cell in enumerate(walk.cells):
        keyed = keys.key[cell]
        if not relevant[keyed].any():
            continue
        for row, some in enumerate(keyed):
            for key in set(some.tolist()) & cells.keys():
                cells[key].add((number, row))
    found: dict[tuple[Any, ...], dict[Any, list[int]]] = {}
    for key, where in places.items():
        signature = tuple(sorted((path, axis, odd != where[0][2]) for path, axis, odd in where))
        found.setdefault(signature, {}).setdefault(frozenset(cells[key]), []).append(key)
    return found


def _spaces(
    walk: Identities,
    axes: Mapping[tuple[str, int], np.ndarray],
    keys: Keys,
    matrices: set[str],
    label: np.ndarray,
    units: Mapping[tuple[Any, ...], Mapping[Any, list[int]]],
    even: np.ndarray,
) -> tuple[tuple[Linear, ...], tuple[tuple[Place, ...], ...], frozenset[int], bool]:
    heads, parity = _Heads(walk, keys, label), _parity(axes, matrices, keys)
    drafts: list[tuple[tuple[Any, ...], list[list[int]], tuple[int, ...] | None]] = []
    stuck: set[int | None] = {None}
    staying = False
    for signature, by_cell in units.items():
        if len(signature) < 2 and not keys.selfdual[next(iter(by_cell.values()))[0]]:
            continue
        blocks = [block for block in by_cell.values() if len(block) > 1]
        named = [heads.of(block) for block in blocks]
        alike = len({len(block) for block in blocks}) == 1 and None not in named and len(set(named)) == len(named)
        if len(blocks) > 1 and alike:
            order = sorted(range(len(blocks)), key=lambda i: named[i] or 0)
            drafts.append((signature, [blocks[i] for i in order], tuple(int(named[i] or 0) for i in order)))
        else:
            drafts.extend((signature, [block], None) for block in blocks)
            stuck |= set(named)  # heads with blocks that cannot follow
            sizes = [len(block) for block in blocks if not heads.stays(block)]
            staying = staying or len(set(sizes)) < len(sizes)
    staying = staying or any(bool(names and stuck & {*names}) for _, _, names in drafts)
    drafts = [(signature, blocks, None if names and stuck & {*names} else names) for signature, blocks, names in drafts]
    sets = list(dict.fromkeys(names for _, _, names in drafts if names))
    spaces = []
    for signature, blocks, names in drafts:
        index = np.full(walk.count, -1)
        flat = [key for block in blocks for key in block]
        index[flat] = np.arange(len(flat))
        shape = len(blocks), len(blocks[0])

        def standing(
            path: str, axis: int, odd: bool, index: np.ndarray = index, shape: tuple[int, int] = shape
        ) -> Place | None:
            ids = axes[path, axis]
            at = np.flatnonzero((index[keys.key[ids]] >= 0) & ((keys.odd[ids] != parity[keys.key[ids]]) == odd))
            order = at[np.argsort(index[keys.key[ids[at]]], kind="stable")]
            return Place(path, axis, order.reshape(*shape, -1), odd) if len(at) else None

        places = [standing(*place) for place in dict.fromkeys(signature)]
        others = [standing(path, axis, odd) for path, axis in axes if path not in matrices for odd in (False, True)]
        swap = any(p and (p.path, p.axis) in walk.consumed and not p.reads for p in places)
        sides = [tuple(p._replace(reads=p.reads != swap) for p in some if p) for some in (places, others)]
        group: Group = "orthogonal" if keys.selfdual[flat[0]] else "linear"
        spaces.append(Linear(sides[0], group, bool(even[flat[0]]), sets.index(names) if names else -1, sides[1]))
    moving = frozenset(one for one in list(heads.parent) if any(heads.root(one) in names for names in sets))
    return tuple(spaces), tuple(heads.places(axes, names) for names in sets), moving, staying


def _parity(axes: Mapping[tuple[str, int], np.ndarray], matrices: set[str], keys: Keys) -> np.ndarray:
    """For each key, whether its first entry changes by the inverse transpose: parities are relative to that."""
    every = np.concatenate([np.zeros(0, int), *(ids for (path, _), ids in axes.items() if path in matrices)])
    found = np.zeros(len(keys.key), bool)
    found[keys.key[every[::-1]]] = keys.odd[every[::-1]]
    return found


class _Heads:
    """Which blocks of units follow which entries of another axis (the heads of attention)."""

    def __init__(self, walk: Identities, keys: Keys, label: np.ndarray) -> None:
        self.label = label
        self.parent = Roots()
        self.root = self.parent.of
        self.name: dict[int, int] = {}
        for small, big in walk.blocks:
            for one, row in zip(label[small].tolist(), keys.key[big], strict=True):
                for key in set(row.tolist()):
                    if key in self.name:
                        self.parent[self.root(self.name[key])] = self.root(one)
                    self.name[key] = self.root(one)
        still = set(label[np.concatenate([np.zeros(0, int), *walk.frozen])].tolist())
        self.still = {self.root(one) for one in still & self.parent.keys()}

    def of(self, block: list[int]) -> int | None:
        """The head of a block; None when it has none, or one that stays where it is."""
        names = {self.root(self.name[key]) if key in self.name else None for key in block}
        name = names.pop() if len(names) == 1 else None
        return None if name in self.still else name

    def stays(self, block: list[int]) -> bool:
        """Whether a block's head stays where it is."""
        return all(key in self.name and self.root(self.name[key]) in self.still for key in block)

    def places(self, axes: Mapping[tuple[str, int], np.ndarray], names: tuple[int, ...]) -> tuple[Place, ...]:
        """Other leaves whose entries follow the heads."""
        found = []
        rank = {label: names.index(self.root(label)) for label in list(self.parent) if self.root(label) in names}
        for (path, axis), ids in axes.items():
            at = [i for i, label in enumerate(self.label[ids].tolist()) if label in rank]
            if at and len(at) % len(names) == 0:
                order = sorted(at, key=lambda i: rank[int(self.label[ids[i]])])
                found.append(Place(path, axis, np.array(order).reshape(len(names), 1, -1), False))
        return tuple(found)
