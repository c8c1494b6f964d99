"""Bringing a suspect into the base's order of channels, scales and names."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from smark_jax import _trees, _validate, errors
from smark_jax._types import ApplyFn, PyTree
from smark_jax.alignment import checking, duplicates, fitting, forms, gauge, matching, pairing, scaling, tracing
from smark_jax.alignment import graph as graphs
from smark_jax.alignment.graph import Graph
from smark_jax.alignment.matching import Leaves
from smark_jax.alignment.report import Alignment, Report, SpaceReport, refused, undecided

_MISSED = 0.1
"""A suspect that lacks a larger share of the base's weights, or has it in other shapes, is never called no copy."""
_NARROWER = "Some layers have fewer channels than the base's: what is left of a copy may be too little to recognise."


def align(suspect: PyTree, base: PyTree, apply_fn: ApplyFn, example_images: Any) -> Alignment:
    """Brings a suspect's neurons back to where the base has them.

    It undoes permutations of channels, any scaling and sign of a channel's incoming or outgoing weights (and so
    rescaled neurons and folded normalisations), split and duplicated neurons, dummy neurons, and renamed leaves. Where
    only linear operations touch channels, it undoes any matrix that the network leaves free: rotated streams between
    norms, other bases of attention heads and of bottlenecks, with gains folded or not. A suspect may be wider than the
    base, but not where channels may be mixed. Leaves in another form of the same network are brought to the base's:
    1x1 convolutions as matrices, heads on an axis or not, queries, keys and values in one leaf or three, gains merged
    into kernels (:mod:`smark_jax.alignment.forms`). A component that all logits share counts for nothing. Leaves that
    it lacks or has in yet another form (a new head) are left out.
    Weights that are NaN or infinite stay so, at their aligned places, but count as zeros where channels are mixed.

    Args:
      suspect: pytree of arrays.
      base: the model that copies were made from, in the form that ``apply_fn`` takes as its first argument (with batch
        norm: the whole variables dict).
      apply_fn: the base's network, ``apply_fn(base, images) -> logits``, pure. It is traced, and run only where the
        answer would be that the suspect is no copy: on the base, whose logits must not change when it is rewritten.
      example_images: images in the form that it takes; only shape and dtype matter.

    Returns:
      The suspect in the base's structure, and a report. Channels of the base that the suspect lacks, and leaves that
      have nothing in common with the base's, are taken from the base, so that they read as unchanged.

    Raises:
      NothingMatched: when no order, scale and sign of channels makes the suspect's weights resemble the base's.
      Undecided: when they do not resemble the base's, but the network has operations that alignment cannot follow or
        symmetries that it does not undo; or when the suspect is of another width, depth or number of heads, so that
        more than a tenth of the base's weights have no counterpart: the message says what differs.
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
    tamed = {name: _tamed(leaf) for name, leaf in theirs.items()}
    whole = tracing.trace(apply_fn, base, example_images, _dense(everything, theirs))
    everything, theirs, tamed = (whole.viewed(leaves) for leaves in (everything, theirs, tamed))
    (theirs, changes), (tamed, _) = (forms.formed(whole, leaves) for leaves in (theirs, tamed))
    names = pairing.pair(whole, tamed, everything)
    placed, leaves = (forms.placed(whole, names, some) for some in (theirs, tamed))
    raw, sizes = _fitting(whole, placed, everything)
    left_out = everything.keys() - raw.keys()
    filled = {path: forms.neutral(path, everything[path]) for path in forms.mergeable(whole, everything) & left_out}
    graph = whole.without(left_out - filled.keys())
    ours = {path: leaf for path, leaf in everything.items() if path in graph.shapes}
    leaves = {path: filled[path] if path in filled else leaves[path] for path in ours}
    plain, leaves = gauge.canonical(graph, ours), gauge.canonical(graph, leaves)
    merged = duplicates.merge_duplicates(graph, leaves, sizes)
    fits, match, doubtful = fitting.solve(graph, merged.leaves, plain, sizes, merged.alive)
    moved = {path: gauge.carried(graph, path, leaf, fits) for path, leaf in leaves.items()}
    others = {p: leaf for p, leaf in merged.leaves.items() if leaf is not leaves[p]}
    merged = merged._replace(leaves=moved | {p: gauge.carried(graph, p, leaf, fits) for p, leaf in others.items()})
    aligned, found, telling = scaling.read(graph, moved, merged, plain, sizes, match)
    aligned = gauge.restored(graph, aligned, plain, ours)
    aligned = {path: everything[path] for path in left_out} | _broken_again(graph, raw, aligned, sizes, match)
    aligned |= {path: everything[path] for path in filled}
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
    found["alike"] = found["alike"] or _unmoved(graph, raw, ours)
    report = Report(
        spaces=spaces,
        renamed={path: name for path, name in names.items() if path != name and path in raw},
        unfollowed=graph.unfollowed,
        left_out=tuple(sorted(left_out)),
        changed={path: changes[name] for path, name in names.items() if name in changes and path in raw},
        merged=tuple(sorted(filled)),
        **found,
    )
    result = Alignment(_trees.rebuilt(base, whole.unviewed(aligned)), report)
    if report.alike:
        return result
    doubts = (*graph.unfollowed, *graph.beyond, *(_shown(graph, number) for number in doubtful))
    doubts += ("leaves of other names, paired by what bases do change",) if report.renamed and graph.linear else ()
    doubts = doubts or checking.doubts(whole, apply_fn, base, example_images)
    differing = _NARROWER if any(n < m for n, m in zip(sizes, graph.sizes, strict=True)) else ""
    if forms.missed(everything, left_out) > _MISSED:
        differing = forms.differing(whole, placed, everything)
    raise _unlike(result, doubts, telling, differing)


def _unlike(result: Alignment, doubts: Sequence[str], telling: bool, differing: str) -> errors.SmarkError:
    """Why a suspect without a kernel like the base's is no copy, or what keeps alignment from saying so."""
    expected = f"a kernel whose similarity with the base's is {scaling.ALIKE} or more, and above chance"
    got = f"none; their mean is {result.report.similarity:.3f}"
    if doubts:
        why = ", ".join(doubts)
        return undecided(expected, got, f"It may be a copy all the same: alignment does not see through {why}.", result)
    if not telling:
        return undecided(expected, got, "Its kernels are too small to tell a copy from another network.", result)
    if differing:
        return undecided(expected, got, differing, result)
    cause = "No order, scale and sign of channels makes its weights resemble the base's, as those of copies do."
    return refused(errors.NothingMatched, expected, got, cause, result)


