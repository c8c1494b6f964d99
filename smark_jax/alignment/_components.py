"""The graph of a network from what the pass over its equations found: connected components, grouped into spaces."""

import itertools
from collections.abc import Container, Mapping, Sequence

import numpy as np
from scipy import sparse

from smark_jax.alignment import _linear
from smark_jax.alignment._identities import PROVEN, Role, Roots
from smark_jax.alignment._walk import Walk
from smark_jax.alignment.graph import FIXED, Graph, Partition, Segment, View


def graph(
    views: Mapping[str, View],
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
    touched = {one for some in entries.values() for one in some.tolist()}
    partitions = _partitions(walk, spaces, label, touched)
    if None in partitions:
        walk.unfollowed["channels in blocks"] = None
    _note_what_stays(walk, axes, label)
    kept = [s for s in range(len(spaces)) if partitions[s] is not None]
    layout = _layout(entries, [spaces[s] for s in kept])
    reduced = set(label[np.concatenate([np.zeros(0, int), *walk.reduced_over])].tolist())
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
        tuple(partitions[s] or () for s in kept),
        tuple(walk.unfollowed),
        tuple(why for why in (*found.beyond, *walk.beyond) if why not in walk.unfollowed),
        views,
        found.spaces,
        found.heads,
        found.factors,
        walk.biases,
        frozenset(walk.shifted),
        found.held,
        frozenset(at for at, s in enumerate(kept) if reduced & set(spaces[s])),
        _logits(walk, axes),
        found.levels,
    )


def _logits(walk: Walk, axes: dict[tuple[str, int], np.ndarray]) -> frozenset[tuple[str, int]]:
    """Paths and axes of what is added up to logits, where nothing but sums comes behind it."""
    same = _joined(walk.count, walk.links)
    ids = same[walk.logits]
    touched = same[np.concatenate([np.zeros(0, int), *walk.singles])]
    if len(ids) < 2 or len(np.unique(ids)) < len(ids) or np.isin(ids, touched).any():
        return frozenset()
    return frozenset(place for place, own in axes.items() if np.array_equal(same[own], ids)) - walk.consumed


def _note_what_stays(walk: Walk, axes: dict[tuple[str, int], np.ndarray], label: np.ndarray) -> None:
    """Notes why entries of leaves are fixed that no image, logit or window holds in place."""
    code = walk.reasons()
    proven = np.isin(label, label[code == walk.why.index(PROVEN)])
    held = np.zeros(walk.count, bool)
    held[label[np.concatenate([np.zeros(0, int), *axes.values()])]] = True
    free = held[label] & ~proven
    for small, big in walk.blocks:  # who stands for blocks of entries that are free
        held[label[small]] |= free[big].any(axis=1)
    free = held[label] & ~proven
    for reason in np.unique(code[free & (code > 0)]):
        walk.beyond[walk.why[int(reason)]] = None
    for one, other in walk.apart:
        if any((free & (code == 0))[ids].any() for ids in (one, other)) and free[one].any() and free[other].any():
            walk.beyond["channels along two axes"] = None


def _labels(walk: Walk) -> np.ndarray:
    """For each identity, its component under all ties."""
    return _joined(walk.count, [*walk.links, *walk.flips, *walk.ties])


def _joined(count: int, ties: Sequence[np.ndarray]) -> np.ndarray:
    """For each of ``count`` identities, its component under ties."""
    pairs = np.concatenate([np.zeros((2, 0), int), *ties], axis=1)
    matrix = sparse.coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(count, count))
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
    reduced = set(label[np.concatenate([np.zeros(0, int), *(ids.reshape(-1) for ids in walk.sets)])].tolist())
    padded = set(label[np.concatenate([np.zeros(0, int), *walk.padded])].tolist())
    sets: dict[int, set[frozenset[int]]] = {component: set() for component in touched}
    for rows in _rows(walk, label):
        if len(rows) == 1:
            for component in rows[0] & sets.keys():
                sets[component].add(rows[0])
    alike: dict[frozenset, dict[frozenset, list[int]]] = {}
    for component, counts in touched.items():
        made = component not in padded or counts.keys() - walk.consumed
        if made and (len(counts) > 1 or counts.keys() & walk.consumed or component in reduced):
            some = alike.setdefault(frozenset(counts.items()), {})
            some.setdefault(frozenset(sets[component]), []).append(component)
    if any(len(some) > 1 for some in alike.values()):
        walk.unfollowed["channels in blocks"] = None
    return [units for some in alike.values() for units in some.values() if len(units) > 1]


