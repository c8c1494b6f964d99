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
      beyond: operations that allow more freedom than the spaces below, which is not undone.
      merged: the own shapes of leaves of which the graph sees neighbouring axes as one.
      linear: the spaces whose units may be mixed.
      heads: for each set of blocks of these that change places together, the places of leaves that follow them.
      factors: by path, gains that are folded into a leaf before linear spaces are compared.
      biases: by kernel, or name of a gain, the leaf that is added to what it makes.
      shifted: kernels and gains to whose products something else than such a leaf is added.
      held: leaves on which gains depend that fold into no kernel.
    """

    shapes: Mapping[str, tuple[int, ...]]
    layout: Mapping[tuple[str, int], tuple[Segment, ...]]
    sizes: tuple[int, ...]
    consumed: frozenset[tuple[str, int]]
    groups: tuple[int, ...]
    unfollowed: tuple[str, ...]
    beyond: tuple[str, ...] = ()
    merged: Mapping[str, tuple[int, ...]] = {}
    linear: tuple[Linear, ...] = ()
    heads: tuple[tuple[Place, ...], ...] = ()
    factors: Mapping[str, tuple[Factor, ...]] = {}
    biases: Mapping[str, str] = {}
    shifted: frozenset[str] = frozenset()
    held: frozenset[str] = frozenset()

    def viewed(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves with the axes that the graph sees as one merged; others' shapes stay."""
        found = dict(leaves)
        for path in self.merged.keys() & found.keys():
            if found[path].shape == self.merged[path]:
                found[path] = found[path].reshape(self.shapes[path])
        return found

    def unviewed(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves in their own shapes again."""
        found = dict(leaves)
        for path in self.merged.keys() & found.keys():
            found[path] = found[path].reshape(self.merged[path])
        return found

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
