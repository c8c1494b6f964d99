"""From a suspect to the base's own order of channels, scales and names."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from scipy import optimize

from smark_jax import _trees, _validate, errors
from smark_jax._types import ApplyFn, PyTree
from smark_jax.alignment import graph as graphs
from smark_jax.alignment import matching
from smark_jax.alignment.graph import Graph
from smark_jax.alignment.matching import Leaves

Refusal = TypeVar("Refusal", errors.NothingMatched, errors.Undecided)
_ALIKE = 0.2
"""Cosine between a leaf and the base's below which it tells nothing about copies of the base; chance is near 0."""
_REFITS = 5
_HUGE = 1e15
_CLOSE = 0.5
"""Distance of a bias or a statistic from the base's, relative to its norm, above which it tells nothing."""


class SpaceReport(NamedTuple):
    """What happened to one set of interchangeable channels.

    Attributes:
      places: path and axis of its entries, as ``"path[axis]"``.
      units: of the base.
      suspect_units: of the suspect.
      matched: how many of the base's were found.
      moved: how many of these stood elsewhere.
    """

    places: tuple[str, ...]
    units: int
    suspect_units: int
    matched: int
    moved: int


class Report(NamedTuple):
    """What alignment found.

    Attributes:
      spaces: each set of interchangeable channels.
      similarity: cosine between the aligned suspect's kernels and the base's, weighted by size; 1 for the base itself.
      similarities: that of each kernel.
      scale_range: smallest and largest factor that was taken out of a channel's weights.
      from_base: leaves that told nothing and were taken from the base: they read as unchanged.
      renamed: the suspect's name of each leaf that has another one.
      unfollowed: operations that the pass over the network could not follow; channels they touch were left alone.
      left_out: leaves that the suspect lacks, or has in a shape that no width explains; the base's stand there.
    """

    spaces: tuple[SpaceReport, ...]
    similarity: float
    similarities: Mapping[str, float]
    scale_range: tuple[float, float]
    from_base: tuple[str, ...]
    renamed: Mapping[str, str]
    unfollowed: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        units, theirs = sum(s.units for s in self.spaces), sum(s.suspect_units for s in self.spaces)
        matched, moved = sum(s.matched for s in self.spaces), sum(s.moved for s in self.spaces)
        lines = [
            f"{matched} of {units} channels matched, {moved} of them moved, {theirs - matched} others left out; "
            f"similarity {self.similarity:.3f}; scales {self.scale_range[0]:.3g} to {self.scale_range[1]:.3g}"
        ]
        lines += [f"renamed: {theirs} is {ours}" for ours, theirs in self.renamed.items()]
        lines += [f"taken from the base: {', '.join(self.from_base)}"] if self.from_base else []
        lines += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        lines += [f"not followed: {', '.join(self.unfollowed)}"] if self.unfollowed else []
        return "\n".join(lines)


class Alignment(NamedTuple):
    """An aligned suspect.

    Attributes:
      params: the suspect's weights in the base's structure, order and scale.
      report: what was found.
    """

    params: PyTree
    report: Report