def _dense(ours: Leaves, theirs: Leaves) -> dict[str, int]:
    """Kernels of one input per group, of which the suspect has one for each output, and the axis of these inputs."""
    found = {}
    for path, leaf in ours.items():
        other = theirs[path].shape if path in theirs else ()
        axes = [axis for axis, (n, m) in enumerate(zip(leaf.shape, other, strict=False)) if n != m]
        if len(other) == leaf.ndim > 2 and len(axes) == 1 and leaf.shape[axes[0]] == 1 < other[axes[0]]:
            found[path] = axes[0]
    return found


def _unmoved(graph: Graph, theirs: Leaves, ours: Leaves) -> tuple[str, ...]:
    """The kernels that resemble the base's as they are, so that no fit has a part in it."""
    found = []
    for path in ours.keys() & theirs.keys() - scaling.tables(graph):
        a, b = theirs[path], ours[path]
        if a.ndim > 1 and a.shape == b.shape and np.ptp(b) > 0:
            found += [path] * (scaling.centred(a, b) > max(scaling.ALIKE, 4 * a.size**-0.5))
    return tuple(found)


def _shown(graph: Graph, number: int) -> str:
    """A linear space by one of its leaves, in words."""
    place = next(place for place in graph.linear[number].places if place.path in graph.shapes)
    return f"channels that may be mixed, of which its leaves show too little (axis {place.axis} of {place.path!r})"


def _fitting(graph: Graph, theirs: Leaves, ours: Leaves) -> tuple[Leaves, tuple[int, ...]]:
    """The suspect's leaves, by the base's paths, whose shapes fit together, and the widths of its spaces."""
    fitting = {path: leaf for path, leaf in theirs.items() if forms.could_be(graph, path, leaf.shape)}
    while True:
        rest = graph.without(graph.shapes.keys() - fitting.keys())
        if not fitting or (graph.sizes and not matching.kernels(rest)):
            expected = "leaves of the base's form to recognise channels by"
            raise undecided(expected, f"none among {len(theirs):,} leaves", forms.differing(graph, theirs, ours))
        try:
            return fitting, rest.widths(fitting)
        except graphs.Misfit as misfit:
            del fitting[misfit.path]


def _tamed(leaf: np.ndarray) -> np.ndarray:
    """A leaf in which nothing overflows: floats as float64, with zeros for NaN and infinity."""
    if leaf.dtype != np.float32:
        return leaf
    return np.where(np.isfinite(leaf), leaf, 0).astype(np.float64)


def _broken_again(graph: Graph, raw: Leaves, aligned: Leaves, sizes: Sequence[int], match: matching.Match) -> Leaves:
    """The aligned leaves, with NaN wherever the suspect's corresponding weight is NaN or infinite."""
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
        raise undecided("leaves of real numbers", "none", "Is the file empty?")
    return found
