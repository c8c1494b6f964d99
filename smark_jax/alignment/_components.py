"""The graph of a network from what the pass over its equations found: connected components, grouped into spaces."""

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from smark_jax.alignment import _linear
from smark_jax.alignment._identities import Role
from smark_jax.alignment._walk import Walk
from smark_jax.alignment.graph import FIXED, Graph, Segment


def graph(
    raw: dict[str, tuple[int, ...]],
    shapes: dict[str, tuple[int, ...]],
    axes: dict[tuple[str, int], np.ndarray],
    walk: Walk,
) -> Graph:
    """Connected components of the links, grouped into spaces by the axes that they touch."""
    label = _labels(walk)
    matrices = {path for path, shape in shapes.items() if sum(size > 1 for size in shape) > 1}
    found = _linear.find(walk, axes, matrices, label)
    while _freeze_shared_blocks(walk, axes, label, found):
        found = _linear.find(walk, axes, matrices, label)
    entries = {place: label[ids] for place, ids in axes.items()}
    spaces = _spaces(walk, entries, label, found.labels)
    groups = _groups(walk, spaces, label)
    layout = _layout(entries, spaces)
    # An axis whose units have no regular order is left alone, and so are the spaces that it touches.
    ordered = {component: s for s, units in enumerate(spaces) for component in units}
    out_of_order = [entries[place].tolist() for place, runs in layout.items() if runs is None]
    irregular = {ordered[component] for some in out_of_order for component in some if component in ordered}
    if irregular:
        walk.unfollowed["channels in a changing order"] = None
    if None in groups:
        walk.unfollowed["channels in blocks"] = None
    kept = [s for s in range(len(spaces)) if groups[s] is not None and s not in irregular]
    layout = _layout(entries, [spaces[s] for s in kept])
    whole = {
        (path, axis): layout.get((path, axis)) or (Segment(FIXED, 1, 1, size),)
        for path, shape in shapes.items()
        for axis, size in enumerate(shape)
    }
    return Graph(
        shapes,
        whole,
        tuple(len(spaces[s]) for s in kept),
        frozenset(walk.consumed),
        tuple(groups[s] or 1 for s in kept),
        tuple(walk.unfollowed),
        ("sums over channels that may be mixed",) if found.beyond else (),
        {path: shape for path, shape in raw.items() if shape != shapes[path]},
        found.spaces,
        found.heads,
        found.factors,
        walk.biases,
        frozenset(walk.shifted),
        found.held,
    )


def _labels(walk: Walk) -> np.ndarray:
    """For each identity, its component under all ties."""
    pairs = np.concatenate([np.zeros((2, 0), int), *walk.links, *walk.flips, *walk.ties], axis=1)
    matrix = sparse.coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(walk.count, walk.count))
    return sparse.csgraph.connected_components(matrix, directed=False)[1]


def _spaces(
    walk: Walk, entries: dict[tuple[str, int], np.ndarray], label: np.ndarray, linear: frozenset[int]
) -> list[list[int]]:
    """Components that may change places: they touch the same axes in the same way, and are summed over together."""
    still = _still(walk, label) | linear
    touched: dict[int, dict[tuple[str, int], int]] = {}
    for place, components in entries.items():
        for component in components.tolist():
            if component not in still:
                counts = touched.setdefault(component, {})
                counts[place] = counts.get(place, 0) + 1
    sets: dict[int, set[frozenset[int]]] = {component: set() for component in touched}
    for rows in _rows(walk, label):
        if len(rows) == 1:
            for component in rows[0] & sets.keys():
                sets[component].add(rows[0])
    alike: dict[frozenset, dict[frozenset, list[int]]] = {}
    for component, counts in touched.items():
        if len(counts) > 1 or counts.keys() & walk.consumed:
            some = alike.setdefault(frozenset(counts.items()), {})
            some.setdefault(frozenset(sets[component]), []).append(component)
    if any(len(some) > 1 for some in alike.values()):
        walk.unfollowed["channels in blocks"] = None
    return [units for some in alike.values() for units in some.values() if len(units) > 1]