def align(suspect: PyTree, base: PyTree, apply_fn: ApplyFn, example_images: Any) -> Alignment:
    """Brings a suspect's neurons back to where the base has them.

    Undone are: permutations of channels, any scaling and sign of a channel's incoming or outgoing weights (so also
    rescaled neurons and folded normalisations), split and duplicated neurons, dummy neurons, renamed leaves. A suspect
    may be wider than the base. Leaves that it lacks or has in a form of its own (a new head) are left out, and weights
    that are NaN or infinite stay so where they belong.

    Args:
      suspect: pytree of arrays.
      base: the model that copies were made from; whatever ``apply_fn`` takes first (with batch norm: the whole
        variables dict).
      apply_fn: the base's network, ``apply_fn(base, images) -> logits``, pure. It is never run, only traced.
      example_images: images as it takes them; only shape and dtype matter.

    Returns:
      The suspect in the base's structure, and a report. Channels of the base that the suspect lacks, and leaves that
      have nothing in common with the base's, are taken from the base: they read as unchanged.

    Raises:
      NothingMatched: when no order, scale and sign of channels makes the suspect's weights resemble the base's.
      Undecided: when they do not, but the network has operations that are not followed, or symmetries that are not
        undone (attention, normalisation over channels); or when no leaf fits by which to recognise channels.
      SmarkError: when the network does not take the base, or the base holds NaN or infinite weights.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from smark_jax import alignment, models
      >>> net, images = models.CNN(), jnp.zeros((1, 28, 28, 1))
      >>> base = models.init(net, jax.random.key(0), (28, 28, 1))
      >>> suspect = {**base, "Dense_1": {**base["Dense_1"], "kernel": base["Dense_1"]["kernel"][::-1]}}
      >>> suspect["Dense_0"] = jax.tree.map(lambda leaf: leaf[..., ::-1], base["Dense_0"])
      >>> alignment.align(suspect, base, models.apply_fn(net), images).report.spaces[2].moved
      128
    """
    everything = _named(base)
    for name, leaf in everything.items():
        _validate.all_finite("align", f"weights in the base's leaf {name!r}", np.isfinite(leaf).all())
    theirs = _named(suspect)
    whole = graphs.trace(apply_fn, base, example_images)
    names = {
        path: name for path, name in _pair(whole, theirs, everything).items() if _could_be(whole, path, theirs[name])
    }
    names, sizes = _fitting(whole, names, theirs)
    left_out = everything.keys() - names.keys()
    graph, ours = whole.without(left_out), {path: leaf for path, leaf in everything.items() if path in names}
    raw = {path: theirs[name] for path, name in names.items()}
    leaves = {path: _tamed(leaf) for path, leaf in raw.items()}
    merged = matching.merge_duplicates(graph, leaves, sizes)
    match = matching.match(graph, merged.leaves, ours, sizes, merged.alive)
    aligned, found = _read(graph, leaves, merged, ours, sizes, match)
    aligned = {path: everything[path] for path in left_out} | _broken_again(graph, raw, aligned, sizes, match)
    spaces = tuple(
        SpaceReport(
            tuple(f"{path}[{axis}]" for path, axis in graph.places(space)),
            graph.sizes[space],
            sizes[space],
            int((units >= 0).sum()),
            int(((units >= 0) & (units != np.arange(len(units)))).sum()),
        )
        for space, units in enumerate(match.units)
    )
    renamed = {path: name for path, name in names.items() if path != name}
    report = Report(
        spaces=spaces, renamed=renamed, unfollowed=graph.unfollowed, left_out=tuple(sorted(left_out)), **found
    )
    result = Alignment(_trees.rebuilt(base, aligned), report)
    if report.similarity < _ALIKE:
        expected, got = f"a similarity with the base of {_ALIKE} or more", f"{report.similarity:.3f} at best"
        if graph.unfollowed or graph.beyond:
            why = ", ".join((*graph.unfollowed, *graph.beyond))
            raise _undecided(
                expected, got, f"It may be a copy all the same: alignment does not see through {why}.", result
            )
        if 2 * sum(everything[path].size for path in left_out) > sum(leaf.size for leaf in everything.values()):
            raise _undecided(expected, got, "It lacks most of the base's weights, or has them in other shapes.", result)
        cause = "No order, scale and sign of channels makes its weights resemble the base's, as those of copies do."
        raise _refused(errors.NothingMatched, expected, got, cause, result)
    return result


def _fitting(graph: Graph, names: dict[str, str], theirs: Leaves) -> tuple[dict[str, str], tuple[int, ...]]:
    """The leaves whose shapes fit each other, by path, and the widths of the suspect's spaces."""
    names = dict(names)
    while True:
        rest = graph.without(graph.shapes.keys() - names.keys())
        if not names or (graph.sizes and not matching.kernels(rest)):
            expected = "leaves of the base's form to recognise channels by"
            cause = "The suspect is of another architecture, or its kernels are transposed."
            raise _undecided(expected, f"none among {len(theirs):,} leaves", cause)
        try:
            return names, rest.widths({path: theirs[name] for path, name in names.items()})
        except graphs.Misfit as misfit:
            del names[misfit.path]


def _undecided(expected: str, got: str, cause: str, attempt: Alignment | None = None) -> errors.Undecided:
    return _refused(errors.Undecided, expected, got, cause, attempt)


def _refused(kind: type[Refusal], expected: str, got: str, cause: str, attempt: Alignment | None) -> Refusal:
    refusal = _validate.fail("align", expected, got, cause, kind=kind)
    refusal.attempt = attempt
    return refusal


def _tamed(leaf: np.ndarray) -> np.ndarray:
    """A leaf in which nothing overflows: weights that are NaN or infinite are zero."""
    if leaf.dtype != np.float32:
        return leaf
    return np.clip(np.where(np.isfinite(leaf), leaf, 0), -_HUGE, _HUGE)


