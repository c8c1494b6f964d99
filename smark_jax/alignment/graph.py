r"""Which axes of which weights share a channel space, read off a network's own jaxpr.

Every entry of every axis of every leaf starts with its own identity. The pass walks through the network's equations.
Where two entries must stay together (a kernel's input channel and the activation that it multiplies, the two sides of
a residual addition, a bias and the channel that it is added to), it links their identities. Reshapes, transposes,
concatenations and slices carry identities along. Connected components are the network's *units*; units that touch the
same axes in the same way can change places with each other and form a *space*. Images, logits, kernels' windows and
everything that an unknown operation touches stay fixed.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import sparse

from smark_jax import _trees, _validate, errors
from smark_jax._types import ApplyFn, PyTree
from smark_jax.alignment._walk import Role, Walk

FIXED = -1
"""The space of entries that stay where they are."""


class Misfit(errors.SmarkError):
    """A leaf's shape fits none of the widths that the other leaves imply; ``path`` names the leaf."""

    def __init__(self, path: str, expected: str, shape: tuple[int, ...]) -> None:
        cause = "The suspect is of another architecture, or its kernels are transposed."
        super().__init__(str(_validate.fail("alignment", expected, f"shape {shape}", cause)))
        self.path = path


class Segment(NamedTuple):
    """A run of entries of an axis.

    Attributes:
      space: number of the space, or :data:`FIXED`.
      outer: how often the whole space is repeated.
      inner: how often each unit is repeated in a row. Entry ``(o * size + unit) * inner + i`` belongs to the unit.
      length: number of entries in the run, ``outer * size * inner``.
    """

    space: int
    outer: int
    inner: int
    length: int


class Graph(NamedTuple):
    """The channel spaces of a network.

    Attributes:
      shapes: each leaf's shape, by path.
      layout: by path and axis, the runs that make up the axis, in order.
      sizes: units of each space.
      consumed: paths and axes over which the network sums: a kernel's inputs.
      groups: for each space, how many units in a row are normalised together (group norm); 1 for the others.
      unfollowed: operations that the pass could not follow; the entries that they touch are fixed.
      beyond: operations that allow more freedom than channels' order, scale and sign (rotations), which is not undone.
    """

    shapes: Mapping[str, tuple[int, ...]]
    layout: Mapping[tuple[str, int], tuple[Segment, ...]]
    sizes: tuple[int, ...]
    consumed: frozenset[tuple[str, int]]
    groups: tuple[int, ...]
    unfollowed: tuple[str, ...]
    beyond: tuple[str, ...] = ()

    def without(self, paths: set[str]) -> "Graph":
        """The graph restricted to the other leaves."""
        shapes = {path: shape for path, shape in self.shapes.items() if path not in paths}
        layout = {place: runs for place, runs in self.layout.items() if place[0] not in paths}
        return self._replace(shapes=shapes, layout=layout, consumed=frozenset(p for p in self.consumed if p in layout))

    def places(self, space: int) -> list[tuple[str, int]]:
        """Paths and axes at which a space's units have entries."""
        return [place for place, segments in self.layout.items() if any(s.space == space for s in segments)]

    def spaces(self, path: str, axis: int) -> set[int]:
        """The spaces of an axis, without :data:`FIXED`."""
        return {segment.space for segment in self.layout[path, axis]} - {FIXED}

    def entries(self, path: str, axis: int, sizes: Sequence[int]) -> dict[int, np.ndarray]:
        """By space, each unit's entries on the axis, shape [units, entries of each], when spaces have these sizes."""
        found: dict[int, list[np.ndarray]] = {}
        start = 0
        for segment in self.layout[path, axis]:
            if segment.space == FIXED:
                start += segment.length
                continue
            shape = (segment.outer, sizes[segment.space], segment.inner)
            run = start + np.arange(math.prod(shape)).reshape(shape).swapaxes(0, 1).reshape(shape[1], -1)
            found.setdefault(segment.space, []).append(run)
            start += math.prod(shape)
        return {space: np.concatenate(runs, axis=1) for space, runs in found.items()}

    def length(self, path: str, axis: int, sizes: Sequence[int]) -> int:
        """The number of entries on the axis when spaces have these sizes."""
        runs = self.layout[path, axis]
        return sum(s.length if s.space == FIXED else s.outer * sizes[s.space] * s.inner for s in runs)

    def widths(self, leaves: Mapping[str, np.ndarray]) -> tuple[int, ...]:
        """How many units each space has in a model of the same architecture whose leaves may be wider.

        Leaves of the base's shape take precedence.

        Raises:
          Misfit: when a leaf's shape fits no widths.
        """
        sizes: dict[int, int] = {}
        for path, leaf in leaves.items():
            shape = self.shapes[path]
            if leaf.ndim != len(shape):
                raise Misfit(path, f"leaf {path!r} of {len(shape)} axes", leaf.shape)
        pending = [place for place in self.layout if place[0] in leaves]
        pending.sort(key=lambda place: leaves[place[0]].shape != self.shapes[place[0]])
        while pending:
            solved = []
            for path, axis in pending:
                rest, unknown = leaves[path].shape[axis], {}
                for segment in self.layout[path, axis]:
                    if segment.space == FIXED:
                        rest -= segment.length
                    elif segment.space in sizes:
                        rest -= segment.outer * segment.inner * sizes[segment.space]
                    else:
                        unknown[segment.space] = unknown.get(segment.space, 0) + segment.outer * segment.inner
                if len(unknown) > 1:
                    continue
                solved.append((path, axis))
                for space, times in unknown.items():
                    sizes[space], rest = divmod(rest, times)
                if rest or any(sizes[space] < 1 for space in unknown):
                    usual = self.length(path, axis, [sizes.get(s, size) for s, size in enumerate(self.sizes)])
                    expected = f"leaf {path!r} with {usual} entries on axis {axis}"
                    if unknown:
                        expected = f"leaf {path!r} with a multiple of {max(unknown.values())} entries on axis {axis}"
                    raise Misfit(path, expected, leaves[path].shape)
            if not solved:  # only sums of widths are known, so the base's widths are taken
                space = next(s for s in range(len(self.sizes)) if s not in sizes)
                sizes[space] = self.sizes[space]
            pending = [place for place in pending if place not in solved]
        return tuple(sizes.get(space, size) for space, size in enumerate(self.sizes))

    def normalised(self, space: int) -> bool:
        """Whether a normalisation removes the scale of a space's incoming weights: it has vectors besides biases."""
        places = self.places(space)
        made = [p for p in places if p not in self.consumed and len(self.shapes[p[0]]) > 1]
        return sum(len(self.shapes[path]) == 1 for path, _ in places) > len(made)


