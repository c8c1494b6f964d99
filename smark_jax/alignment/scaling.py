"""Bringing the suspect's leaves into the base's order, scale and sign, once its units are matched."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from smark_jax.alignment import duplicates, gauge, matching
from smark_jax.alignment.graph import Graph
from smark_jax.alignment.matching import Leaves

ALIKE = 0.2
"""Kernels of independent networks, matched as well as possible, have a lower cosine, chance in small ones aside."""
_TELLING = 0.95
"""A kernel that reaches a higher cosine by chance says nothing of a suspect that does not."""
_REFITS = 5
_CLOSE = 0.5
"""A bias or statistic further than this from the base's, relative to its norm, carries no information."""


def read(
    graph: Graph,
    leaves: Leaves,
    merged: duplicates.Merged,
    ours: Leaves,
    sizes: Sequence[int],
    match: matching.Match,
) -> tuple[Leaves, dict[str, Any], bool]:
    """The suspect's leaves in the base's order and scale, their entries in the report, and whether they can tell.

    Leaves that agree by chance as much as a copy's cannot tell a copy from another network.
    """
    done = {space: both for space, both in enumerate(zip(match.units, match.signs, strict=True))}
    kernels = set(matching.kernels(graph))
    aligned: Leaves = {}
    similarities: dict[str, float] = {}
    alike: list[str] = []
    scales: dict[int, list[np.ndarray]] = {space: [] for space in done}
    from_base: list[str] = []
    lowest, highest, telling, positions = 1.0, 1.0, False, tables(graph)
    for path, mine in ours.items():
        leaf, present = merged.leaves[path], np.ones(mine.shape, bool)
        for axis in range(mine.ndim):
            if graph.spaces(path, axis):
                leaf = matching.reorder(graph, leaf, (path, axis), sizes, done)
                for space, entries in graph.entries(path, axis, graph.sizes).items():
                    gone = entries[match.units[space] < 0].reshape(-1)
                    np.moveaxis(present, axis, 0)[gone] = False
        if path in kernels:
            leaf, factors = _unscaled(graph, path, leaf, leaves[path], mine, sizes, merged, match)
            for axis, factor in factors.items():
                for space, entries in graph.entries(path, axis, graph.sizes).items():
                    scales[space].append(1 / factor[entries[:, 0]])
                    some = np.abs(factor[entries[:, 0]][match.units[space] >= 0])
                    lowest, highest = min(lowest, *(1 / some)), max(highest, *(1 / some))
        aligned[path] = np.where(present, leaf, mine).astype(mine.dtype)
        if mine.ndim > 1:
            norms = float(np.linalg.norm(leaf)) * float(np.linalg.norm(mine))
            similarities[path] = min(1.0, float(np.vdot(leaf, mine)) / norms) if norms > 0 else 0.0
            chance = _chance(graph, path, mine, sizes, match)
            if path not in positions:
                alike += [path] * (min(similarities[path], centred(leaf, mine)) > max(ALIKE, chance))
                telling = telling or chance < _TELLING
            from_base += [path] * (similarities[path] < min(ALIKE, chance) and norms > 0)
    movable = gauge.vectors(graph, ours)
    for path, mine in ours.items():
        if mine.ndim == 1 and graph.spaces(path, 0):
            aligned[path], far = _vector(graph, path, aligned[path], mine, scales)
            from_base += [path] if far else []
        elif path in movable:
            aligned[path] = _fitted(aligned[path].astype(np.float64), mine).astype(mine.dtype)
            from_base += [path] if _far(aligned[path], mine) else []
    weights = [graph.weights(path) for path in similarities]
    similarity = float(np.average(list(similarities.values()), weights=weights)) if weights else 1.0
    if alike:
        aligned |= {path: ours[path] for path in from_base}
    return (
        aligned,
        {
            "similarity": similarity,
            "similarities": similarities,
            "alike": tuple(alike),
            "scale_range": (float(lowest), float(highest)),
            "from_base": tuple(from_base),
        },
        telling,
    )


def tables(graph: Graph) -> set[str]:
    """Leaves that only follow the order of heads, such as tables of relative positions.

    Neighbouring positions have like entries, in other networks too, so they say less than as many weights of a kernel.
    """
    return {place.path for places in graph.heads for place in places if not place.reads} - {
        place.path for space in graph.linear for place in space.places
    }