def _partitions(
    walk: Walk, spaces: list[list[int]], label: np.ndarray, places: Container[int]
) -> list[tuple[Partition, ...] | None]:
    """How blocks divide each space, those of one name in one family; None where blocks overlap.

    Groups whose order is tied to something that stays have the family :data:`FIXED`.
    """
    unit = {one: (s, u) for s, units in enumerate(spaces) for u, one in enumerate(units)}
    family, still, fixed, doubtful = Roots(), _still(walk, label), set[int](), set[int]()
    blocks: list[tuple[int, set[int]]] = []
    for small, big in walk.blocks:
        names, rows = label[small].tolist(), [set(row.tolist()) for row in label[big]]
        if all(row == rows[0] for row in rows):
            doubtful.update(names)  # what is the same for all says nothing of their order, and may tie it
            continue
        named = {name for name in names if name in places and name not in unit}
        if named and any(row & unit.keys() for row in rows):
            walk.unfollowed["channels in blocks"] = None
        for name, row in zip(names, rows, strict=True):
            family[family.of(name)] = family.of(names[0])
            blocks.append((name, row))
            if name in still or row & still or name in named:
                fixed.add(name)
    divisions: dict[tuple[int, int], np.ndarray] = {}
    overlap: set[int] = set()
    for name, row in [*blocks, *((name, {name}) for name, _ in blocks)]:
        for s, u in (unit[one] for one in row & unit.keys()):
            groups = divisions.setdefault((s, family.of(name)), np.full(len(spaces[s]), -1))
            if groups[u] not in (-1, name):
                overlap.add(s)
                doubtful.add(name)
            groups[u] = name
    every = [
        [groups for (t, _), groups in divisions.items() if t == s and s not in overlap] for s in range(len(spaces))
    ]
    every, torn = _tied(every, family)
    fixed = {family.of(name) for name in fixed | doubtful | torn}
    found: list[tuple[Partition, ...] | None] = []
    for s, some in enumerate(every):
        roots = [family.of(int(groups.max())) for groups in some]
        divided = (Partition(FIXED if root in fixed else root, p) for root, p in zip(roots, some, strict=True))
        found.append(None if s in overlap else tuple(divided))
    unproven = {family.of(name) for name in (*doubtful, *torn)}
    if any(family.of(int(groups.max())) in unproven for some in every for groups in some):
        walk.unfollowed["channels in blocks"] = None
    return found


def _tied(partitions: list[list[np.ndarray]], family: Roots) -> tuple[list[list[np.ndarray]], set[int]]:
    """Partitions by space, of which those that divide a space alike have the same names: their groups move together.

    Where that would make one group of two, as where the first half of the groups is added to the other half, they keep
    their names, which are also returned: they must not move.
    """
    alias, torn = Roots(), set[int]()
    while True:
        partitions = [
            [np.array([alias.of(n) if n >= 0 else n for n in p.tolist()]) for p in some] for some in partitions
        ]
        partitions = [list({p.tobytes(): p for p in some}.values()) for some in partitions]
        twins = [(p, q) for some in partitions for p, q in itertools.combinations(some, 2) if _alike(p, q)]
        twins = [twin for twin in twins if not torn >= {*twin[0].tolist(), *twin[1].tolist()} - {-1}]
        if not twins:
            return partitions, torn
        pairs = [(a, b) for a, b in zip(*(side.tolist() for side in twins[0]), strict=True) if a >= 0]
        trial = Roots(alias)
        for one, other in pairs:
            trial[trial.of(other)] = trial.of(one)
        every = [p[p >= 0] for some in partitions for p in some]
        if all(len({trial.of(n) for n in p.tolist()}) == len(np.unique(p)) for p in every):
            alias = trial
            for one, other in pairs:
                family[family.of(other)] = family.of(one)
        else:
            torn.update(*pairs)


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two partitions have the same groups by other names."""
    pairs = np.unique(np.stack([one, other]), axis=1)
    return bool(((one < 0) == (other < 0)).all()) and all(len(np.unique(row)) == pairs.shape[1] for row in pairs)


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


def _proven(walk: Walk, label: np.ndarray) -> set[int]:
    return set(label[walk.reasons() == walk.why.index(PROVEN)].tolist())


def _layout(
    entries: dict[tuple[str, int], np.ndarray], spaces: list[list[int]]
) -> dict[tuple[str, int], tuple[Segment, ...]]:
    rank = {component: (s, u) for s, units in enumerate(spaces) for u, component in enumerate(units)}
    sizes = [len(units) for units in spaces]
    return {
        place: _segments([rank.get(c, (FIXED, 0)) for c in components.tolist()], sizes)
        for place, components in entries.items()
    }


def _freeze_shared_blocks(
    walk: Walk, axes: dict[tuple[str, int], np.ndarray], label: np.ndarray, found: _linear.Found
) -> bool:
    """Fixes blocks of linear spaces whose order is tied to something that stays, or to blocks of other units.

    Returns whether anything was fixed.
    """
    still = _still(walk, label)
    places = {one for ids in axes.values() for one in set(label[ids].tolist())}
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
        if not linear:
            continue
        if rest:
            walk.unfollowed["mixing of channels in blocks"] = None
            walk.single(Role((0,), big.reshape(-1)))
            frozen |= linear
        elif (names & still or every & still or not names <= found.moving) and not names <= still:
            if names & places:
                walk.unfollowed["channels in blocks"] = None
            walk.freeze(small, PROVEN if names & _proven(walk, label) else "channels in blocks")
            frozen |= names
    return bool(frozen)


def _segments(entries: list[tuple[int, int]], sizes: Sequence[int]) -> tuple[Segment, ...]:
    """An axis' entries (space, unit) as runs: whole spaces in order, or else the units one by one."""
    found, at = [], 0
    while at < len(entries):
        space = entries[at][0]
        end = next((i for i in range(at, len(entries)) if entries[i][0] != space), len(entries))
        if space == FIXED:
            found.append(Segment(FIXED, 1, 1, end - at))
            at = end
            continue
        inner = next((i for i in range(at, end) if entries[i] != entries[at]), end) - at
        block = [(space, unit) for unit in range(sizes[space]) for _ in range(inner)]
        outer = 0
        while entries[at + outer * len(block) : at + (outer + 1) * len(block)] == block:
            outer += 1
        if outer:
            found.append(Segment(space, outer, inner, outer * len(block)))
            at += outer * len(block)
        else:
            found.append(Segment(space, 1, 1, end - at, tuple(unit for _, unit in entries[at:end])))
            at = end
    return tuple(found)
