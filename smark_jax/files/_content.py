"""How well the contents of leaves agree: correlations of samples, which no layout but the right one gives."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALIKE = 0.3  # the correlation is above 0.5 for a copy that is still useful, and about 0 for other models
MARGIN = 0.2
_SAMPLE = 1 << 12


class Change(NamedTuple):
    """One layout: the shape to split a leaf into, the order of the axes then; ``words`` where shapes do not name it."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    words: str = ""


AS_IT_IS = Change((-1,), (0,))


def correlations(leaf: np.ndarray, changes: Sequence[Change], base: np.ndarray) -> list[float]:
    """The correlation of a leaf in each layout with one of the base, by :func:`directions`; 0 if either is constant."""
    number = min(leaf.size, _SAMPLE)
    return (directions([leaf], changes, number)[0] @ directions([base], [AS_IT_IS], number)[0, 0]).tolist()


def directions(leaves: Sequence[np.ndarray], changes: Sequence[Change], number: int, signs: bool = False) -> np.ndarray:
    """Samples of leaves of one shape in each layout, centred and normalised: inner products are correlations.

    ``number`` evenly spaced entries are taken and clipped to ten times the median magnitude, so that a few huge weights
    do not hide the others; NaN and infinite entries do not count. With ``signs``, an entry's sign replaces it, so that
    positive factors of channels change nothing. A constant leaf has the direction 0. Shape [leaves, layouts, number].
    """
    index = np.stack([_places(leaves[0].size, change, number) for change in changes])
    samples = np.empty((len(leaves), *index.shape))
    with np.errstate(over="ignore", invalid="ignore"):
        for place, leaf in enumerate(leaves):
            samples[place] = leaf.reshape(-1)[index]
    return _normalised(samples.reshape(-1, number), signs).reshape(samples.shape)


def _places(size: int, change: Change, number: int) -> np.ndarray:
    """Where evenly spaced entries of a layout lie in the leaf as stored."""
    index = np.linspace(0, size - 1, number).astype(np.int64)
    if change is AS_IT_IS or not change.split:
        return index
    steps = np.cumprod((1, *change.split[:0:-1]))[::-1]
    coordinates = np.unravel_index(index, [change.split[axis] for axis in change.order])
    return sum((steps[axis] * at for axis, at in zip(change.order, coordinates, strict=True)), np.zeros_like(index))


def _normalised(rows: np.ndarray, signs: bool) -> np.ndarray:
    """Rows clipped, centred and of length 1; constant ones are 0."""
    number = rows.shape[1]
    there = np.isfinite(rows)
    rows = np.where(there, np.sign(rows) if signs else rows, 0)
    sizes = np.sort(np.abs(rows), axis=1)
    zeros = (sizes == 0).sum(axis=1)
    middle = np.minimum(zeros + (number - zeros) // 2, number - 1) if number else zeros
    limit = 10 * sizes[np.arange(len(rows)), middle][:, None] if number else sizes
    rows = np.clip(rows, -limit, limit)
    rows -= np.where(there, rows, 0).sum(axis=1, keepdims=True) / np.maximum(there.sum(axis=1, keepdims=True), 1)
    rows[~there] = 0
    largest = np.abs(rows).max(axis=1, keepdims=True, initial=0)
    constant = largest <= 1e-12 * limit
    rows /= np.where(constant, 1, largest)
    rows[constant[:, 0]] = 0
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