def _broken_again(graph: Graph, raw: Leaves, aligned: Leaves, sizes: Sequence[int], match: matching.Match) -> Leaves:
    """The aligned leaves, NaN where the suspect's weight that belongs there is NaN or infinite."""
    done = dict(enumerate(zip(match.units, match.signs, strict=True)))
    for path, leaf in raw.items():
        broken = ~np.isfinite(leaf) if leaf.dtype == np.float32 else np.zeros(leaf.shape, bool)
        if broken.any():
            moved = broken.astype(np.float32)
            for axis in range(leaf.ndim):
                if graph.spaces(path, axis):
                    moved = matching.reorder(graph, moved, (path, axis), sizes, done)
            aligned[path] = np.where(moved > 0, np.nan, aligned[path]).astype(aligned[path].dtype)
    return aligned


def _named(tree: PyTree) -> Leaves:
    """Leaves of real numbers by path, on the host; floats as float32."""
    found: Leaves = {}
    for name, leaf in _trees.named("alignment", tree).items():
        array = np.asarray(leaf)
        if not jax.numpy.issubdtype(array.dtype, np.number) or np.iscomplexobj(array):
            continue
        with np.errstate(over="ignore"):
            floats = jax.numpy.issubdtype(array.dtype, np.floating)
            found[name] = array.astype(np.float32) if floats else array
    if not found:
        raise _undecided("leaves of real numbers", "none", "Is the file empty?")
    return found


def _pair(graph: Graph, theirs: Leaves, ours: Leaves) -> dict[str, str]:
    """The suspect's name of each of the base's leaves; by their form, where most have other names."""
    missing = [name for name in ours if name not in theirs]
    if len(missing) < len(ours) / 2:
        return {name: name for name in ours if name in theirs}
    if len(theirs) < len(ours):
        cause = "Is it a copy of this model, saved whole?"
        raise _undecided(f"a leaf {missing[0]!r} in the suspect", f"{sorted(theirs)[:6]}", cause)
    cost = np.full((len(ours), len(theirs)), np.inf)
    profiles = {name: _profile(leaf) for name, leaf in theirs.items()}
    for i, (path, leaf) in enumerate(ours.items()):
        mine = _profile(leaf)
        for j, (name, other) in enumerate(theirs.items()):
            if _could_be(graph, path, other):
                k = min(len(mine), len(profiles[name]))
                cost[i, j] = float(np.linalg.norm(mine[:k] - profiles[name][:k])) + 1e-6 * abs(i - j)
    blocked = np.isinf(cost).all(axis=1)
    if blocked.any():
        path = list(ours)[int(np.flatnonzero(blocked)[0])]
        shapes = sorted({leaf.shape for leaf in theirs.values()})
        cause = "The suspect is of another architecture, or its kernels are transposed."
        raise _undecided(f"a leaf like {path!r}, shape {ours[path].shape}", f"shapes {shapes[:8]}", cause)
    rows, columns = optimize.linear_sum_assignment(np.where(np.isinf(cost), 1e6, cost))
    if np.isinf(cost[rows, columns]).any():
        path = list(ours)[int(rows[np.isinf(cost[rows, columns])][0])]
        raise _undecided(f"a leaf of its own for {path!r}", "none that fits", "The suspect is of another architecture.")
    return {list(ours)[i]: list(theirs)[j] for i, j in zip(rows, columns, strict=True)}


def _could_be(graph: Graph, path: str, leaf: np.ndarray) -> bool:
    """Whether a leaf has the axes of the base's leaf at ``path``, its spaces' widths aside."""
    shape = graph.shapes[path]
    return len(shape) == leaf.ndim and all(
        bool(graph.spaces(path, axis)) or shape[axis] == leaf.shape[axis] for axis in range(leaf.ndim)
    )


def _profile(leaf: np.ndarray) -> np.ndarray:
    """What neither order, nor sign, nor scale of channels changes: singular values, balanced; or sorted values."""
    if leaf.ndim < 2:
        values = np.sort(np.abs(leaf.reshape(-1)))[::-1]
    else:
        matrix = leaf.reshape(-1, leaf.shape[-1]).astype(np.float32)
        for _ in range(10):
            for axis in (0, 1):
                level = np.sqrt(np.square(matrix).mean(axis=axis, keepdims=True))
                matrix = matrix / np.where(level > 0, level, 1)
        values = np.linalg.svd(matrix, compute_uv=False)
    norm = np.linalg.norm(values)
    return values / norm if norm > 0 else values


