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
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, errors
from smark_jax.alignment.spaces import Factor, Linear, Place

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
      units: the units in another order than their own, one for each entry: after a shuffle. Other widths than the
        base's have no such order.
    """

    space: int
    outer: int
    inner: int
    length: int
    units: tuple[int, ...] = ()


class Partition(NamedTuple):
    """A division of a space's units into groups that stay together: those of a grouped convolution, or of a norm.

    Attributes:
      family: its number. Groups of partitions of one family change places together.
      groups: each unit's group, or -1; shape [units].
    """

    family: int
    groups: np.ndarray


class View(NamedTuple):
    """How the graph sees a leaf whose own shape is another.

    Attributes:
      own: the leaf's own shape.
      shape: what the graph sees: several axes as one, or the groups of a convolution as blocks of a dense kernel.
      order: of the leaf's own axes, before neighbours become one.
      groups: of the convolution.
      inputs: the axis of the kernel's inputs, which are those of one group in the leaf's own shape.
      outputs: the axis of its outputs.
    """

    own: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    groups: int = 1
    inputs: int = 0
    outputs: int = 0

    def seen(self, leaf: np.ndarray) -> np.ndarray:
        """The leaf as the graph sees it; kernels with groups may be of other widths. Other shapes stay."""
        if self.groups == 1:
            return leaf.transpose(self.order).reshape(self.shape) if leaf.shape == self.own else leaf
        if leaf.ndim != len(self.own) or not leaf.size or leaf.shape[self.outputs] % self.groups:
            return leaf
        if leaf.shape[self.inputs] >= self.shape[self.inputs]:  # dense already
            return leaf
        blocks = self._blocks(leaf)
        dense = np.zeros((self.groups, blocks.shape[0], *blocks.shape[1:]), leaf.dtype)
        dense[np.arange(self.groups), :, np.arange(self.groups)] = blocks.swapaxes(0, 1)
        return self._kernel(dense.reshape(-1, *dense.shape[2:]))

    def own_form(self, leaf: np.ndarray) -> np.ndarray:
        """The leaf in its own form again: of a dense kernel, the blocks."""
        if self.groups == 1:
            return leaf.reshape([self.own[axis] for axis in self.order]).transpose(np.argsort(self.order))
        dense = self._blocks(leaf)
        dense = dense.reshape(self.groups, -1, *dense.shape[1:])
        return self._kernel(dense[np.arange(self.groups), :, np.arange(self.groups)].swapaxes(0, 1))

    def _blocks(self, kernel: np.ndarray) -> np.ndarray:
        """A kernel as [inputs, groups, outputs of a group, ...]."""
        first = np.moveaxis(kernel, (self.inputs, self.outputs), (0, 1))
        return first.reshape(first.shape[0], self.groups, -1, *first.shape[2:])

    def _kernel(self, blocks: np.ndarray) -> np.ndarray:
        first = blocks.reshape(blocks.shape[0], -1, *blocks.shape[3:])
        return np.moveaxis(first, (0, 1), (self.inputs, self.outputs))


class Graph(NamedTuple):
    """The channel spaces of a network.

    Attributes:
      shapes: each leaf's shape, by path.
      layout: by path and axis, the runs that make up the axis, in order.
      sizes: units of each space.
      consumed: paths and axes over which the network sums: a kernel's inputs.
      partitions: for each space, the divisions of its units into groups that stay together.
      unfollowed: operations that the pass could not follow; the entries that they touch are fixed.
      beyond: operations that allow more freedom than the spaces below, which is not undone.
      views: the leaves that the graph sees in another shape than their own.
      linear: the spaces whose units may be mixed.
      heads: for each set of blocks of these that change places together, the places of leaves that follow them.
      factors: by path, gains that are folded into a leaf before linear spaces are compared.
      biases: by kernel, or name of a gain, the leaf that is added to what it makes.
      shifted: kernels and gains to whose products something else than such a leaf is added.
      held: leaves on which gains depend that fold into no kernel.
      reduced: spaces over whose units something is reduced other than a product: the mean of a norm over channels.
      logits: paths and axes of what is added up to logits: a number that all of them share decides nothing.
      levels: paths and axes of kernels from whose products their mean along the axis may be subtracted.
    """

    shapes: Mapping[str, tuple[int, ...]]
    layout: Mapping[tuple[str, int], tuple[Segment, ...]]
    sizes: tuple[int, ...]
    consumed: frozenset[tuple[str, int]]
    partitions: tuple[tuple[Partition, ...], ...]
    unfollowed: tuple[str, ...]
    beyond: tuple[str, ...] = ()
    views: Mapping[str, View] = {}
    linear: tuple[Linear, ...] = ()
    heads: tuple[tuple[Place, ...], ...] = ()
    factors: Mapping[str, tuple[Factor, ...]] = {}
    biases: Mapping[str, str] = {}
    shifted: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()
    reduced: frozenset[int] = frozenset()
    logits: frozenset[tuple[str, int]] = frozenset()
    levels: tuple[tuple[str, int], ...] = ()

    def viewed(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves as the graph sees them (:class:`View`)."""
        return {path: self.views[path].seen(leaf) if path in self.views else leaf for path, leaf in leaves.items()}

    def unviewed(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves in their own forms again."""
        return {path: self.views[path].own_form(leaf) if path in self.views else leaf for path, leaf in leaves.items()}

    def own(self, path: str) -> tuple[int, ...]:
        """A leaf's own shape where the graph sees some of its axes as one; that of the dense kernel for groups."""
        view = self.views.get(path)
        return view.own if view and view.groups == 1 else self.shapes[path]

    @property
    def listed(self) -> frozenset[int]:
        """Spaces whose units stand in no regular order somewhere, and which have no other widths."""
        return frozenset(s.space for runs in self.layout.values() for s in runs if s.units)

    def density(self, path: str) -> float:
        """The share of a kernel's entries that its own form has: one over the number of a convolution's groups."""
        return 1 / self.views[path].groups if path in self.views else 1.0

    def weights(self, path: str) -> float:
        """The number of weights of the base's leaf in its own form."""
        return self.density(path) * math.prod(self.shapes[path])

    def without(self, paths: set[str]) -> "Graph":
        """The graph restricted to the other leaves."""
        shapes = {path: shape for path, shape in self.shapes.items() if path not in paths}
        layout = {place: runs for place, runs in self.layout.items() if place[0] not in paths}
        here = lambda places: tuple(place for place in places if place.path not in paths)  # noqa: E731
        linear = (space._replace(places=here(space.places), vectors=here(space.vectors)) for space in self.linear)
        return self._replace(
            shapes=shapes,
            layout=layout,
            consumed=frozenset(place for place in self.consumed if place in layout),
            linear=tuple(linear),  # in their order, as fits number them; some may have no place left
            heads=tuple(map(here, self.heads)),
            logits=frozenset(place for place in self.logits if place in layout),
        )

    def places(self, space: int) -> list[tuple[str, int]]:
        """Paths and axes at which a space's units have entries."""
        return [place for place, segments in self.layout.items() if any(s.space == space for s in segments)]

    def spaces(self, path: str, axis: int) -> set[int]:
        """The spaces of an axis, without :data:`FIXED`."""
        return {segment.space for segment in self.layout[path, axis]} - {FIXED}

    def entries(self, path: str, axis: int, sizes: Sequence[int]) -> dict[int, np.ndarray]:
        """By space, each unit's entries on the axis, shape [units, entries of each], when spaces have these sizes."""
        found: dict[int, list[np.ndarray]] = {}
        listed: dict[int, list[np.ndarray]] = {}
        start = 0
        for segment in self.layout[path, axis]:
            if segment.space == FIXED:
                start += segment.length
                continue
            if segment.units:
                listed.setdefault(segment.space, []).append(
                    np.stack([segment.units, start + np.arange(segment.length)])
                )
                start += segment.length
                continue
            shape = (segment.outer, sizes[segment.space], segment.inner)
            run = start + np.arange(math.prod(shape)).reshape(shape).swapaxes(0, 1).reshape(shape[1], -1)
            found.setdefault(segment.space, []).append(run)
            start += math.prod(shape)
        for space, runs in listed.items():
            units, at = np.concatenate(runs, axis=1)
            found.setdefault(space, []).append(at[np.argsort(units, kind="stable")].reshape(sizes[space], -1))
        return {space: np.concatenate(runs, axis=1) for space, runs in found.items()}

    def length(self, path: str, axis: int, sizes: Sequence[int]) -> int:
        """The number of entries on the axis when spaces have these sizes."""
        runs = self.layout[path, axis]
        return sum(s.length if s.space == FIXED or s.units else s.outer * sizes[s.space] * s.inner for s in runs)

    def widths(self, leaves: Mapping[str, np.ndarray]) -> tuple[int, ...]:
        """How many units each space has in a model of the same architecture whose leaves may be wider.

        Leaves of the base's shape take precedence.

        Raises:
          Misfit: when a leaf's shape fits no widths.
        """
        sizes = {space: self.sizes[space] for space in self.listed}
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
                    if segment.space == FIXED or segment.units:
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
