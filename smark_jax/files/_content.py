"""How well the contents of leaves agree: correlations of samples, which no layout but the right one gives."""

from collections.abc import Sequence

import numpy as np

ALIKE = 0.3  # the correlation is above 0.5 for a copy that is still useful, and about 0 for other models
MARGIN = 0.2
_SAMPLE = 1 << 12


def correlations(views: Sequence[np.ndarray], leaf: np.ndarray) -> list[float]:
    """The correlation of each view with a leaf of the same size, by :func:`directions`; 0 if either is constant."""
    number = min(leaf.size, _SAMPLE)
    return (directions(views, number) @ directions([leaf], number)[0]).tolist()


def directions(views: Sequence[np.ndarray], number: int, signs: bool = False) -> np.ndarray:
    """Samples ``number`` evenly spaced entries of each view, centred and normalised: inner products are correlations.

    Entries are clipped to ten times the median magnitude, so that a few huge weights do not hide the others; NaN and
    infinite entries do not count. With ``signs``, an entry's sign replaces it, so that positive factors of channels
    change nothing. A constant view has the direction 0. Shape [views, number].
    """
    size = views[0].size if views else 0
    rows = np.zeros((len(views), number), np.float64)
    index = np.linspace(0, size - 1, number).astype(np.int64) if size else np.zeros(0, np.int64)
    with np.errstate(over="ignore", invalid="ignore"):
        for row, view in zip(rows, views, strict=True):
            view = np.atleast_1d(view)
            row[:] = view[np.unravel_index(index, view.shape)] if number < size else view.reshape(-1)
    there = np.isfinite(rows)
    rows[~there] = 0
    rows = np.sign(rows) if signs else rows
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
