"""Random members of the group of rewrites that a graph allows: to check a graph by, and to attack with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smark_jax.alignment import gauge
from smark_jax.alignment._identities import Compute, gain_name
from smark_jax.alignment.graph import FIXED, Graph, Partition
from smark_jax.alignment.matching import Leaves, along
from smark_jax.alignment.spaces import Factor, Linear, Place

_CONDITION = 10.0
_TRIES = 20


def permuted(graph: Graph, leaves: Leaves, rng: np.random.Generator) -> Leaves:
    """The leaves with the units of every space in another order; groups change places, and units within them."""
    leaves = dict(leaves)
    sizes = graph.widths(leaves)
    for space, order in enumerate(_orders(graph, sizes, rng)):
        for path, axis in graph.places(space):
            entries = graph.entries(path, axis, sizes)[space]
            leaf = np.moveaxis(leaves[path].copy(), axis, 0)
            leaf[entries] = leaf[entries[order]]
            leaves[path] = np.moveaxis(leaf, 0, axis)
    return leaves


def _orders(graph: Graph, sizes: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """A random order of each space's units that keeps groups together.

    Groups of each family change places as far as every space has as many units in the groups that take each other's
    places: where a shuffle stands between two convolutions in groups, in the groups of both.
    """
    families: dict[int, set[int]] = {}
    for partition in (p for some in graph.partitions for p in some):
        families.setdefault(partition.family, set()).update(partition.groups.tolist())
    moves: dict[int, dict[int, int]] = {}
    cells = [_cells(partitions, size) for partitions, size in zip(graph.partitions, sizes, strict=True)]
    for family in rng.permutation(sorted(families.keys() - {FIXED})).tolist():
        groups = sorted(families[family] - {-1})
        for _ in range(_TRIES):
            trial = {**moves, family: dict(zip(groups, rng.permutation(groups).tolist(), strict=True))}
            if all(_fits(cell, partitions, trial) for cell, partitions in zip(cells, graph.partitions, strict=True)):
                moves = trial
                break
    found = []
    for cell, partitions, size in zip(cells, graph.partitions, sizes, strict=True):
        order = np.arange(size)
        for key, units in cell.items():
            order[units] = rng.permutation(cell[_moved(key, partitions, moves)])
        found.append(order)
    return found


def _cells(partitions: Sequence[Partition], size: int) -> dict[tuple[int, ...], list[int]]:
    """A space's units, by their groups in each partition."""
    found: dict[tuple[int, ...], list[int]] = {}
    for unit in range(size):
        found.setdefault(tuple(int(p.groups[unit]) for p in partitions), []).append(unit)
    return found


def _moved(key: tuple[int, ...], partitions: Sequence[Partition], moves: Mapping[int, Mapping[int, int]]) -> Any:
    """The groups whose units come to stand in the groups ``key``."""
    return tuple(moves.get(p.family, {}).get(group, group) for p, group in zip(partitions, key, strict=True))


def _fits(
    cells: Mapping[tuple[int, ...], list[int]], partitions: Sequence[Partition], moves: Mapping[int, Mapping[int, int]]
) -> bool:
    return all(len(cells.get(_moved(key, partitions, moves), ())) == len(units) for key, units in cells.items())


def folded(graph: Graph, leaves: Leaves) -> Leaves:
    """The leaves with gains folded into kernels, where a leaf makes them ones and whatever they touch can follow."""
    leaves, ones = dict(leaves), {}
    gains = {(f.reads, -f.gain if f.reads else f.gain) for some in graph.factors.values() for f in some}
    for number in (abs(number) for _, number in sorted(gains)):
        users = [(path, f) for path, some in graph.factors.items() for f in some if f.gain == number]
        compute = users[0][1].vector
        vector = np.asarray(compute({**leaves, **ones}), np.float64).reshape(-1)
        gain = _gain_leaf(graph, compute, {**leaves, **ones}, vector)
        found = _folded(graph, leaves, vector, number, users) if gain else None
        if gain and found:
            leaves = found
            if gain not in ones:  # several products may share it, as those of a batch norm do with its running mean
                ones[gain] = leaves[gain]
                leaves[gain] = (leaves[gain] / vector.reshape(leaves[gain].shape)).astype(np.float32)
    return leaves


def _gain_leaf(graph: Graph, compute: Compute, leaves: Leaves, vector: np.ndarray) -> str | None:
    """The leaf that gains are proportional to, entry by entry, and that no gain needs that does not fold."""
    if not vector.all():
        return None
    for path in sorted(compute.paths - graph.held):
        if leaves[path].size == vector.size:
            twice = np.asarray(compute({**leaves, path: 2 * leaves[path]}), np.float64).reshape(-1)
            if np.allclose(twice, 2 * vector, rtol=1e-5):
                return path
    return None