def centred(leaf: np.ndarray, mine: np.ndarray) -> float:
    """The cosine of two kernels without their means, which those of unrelated networks may share."""
    a, b = (array.astype(np.float64) - array.mean(dtype=np.float64) for array in (leaf, mine))
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.vdot(a, b)) / norms if norms > 0 else 0.0


def _chance(graph: Graph, path: str, mine: np.ndarray, sizes: Sequence[int], match: matching.Match) -> float:
    """The cosine that a kernel of random weights may reach by chance, by the signs of its units, and by their choice.

    A direction in D dimensions has a cosine above c with another with a probability of about (1 - c^2)^((D - 1) / 2),
    so the best of k reaches c where that is 1 / k: here k = 2 for a unit in its place, 2 n for one chosen among n. A
    unit of a single weight (D = 1) always fits, by its scale and sign. Of two logits the difference alone counts.
    What bases on both sides of a kernel reach adds up: for random G, the greatest u^T G v over u and v is at most the
    sum of what each reaches (Chevet 1978).
    """
    two_logits = any(name == path and mine.shape[axis] == 2 for name, axis in graph.logits)
    count = graph.weights(path) / (1 + two_logits)
    rest = max(0.0, 1 - 4 * count**-0.5)
    for axis in range(mine.ndim):
        for space in graph.spaces(path, axis):
            units = match.units[space]
            moved = float(((units >= 0) & (units != np.arange(len(units)))).mean())
            choices = 2 * sizes[space] ** moved
            free = count / len(units) - 1
            rest *= 1 - math.sqrt(1 - choices ** (-2 / free)) if free > 0 else 0
    return 1 - rest * max(0.0, 1 - sum(gauge.chances(graph, path)))