def trace(apply_fn: ApplyFn, params: PyTree, example_images: Any) -> Graph:
    """The channel spaces of ``apply_fn(params, example_images)``.

    Args:
      apply_fn: the network, pure.
      params: its first argument; only shapes and dtypes are used.
      example_images: images in the form that it takes; only shape and dtype are used.

    Raises:
      SmarkError: when the network refuses these parameters or images.
    """
    shaped = lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.numpy.result_type(x))  # noqa: E731
    try:
        closed = jax.make_jaxpr(apply_fn)(jax.tree.map(shaped, params), shaped(example_images))
    except Exception as error:
        cause = "apply_fn(base, example_images) must give logits; with batch norm, base is the whole variables dict."
        raise _validate.fail(
            "alignment",
            "a network that takes base and images",
            f"an error: {error}",
            cause,
            desk="The function that --align names returns a network and images: it takes the base and gives logits.",
        ) from error
    named = [(path, np.shape(leaf)) for path, leaf in _trees.named("alignment", params).items()]
    walk = Walk()
    start = [
        tuple(Role((axis,), walk.fresh((size,)), (path, axis)) for axis, size in enumerate(shape) if size > 1)
        for path, shape in named
    ]
    axes = {role.source: role.ids for roles in start for role in roles if role.source}
    start.append(tuple(Role((i,), walk.fixed((n,)), None) for i, n in enumerate(np.shape(example_images)) if n > 1))
    for roles in walk.run(closed.jaxpr, [walk.constant(c) for c in closed.consts], start):
        walk.freeze(roles)
    return _graph(dict(named), axes, walk)


def _graph(shapes: dict[str, tuple[int, ...]], axes: dict[tuple[str, int], np.ndarray], walk: Walk) -> Graph:
    """Connected components of the links, grouped into spaces by the axes that they touch."""
    n = walk.count
    pairs = np.concatenate([np.zeros((2, 0), int), *walk.links], axis=1)
    matrix = sparse.coo_matrix((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(n, n))
    _, label = sparse.csgraph.connected_components(matrix, directed=False)
    places = list(axes)
    entries = [label[axes[place]] for place in places]
    counts = sparse.coo_matrix(
        (
            np.ones(sum(map(len, entries)), np.int64),
            (np.concatenate([[], *entries]).astype(int), np.repeat(np.arange(len(places)), [len(e) for e in entries])),
        ),
        shape=(int(label.max(initial=-1)) + 1, len(places)),
    ).tocsr()
    still = set(label[np.concatenate([np.zeros(0, int), *walk.frozen])].tolist())
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for component in dict.fromkeys(np.concatenate([np.zeros(0, int), *entries]).tolist()):
        row = counts[component]
        if component not in still and row.nnz > 1:
            alike.setdefault(tuple(zip(row.indices.tolist(), row.data.tolist(), strict=True)), []).append(component)
    rank = {c: (s, u) for s, units in enumerate(g for g in alike.values() if len(g) > 1) for u, c in enumerate(units)}
    sizes = [len(units) for units in alike.values() if len(units) > 1]
    layout = {
        place: _segments([rank.get(c, (FIXED, 0)) for c in e.tolist()], sizes)
        for place, e in zip(places, entries, strict=True)
    }
    # An axis whose units have no regular order is left alone, and so are the spaces that it touches.
    irregular = {
        rank[c][0]
        for place, e in zip(places, entries, strict=True)
        if layout[place] is None
        for c in e.tolist()
        if c in rank
    }
    if irregular:
        walk.unfollowed["channels in a changing order"] = None
        renumber = {s: i for i, s in enumerate(s for s in range(len(sizes)) if s not in irregular)}
        rank = {c: (renumber[s], u) for c, (s, u) in rank.items() if s in renumber}
        sizes = [size for s, size in enumerate(sizes) if s in renumber]
        layout = {
            place: _segments([rank.get(c, (FIXED, 0)) for c in e.tolist()], sizes)
            for place, e in zip(places, entries, strict=True)
        }
    whole = {
        (path, axis): layout.get((path, axis)) or (Segment(FIXED, 1, 1, size),)
        for path, shape in shapes.items()
        for axis, size in enumerate(shape)
    }
    groups = [1] * len(sizes)
    for ids in walk.together:
        for component in label[ids[:1]].tolist():
            if component in rank:
                groups[rank[component][0]] = max(groups[rank[component][0]], len(ids))
    return Graph(
        shapes, whole, tuple(sizes), frozenset(walk.consumed), tuple(groups), tuple(walk.unfollowed), tuple(walk.beyond)
    )


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