def _folded(
    graph: Graph, leaves: Leaves, vector: np.ndarray, number: int, users: list[tuple[str, Factor]]
) -> Leaves | None:
    """The leaves with one gain folded into what makes or reads its product; None where something could not follow."""
    found, name, reads = dict(leaves), gain_name(number), users[0][1].reads
    shift = graph.biases.get(name) if reads else None
    biases = [graph.biases[path] for path, _ in users if path in graph.biases]
    shared = any(list(graph.biases.values()).count(bias) > 1 for bias in biases)
    moved = leaves[shift].reshape(-1).astype(np.float64) if shift else np.zeros(vector.size)
    if reads and name in graph.shifted:
        return None
    if moved.any() and (shared or len(biases) < len(users) or any(path in graph.shifted for path, _ in users)):
        return None
    for path, factor in users:
        whole, added = np.ones(found[path].shape[factor.axis]), np.zeros(found[path].shape[factor.axis])
        whole[factor.entries] = vector[factor.positions]
        if moved.any():
            bias = graph.biases[path]
            added[factor.entries] = moved[factor.positions]
            sums = np.tensordot(added, np.moveaxis(found[path].astype(np.float64), factor.axis, 0), 1)
            if sums.size != found[bias].size:  # a window: at the border of images, the sums are others
                return None
            found[bias] = (found[bias] + sums.reshape(found[bias].shape)).astype(np.float32)
        found[path] = (found[path] * along(whole, factor.axis, found[path].ndim)).astype(np.float32)
    if shift:
        found[shift] = np.zeros_like(found[shift])
    return found


def mixed(graph: Graph, leaves: Leaves, rng: np.random.Generator) -> Leaves:
    """The leaves with every linear space times a random matrix of its group, and its blocks in another order.

    Spaces whose gains are not folded stay as they are, but for their blocks.
    """
    blocks = {space.heads: space.blocks for space in graph.linear}
    orders = [rng.permutation(blocks[number]) for number in range(len(graph.heads))]
    fits = {}
    for number, space in enumerate(graph.linear):
        order = orders[space.heads] if space.heads >= 0 else np.arange(space.blocks)
        free = all(_free(graph, place, leaves) for place in space.places)
        matrices = [_drawn(space, rng) if free else np.eye(space.width) for _ in range(space.blocks)]
        fits[number] = gauge.fit(order, np.stack(matrices), space.group)
    return {
        path: gauge.carried(graph, path, leaf.astype(np.float64), fits).astype(leaf.dtype)
        for path, leaf in leaves.items()
    }


def with_means(graph: Graph, leaves: Leaves, rng: np.random.Generator, size: float) -> Leaves:
    """The leaves with components along the vector of ones in kernels that write into spaces whose mean is removed.

    ``size`` is their standard deviation, relative to the RMS of a kernel's weights.
    """
    leaves = dict(leaves)
    for space in graph.linear:
        for place in space.places if space.ones else ():
            if (place.path, place.axis) not in graph.consumed:
                leaf = np.moveaxis(leaves[place.path].copy(), place.axis, 0)
                rms = float(np.sqrt(np.square(leaf).mean()))
                shape = (place.entries.shape[0], 1, place.entries.shape[2], *leaf.shape[1:])
                leaf[place.entries] += (size * rms * rng.normal(size=shape)).astype(np.float32)
                leaves[place.path] = np.moveaxis(leaf, 0, place.axis)
    return leaves


def _free(graph: Graph, place: Place, leaves: Leaves) -> bool:
    """Whether no gain of a place's axis is left to fold."""
    here = [factor for factor in graph.factors.get(place.path, ()) if factor.axis == place.axis]
    return all(bool(np.allclose(np.asarray(factor.vector(leaves)), 1, atol=1e-5)) for factor in here)


def _drawn(space: Linear, rng: np.random.Generator) -> np.ndarray:
    """A random matrix of a space's group."""
    left, right = (_orthogonal(rng, space.width, space.ones) for _ in range(2))
    if space.group == "orthogonal":
        return left
    return left * np.exp(rng.uniform(0, np.log(_CONDITION), space.width)) @ right / np.sqrt(_CONDITION)


def _orthogonal(rng: np.random.Generator, size: int, ones: bool) -> np.ndarray:
    """A uniformly drawn orthogonal matrix, which keeps the vector of ones if asked to."""
    kept = np.ones((size, 1)) if ones else np.zeros((size, 0))
    basis = np.linalg.qr(np.concatenate([kept, rng.normal(size=(size, size - kept.shape[1]))], axis=1))[0]
    if not ones:
        return basis * np.where(rng.random(size) < 0.5, -1, 1)
    other = np.linalg.qr(rng.normal(size=(size - 1, size - 1)))[0]
    inner = basis[:, 1:]
    return np.full((size, size), 1 / size) + inner @ other @ inner.T