def _groups(walk: Walk, spaces: list[list[int]], label: np.ndarray) -> list[int | None]:
    """How many units of each space in a row stay together; None where they have no such order."""
    found: list[int | None] = [1] * len(spaces)
    space = {component: s for s, units in enumerate(spaces) for component in units}
    rank = {component: unit for units in spaces for unit, component in enumerate(units)}
    for rows in _rows(walk, label):
        hit = {s for row in rows for s in {space[c] for c in row & space.keys()}}
        cut = []
        for s in hit:
            parts = {frozenset(rank[c] for c in row if space.get(c) == s) for row in rows} - {frozenset()}
            size = len(next(iter(parts)))
            regular = {frozenset(range(k, k + size)) for k in range(0, len(spaces[s]), size)}
            if len(parts) == 1:
                continue
            cut.append(s)
            if parts != regular or found[s] not in (1, size):
                found[s] = None
            elif found[s]:
                found[s] = size
        if len(cut) > 1:
            for s in cut:
                found[s] = None
    return found


def _rows(walk: Walk, label: np.ndarray) -> list[tuple[frozenset[int], ...]]:
    """Sets of components that are reduced to one value each, by reduction; those of one are left out."""
    found: dict[tuple[frozenset[int], ...], None] = {}
    for ids in walk.sets:
        rows = tuple(dict.fromkeys(frozenset(row.tolist()) for row in label[ids]))
        if any(len(row) > 1 for row in rows):
            found[rows] = None
    return list(found)


def _still(walk: Walk, label: np.ndarray) -> set[int]:
    return set(label[np.concatenate([np.zeros(0, int), *walk.frozen])].tolist())


def _layout(
    entries: dict[tuple[str, int], np.ndarray], spaces: list[list[int]]
) -> dict[tuple[str, int], tuple[Segment, ...] | None]:
    rank = {component: (s, u) for s, units in enumerate(spaces) for u, component in enumerate(units)}
    sizes = [len(units) for units in spaces]
    return {
        place: _segments([rank.get(c, (FIXED, 0)) for c in components.tolist()], sizes)
        for place, components in entries.items()
    }


def _freeze_shared_blocks(
    walk: Walk, axes: dict[tuple[str, int], np.ndarray], label: np.ndarray, found: _linear.Found
) -> bool:
    """Fixes blocks whose order is tied to something that stays, or that follow each other in ways unknown to graphs.

    Blocks of linear spaces may change places where the space says so. Blocks of other units may where nothing else
    follows them. Returns whether anything was fixed.
    """
    still = _still(walk, label)
    places: dict[int, set[tuple[str, int]]] = {}
    for place, ids in axes.items():
        for one in set(label[ids].tolist()):
            places.setdefault(one, set()).add(place)
    followers: dict[int, set[int]] = {}
    for small, big in walk.blocks:
        rows = [set(row.tolist()) for row in label[big]]
        if any(row != rows[0] for row in rows):
            for one, row in zip(label[small].tolist(), rows, strict=True):
                followers.setdefault(one, set()).update(row)
    frozen: set[int] = set()
    for small, big in walk.blocks:
        names = set(label[small].tolist())
        every = {unit for one in names for unit in followers.get(one, ())}
        linear, rest = every & found.labels - still, every - found.labels - still
        kinds = {frozenset(places.get(unit, set())) for unit in rest}
        stays = bool(names & still or every & still or (linear and not names <= found.moving))
        if rest and (linear or stays or len(kinds) > 1 or (names & places.keys())):
            walk.give_up("channels in blocks", [Role((0,), big.reshape(-1)), Role((0,), small)])
            frozen |= names | rest
        elif stays and not names <= still:
            if names & places.keys():
                walk.unfollowed["channels in blocks"] = None
            walk.freeze(small)
            frozen |= names
    return bool(frozen)


def _segments(entries: list[tuple[int, int]], sizes: Sequence[int]) -> tuple[Segment, ...] | None:
    """An axis' entries (space, unit) as runs; None when a space's units are not in order."""
    found, at = [], 0
    while at < len(entries):
        space = entries[at][0]
        if space == FIXED:
            end = next((i for i in range(at, len(entries)) if entries[i][0] != FIXED), len(entries))
            found.append(Segment(FIXED, 1, 1, end - at))
            at = end
            continue
        inner = next((i for i in range(at, len(entries)) if entries[i] != entries[at]), len(entries)) - at
        block = [(space, unit) for unit in range(sizes[space]) for _ in range(inner)]
        outer = 0
        while entries[at + outer * len(block) : at + (outer + 1) * len(block)] == block:
            outer += 1
        if outer == 0:
            return None
        found.append(Segment(space, outer, inner, outer * len(block)))
        at += outer * len(block)
    return tuple(found)
