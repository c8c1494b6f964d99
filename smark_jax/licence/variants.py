r"""Both variants of each segment of a copy, and the copy that a choice of them makes.

With w the owner's copy, in variant + the coordinates of segment i are those of w plus :math:`s \epsilon_d` times their
scales, and minus that in variant -. Where coordinates are the weights themselves, a variant holds the weights. Where
they are directions, it holds coefficients, and a leaf is ``rest + U coefficients``: U is rounded to float16, and the
rest is what w lacks with that U, so that nothing of w is lost.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax import _validate
from smark_jax.carriers import Leaf, Mark
from smark_jax.licence import documents, segments

Leaves = Mapping[str, np.ndarray]


class Cut(NamedTuple):
    """A copy in pieces.

    Attributes:
      rest: the leaves without what the segments hold, by name.
      places: how segments make the leaves.
      bases: U of the leaves whose coordinates are directions, float16, in the order of the places.
      variants: of each segment, the bytes of variant + and of variant -.
    """

    rest: dict[str, np.ndarray]
    places: tuple[documents.Place, ...]
    bases: tuple[np.ndarray, ...]
    variants: list[tuple[bytes, bytes]]


def cut(copy: Leaves, mark: Mark, found: segments.Segments, signs: np.ndarray, strength: float) -> Cut:
    """Cuts a copy into its rest and both variants of each segment.

    Args:
      copy: the owner's copy, by leaf.
      mark: the model's.
      found: the segments.
      signs: of all coordinates, shape [D].
      strength: s, the change of a coordinate in units of its scale.

    Raises:
      SmarkError: when a variant would not be finite: a customer's complaint would tell its choice.
    """
    rest, places, bases = dict(copy), [], []
    both: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    start = 0
    for number, where in enumerate(segments.slices(mark)):
        count = where.stop - where.start
        if not count:
            continue
        leaf = mark.spec.leaves[number]
        place, basis = _place(leaf, mark, number, count)
        change = strength * signs[start : start + count] * _sizes(mark, number).reshape(-1)[:count]
        weights = np.asarray(copy[leaf.path])
        own = (weights if basis is None else _coefficients(weights, place, basis)).reshape(-1)[:count]
        for part, sign in zip(both, (1, -1), strict=True):
            with np.errstate(over="ignore"):
                part.append((_wide(own) + sign * change).astype(own.dtype))
            if not np.isfinite(part[-1]).all():
                got = f"a leaf {leaf.path} whose weights are the largest of {own.dtype.name}"
                raise _validate.fail("licence", "variants with finite weights", got, "Choose a smaller strength.")
        left = _with(weights, place, basis, own, -1)
        rest |= dict.fromkeys((leaf.path, *leaf.tied), left)
        places.append(place)
        if basis is not None:
            bases.append(basis)
        start += count
    counts = [place.held for place in places]
    plus, minus = (_by_segment(part, counts, found) for part in both)
    return Cut(rest, tuple(places), tuple(bases), list(zip(plus, minus, strict=True)))


def dtypes(rest: Leaves, places: Sequence[documents.Place]) -> list[np.dtype]:
    """Of each leaf's coordinates in the variants."""
    return [np.dtype(np.float32) if place.directions else rest[place.path].dtype for place in places]


def ends(
    places: Sequence[documents.Place], kinds: Sequence[np.dtype], found: segments.Segments
) -> Iterator[np.ndarray]:
    """After each leaf: how many bytes each segment has of it and those before, shape [n].

    Args:
      places: the leaves.
      kinds: dtypes of their coordinates.
      found: the segments.
    """
    end, start = np.zeros(found.number, np.int64), 0
    for place, kind in zip(places, kinds, strict=True):
        members = found.members[start : start + place.held]
        end = end + np.bincount(members, minlength=found.number) * kind.itemsize
        start += place.held
        yield end


