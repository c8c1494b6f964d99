"""Pairing the suspect's leaves with the base's: by name, or by properties that no reordering changes."""

import numpy as np

from smark_jax.alignment import forms
from smark_jax.alignment.graph import Graph
from smark_jax.alignment.matching import Leaves
from smark_jax.alignment.report import undecided


def pair(graph: Graph, theirs: Leaves, ours: Leaves) -> dict[str, str]:
    """The suspect's name for each leaf of the base; pairs leaves by form where most names differ."""
    kernels = [name for name, leaf in ours.items() if leaf.ndim > 1] or list(ours)  # vectors may have been merged
    missing = [name for name in kernels if name not in theirs]
    if len(missing) < len(kernels) / 2:
        return {name: name for name in ours if name in theirs}
    if len(theirs) < len(ours):
        merged = forms.mergeable(graph, ours)
        ours = {path: leaf for path, leaf in ours.items() if path not in merged}
    if len(theirs) < len(ours):
        cause = "Is it a copy of this model, saved whole?"
        raise undecided(f"a leaf {missing[0]!r} in the suspect", f"{sorted(theirs)[:6]}", cause)
    from scipy import optimize  # here and not above: most suspects keep their names

    cost = np.full((len(ours), len(theirs)), np.inf)
    profiles = {name: _profile(leaf) for name, leaf in theirs.items()}
    for i, (path, leaf) in enumerate(ours.items()):
        mine = _profile(leaf)
        for j, (name, other) in enumerate(theirs.items()):
            if forms.reshaped(graph, path, other) is not None:
                k = min(len(mine), len(profiles[name]))
                cost[i, j] = float(np.linalg.norm(mine[:k] - profiles[name][:k])) + 1e-6 * abs(i - j)
    blocked = np.isinf(cost).all(axis=1)
    if blocked.any():
        path = list(ours)[int(np.flatnonzero(blocked)[0])]
        shapes = sorted({leaf.shape for leaf in theirs.values()})
        cause = "The suspect is of another architecture, or its kernels are transposed."
        raise undecided(f"a leaf like {path!r}, shape {ours[path].shape}", f"shapes {shapes[:8]}", cause)
    rows, columns = optimize.linear_sum_assignment(np.where(np.isinf(cost), 1e6, cost))
    if np.isinf(cost[rows, columns]).any():
        path = list(ours)[int(rows[np.isinf(cost[rows, columns])][0])]
        raise undecided(f"a leaf of its own for {path!r}", "none that fits", "The suspect is of another architecture.")
    return {list(ours)[i]: list(theirs)[j] for i, j in zip(rows, columns, strict=True)}


def _profile(leaf: np.ndarray) -> np.ndarray:
    """Invariants under order, sign and scale of channels: singular values of the balanced kernel, or sorted values."""
    if leaf.ndim < 2:
        values = np.sort(np.abs(leaf.reshape(-1).astype(np.float64)))[::-1]
    else:
        matrix = leaf.reshape(-1, leaf.shape[-1]).astype(np.float64)
        for _ in range(10):
            for axis in (0, 1):
                level = np.sqrt(np.square(matrix).mean(axis=axis, keepdims=True))
                matrix = matrix / np.where(level > 0, level, 1)
        values = np.linalg.svd(matrix, compute_uv=False)
    norm = np.linalg.norm(values)
    return values / norm if norm > 0 else values