def _read(
    graph: Graph,
    leaves: Leaves,
    merged: matching.Merged,
    ours: Leaves,
    sizes: Sequence[int],
    match: matching.Match,
) -> tuple[Leaves, dict[str, Any]]:
    """The suspect's leaves in the base's order and scale, and what the report says of them."""
    done = {space: both for space, both in enumerate(zip(match.units, match.signs, strict=True))}
    kernels = set(matching.kernels(graph))
    aligned: Leaves = {}
    similarities: dict[str, float] = {}
    scales: dict[int, list[np.ndarray]] = {space: [] for space in done}
    from_base: list[str] = []
    lowest, highest = 1.0, 1.0
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
            similarities[path] = float(np.vdot(leaf, mine)) / norms if norms > 0 else 0.0
            if similarities[path] < _ALIKE and norms > 0:
                from_base.append(path)
    for path, mine in ours.items():
        if mine.ndim == 1 and graph.spaces(path, 0):
            aligned[path], far = _vector(graph, path, aligned[path], mine, scales)
            from_base += [path] if far else []
    weights = [ours[path].size for path in similarities]
    similarity = float(np.average(list(similarities.values()), weights=weights)) if weights else 1.0
    if similarity >= _ALIKE:
        aligned |= {path: ours[path] for path in from_base}
    return aligned, {
        "similarity": similarity,
        "similarities": similarities,
        "scale_range": (float(lowest), float(highest)),
        "from_base": tuple(from_base),
    }


def _unscaled(
    graph: Graph,
    path: str,
    leaf: np.ndarray,
    raw: np.ndarray,
    mine: np.ndarray,
    sizes: Sequence[int],
    merged: matching.Merged,
    match: matching.Match,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """A kernel in the base's scale, its split units added up, and by axis what each entry was multiplied with."""
    splits = [a for a in range(mine.ndim) if (path, a) in graph.consumed and _split(graph, path, a, merged, match)]
    factors = {a: np.ones(mine.shape[a], np.float32) for a in range(mine.ndim) if graph.spaces(path, a)}
    for _ in range(_REFITS if splits else 1):  # scales and sums depend on each other
        for axis, factor in _factors(graph, path, leaf, mine, match).items():
            factors[axis] = factors[axis] * factor
            leaf = leaf * matching.along(factor, axis, leaf.ndim)
        for axis in splits:
            leaf = _refit(graph, leaf, raw, mine, (path, axis), sizes, merged, match, factors)
    return leaf, factors


def _split(graph: Graph, path: str, axis: int, merged: matching.Merged, match: matching.Match) -> dict[int, list[int]]:
    """By space, the base's units to which several of the suspect's belong."""
    found = {
        s: [b for b, u in enumerate(match.units[s]) if int(u) in merged.members[s]] for s in graph.spaces(path, axis)
    }
    return {space: units for space, units in found.items() if units}


def _factors(
    graph: Graph, path: str, leaf: np.ndarray, mine: np.ndarray, match: matching.Match
) -> dict[int, np.ndarray]:
    """By axis, what each entry is multiplied with to have the base's scale and sign."""
    theirs = matching.balance(graph, path, leaf, graph.sizes)
    base = matching.balance(graph, path, mine, graph.sizes)
    product = leaf * mine
    for factors in (theirs, base):
        for axis, factor in factors.items():
            product = product * matching.along(factor, axis, leaf.ndim)
    plain = {axis: np.ones(mine.shape[axis], np.float32) for axis in theirs}
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
    merged: matching.Merged,
    match: matching.Match,
    factors: Mapping[int, np.ndarray],
) -> np.ndarray:
    """The aligned leaf, the outgoing weights of split units added up with the factors that come closest to the base's.

    What a unit's parts contribute depends on what stands between them and this kernel; the base's own weights tell.
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
            leaf[ours[space][unit]] = np.tensordot(weights.astype(np.float32), parts, 1)
    return np.moveaxis(leaf, 0, axis)


def _signs(
    graph: Graph, path: str, product: np.ndarray, start: dict[int, np.ndarray]
) -> tuple[dict[int, np.ndarray], float]:
    """Signs of channels under which suspect and base agree best, by turns, and how well they agree."""
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
    """A bias, gain or statistic in the base's scale: divided by the power of a kernel's scales that fits best.

    A bias scales as its kernel does, a variance as its square, a gain perhaps not at all.
    """
    fits = [leaf]
    entries = graph.entries(path, 0, graph.sizes)
    if len(entries) == 1:
        ((space, where),) = entries.items()
        for scale in scales[space]:
            for power in (1, 2, -1):
                factor = np.ones_like(mine)
                factor[where] = (scale**power)[:, None]
                fit = leaf / factor
                size = float(np.vdot(fit, fit))
                # A kernel's incoming and outgoing scales are known up to a common factor: it is fitted.
                fits.append(fit * (float(np.vdot(fit, mine)) / size) if size > 0 else fit)
    best = min(fits, key=lambda fit: float(np.linalg.norm(fit - mine)))
    norm = float(np.linalg.norm(mine))
    return best, norm > 0 and float(np.linalg.norm(best - mine)) > _CLOSE * norm