def join(
    rest: Leaves,
    places: Sequence[documents.Place],
    bases: Sequence[np.ndarray],
    chosen: Sequence[bytes],
    found: segments.Segments,
) -> dict[str, np.ndarray]:
    """The copy that the chosen variants make: the inverse of :func:`cut`."""
    leaves, remaining, start = dict(rest), list(bases), 0
    kinds, first = dtypes(rest, places), np.zeros(found.number, np.int64)
    for place, kind, last in zip(places, kinds, ends(places, kinds, found), strict=True):
        used = np.flatnonzero(last > first)
        bounds = zip(used.tolist(), first[used].tolist(), last[used].tolist(), strict=True)
        content, first = b"".join(chosen[number][a:b] for number, a, b in bounds), last
        own = np.empty(place.held, kind)
        order = np.argsort(found.members[start : start + place.held], kind="stable")
        own[order] = np.frombuffer(content, kind)
        basis = remaining.pop(0) if place.directions else None
        leaf = _with(rest[place.path], place, basis, own, 1)
        leaves |= dict.fromkeys((place.path, *place.tied), leaf)
        start += place.held
    return leaves


def inputs(place: documents.Place) -> int:
    """How many inputs the layer of a leaf with directions has."""
    return math.prod(place.shape[axis] for axis in place.axes)


def _place(leaf: Leaf, mark: Mark, number: int, count: int) -> tuple[documents.Place, np.ndarray | None]:
    one = None if mark.shape is None else mark.shape.scales[number]
    if one is None or one.basis is None:
        return documents.Place(leaf.path, leaf.tied, leaf.shape, (), 0, count), None
    basis = np.asarray(one.basis, np.float16)
    return documents.Place(leaf.path, leaf.tied, leaf.shape, one.axes, basis.shape[1], count), basis


def _sizes(mark: Mark, number: int) -> np.ndarray:
    """The scales of a leaf's coordinates, in the weights' unit."""
    leaf = mark.spec.leaves[number]
    if mark.shape is None:
        return np.full(leaf.size, float(mark.spec.scales[number]), np.float32)
    return np.asarray(mark.shape.scales[number].sizes(leaf))


def _wide(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.float64 else values.astype(np.float32)


def _coefficients(weights: np.ndarray, place: documents.Place, basis: np.ndarray) -> np.ndarray:
    moved = np.moveaxis(_wide(weights), place.axes, range(len(place.axes))).reshape(len(basis), -1)
    return (basis.astype(np.float32).T @ moved).astype(np.float32)


def _with(
    weights: np.ndarray, place: documents.Place, basis: np.ndarray | None, own: np.ndarray, sign: int
) -> np.ndarray:
    """The weights with the segments' coordinates taken out (sign -1) or put in (+1)."""
    if basis is None:
        flat = weights.reshape(-1).copy()
        flat[: place.held] = own if sign > 0 else 0
        return flat.reshape(place.shape)
    outputs = weights.size // len(basis)
    padded = np.zeros(place.directions * outputs, np.float32)
    padded[: place.held] = own
    change = basis.astype(np.float32) @ padded.reshape(place.directions, outputs)
    others = [size for axis, size in enumerate(place.shape) if axis not in place.axes]
    change = change.reshape(*(place.shape[axis] for axis in place.axes), *others)
    change = np.moveaxis(change, range(len(place.axes)), place.axes)
    return (_wide(weights) + sign * change).astype(weights.dtype)


def _by_segment(parts: Sequence[np.ndarray], counts: Sequence[int], found: segments.Segments) -> list[bytes]:
    """Coordinates of all leaves, as the bytes of each segment."""
    pieces: list[list[bytes]] = [[] for _ in range(found.number)]
    start = 0
    for values, count in zip(parts, counts, strict=True):
        members = found.members[start : start + count]
        content = values[np.argsort(members, kind="stable")].tobytes()
        ends = (np.cumsum(np.bincount(members, minlength=found.number)) * values.itemsize).tolist()
        before = 0
        for piece, end in zip(pieces, ends, strict=True):
            piece.append(content[before:end])
            before = end
        start += count
    return [b"".join(piece) for piece in pieces]