def _unscaled(
    graph: Graph,
    path: str,
    leaf: np.ndarray,
    raw: np.ndarray,
    mine: np.ndarray,
    sizes: Sequence[int],
    merged: duplicates.Merged,
    match: matching.Match,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """A kernel in the base's scale with its split units added up, and by axis the factor of each entry."""
    splits = [a for a in range(mine.ndim) if (path, a) in graph.consumed and _split(graph, path, a, merged, match)]
    factors = {a: np.ones(mine.shape[a]) for a in range(mine.ndim) if graph.spaces(path, a)}
    for _ in range(_REFITS if splits else 1):  # scales and sums depend on each other
        for axis, factor in _factors(graph, path, leaf, mine, match).items():
            factors[axis] = factors[axis] * factor
            leaf = leaf * matching.along(factor, axis, leaf.ndim)
        for axis in splits:
            leaf = _refit(graph, leaf, raw, mine, (path, axis), sizes, merged, match, factors)
    return leaf, factors


def _split(
    graph: Graph, path: str, axis: int, merged: duplicates.Merged, match: matching.Match
) -> dict[int, list[int]]:
    """By space, the base's units that match several units of the suspect."""
    found = {
        s: [b for b, u in enumerate(match.units[s]) if int(u) in merged.members[s]] for s in graph.spaces(path, axis)
    }
    return {space: units for space, units in found.items() if units}


def _factors(
    graph: Graph, path: str, leaf: np.ndarray, mine: np.ndarray, match: matching.Match
) -> dict[int, np.ndarray]:
    """By axis, the factor that gives each entry the base's scale and sign."""
    theirs = matching.balance(graph, path, leaf, graph.sizes)
    base = matching.balance(graph, path, mine, graph.sizes)
    product = leaf * mine
    for factors in (theirs, base):
        for axis, factor in factors.items():
            product = product * matching.along(factor, axis, leaf.ndim)
    plain = {axis: np.ones(mine.shape[axis]) for axis in theirs}
    flipped = {axis: sign.copy() for axis, sign in plain.items()}
    for axis, sign in flipped.items():
        for space, entries in graph.entries(path, axis, graph.sizes).items():
            sign[entries] = match.signs[space][:, None]
    signs = max((_signs(graph, path, product, start) for start in (plain, flipped)), key=lambda both: both[1])[0]
    return {axis: theirs[axis] / base[axis] * signs[axis] for axis in theirs}


def _refit(
    graph: Graph,
    leaf: np.ndarray,
    raw: np.ndarray,
    mine: np.ndarray,
    place: tuple[str, int],
    sizes: Sequence[int],
    merged: duplicates.Merged,
    match: matching.Match,
    factors: Mapping[int, np.ndarray],
) -> np.ndarray:
    """The aligned leaf: outgoing weights of split units are added up with the factors that best fit the base's weights.

    The factors depend on the operations between a unit's parts and this kernel, so they are fitted, not computed.
    """
    path, axis = place
    ours, theirs = graph.entries(path, axis, graph.sizes), graph.entries(path, axis, sizes)
    done = dict(enumerate(zip(match.units, match.signs, strict=True)))
    for other, factor in factors.items():
        if other != axis:
            raw = matching.reorder(graph, raw, (path, other), sizes, done)
            raw = raw * matching.along(factor, other, raw.ndim)
    raw, target, leaf = np.moveaxis(raw, axis, 0), np.moveaxis(mine, axis, 0), np.moveaxis(leaf, axis, 0).copy()
    for space, units in _split(graph, path, axis, merged, match).items():
        for unit in units:
            first = int(match.units[space][unit])
            parts = np.stack([raw[theirs[space][u]] for u in (first, *merged.members[space][first])])
            wanted = target[ours[space][unit]]
            weights, *_ = np.linalg.lstsq(parts.reshape(len(parts), -1).T, wanted.reshape(-1), rcond=1e-6)
            leaf[ours[space][unit]] = np.tensordot(weights, parts, 1)
    return np.moveaxis(leaf, 0, axis)


def _signs(
    graph: Graph, path: str, product: np.ndarray, start: dict[int, np.ndarray]
) -> tuple[dict[int, np.ndarray], float]:
    """Signs of channels under which suspect and base agree best, found axis by axis, and how well they agree."""
    signs = dict(start)
    total = 0.0
    for axis in (*signs, *signs):
        weighted = product
        for other in set(signs) - {axis}:
            weighted = weighted * matching.along(signs[other], other, product.ndim)
        sums = weighted.sum(axis=tuple(a for a in range(product.ndim) if a != axis))
        sign = np.ones_like(signs[axis])
        for entries in graph.entries(path, axis, graph.sizes).values():
            sign[entries] = np.where(sums[entries].sum(axis=1) < 0, -1, 1)[:, None]
        signs[axis] = sign
        total = float((sign * sums).sum())
    return signs, total


def _vector(
    graph: Graph, path: str, leaf: np.ndarray, mine: np.ndarray, scales: Mapping[int, list[np.ndarray]]
) -> tuple[np.ndarray, bool]:
    """A bias, gain or statistic in the base's scale: divided by the best-fitting power of a kernel's scales.

    A bias scales like its kernel, a variance like the square; a gain may not scale at all.
    """
    leaf = leaf.astype(np.float64)  # a sum of squares may be beyond float32
    fits = [leaf]
    entries = graph.entries(path, 0, graph.sizes)
    if len(entries) == 1:
        ((space, where),) = entries.items()
        for scale in scales[space]:
            for power in (1, 2, -1):
                factor = np.ones(mine.shape)
                factor[where] = (scale**power)[:, None]
                fit = leaf / factor
                fits.append(_fitted(fit, mine))
    best = min(fits, key=lambda fit: float(np.linalg.norm(fit - mine)))
    return best.astype(mine.dtype), _far(best, mine)


def _fitted(leaf: np.ndarray, mine: np.ndarray) -> np.ndarray:
    """The leaf times the factor that fits best: a kernel's incoming and outgoing scales have a common factor free."""
    size = float(np.vdot(leaf, leaf))
    return leaf * (float(np.vdot(leaf, mine)) / size) if size > 0 else leaf


def _far(leaf: np.ndarray, mine: np.ndarray) -> bool:
    """Whether a bias, gain or statistic says nothing of the base's."""
    norm = float(np.linalg.norm(mine))
    return norm > 0 and float(np.linalg.norm(leaf - mine)) > _CLOSE * norm
