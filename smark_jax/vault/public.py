"""Finds the leaves of a model that are public: anybody could subtract them from a copy and so remove the mark.

Anybody who has the base of a copy can read the mark off the difference and remove it. When a model was trained from
public weights, everybody has the leaves that training did not change, so only the others are worth marking.
"""

import functools
from collections.abc import Mapping

import numpy as np

from smark_jax import _validate

MOST = 0.5
"""A leaf carries nothing when at least this share of its weights is public: a leaker could restore those."""


def shares(leaves: Mapping[str, np.ndarray], public: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The share of each leaf's weights that are public, by name; leaves without public weights are omitted.

    A weight is public when it equals the public one after both are rounded to the narrower of the two dtypes. Leaves of
    equal shape are paired by name, ignoring a prefix such as ``backbone.``. Whole leaves are also paired by content,
    whatever their names, even if another framework transposed them.

    Raises:
      SmarkError: when the models have nothing in common.
    """
    bits = functools.cache(lambda which, name, dtype: _bits((leaves, public)[which][name].astype(dtype)))
    by_size: dict[int, list[str]] = {}
    for name, leaf in public.items():
        by_size.setdefault(leaf.size, []).append(name)
    found = {}
    with np.errstate(all="ignore"):
        for name, leaf in leaves.items():
            alike = by_size.get(leaf.size, []) if leaf.size else []
            same = (float(_equal(leaf, public[o]).mean()) for o in alike if _paired(name, o, leaf, public[o]))
            share = max(same, default=0.0)
            if share < 1:
                pairs = ((other, min(leaf.dtype, public[other].dtype, key=lambda d: d.itemsize)) for other in alike)
                share = float(any(bits(0, name, d) == bits(1, o, d) for o, d in pairs)) or share
            if share > 0:
                found[name] = share
    if not found:
        expected, got = "a public model with leaves of the base in it", "one that shares no weight with it"
        raise _validate.fail("add-model", expected, got, "Is --public the file that training started from?")
    return found


def _paired(name: str, other: str, leaf: np.ndarray, public: np.ndarray) -> bool:
    short, long = sorted((f"/{name}".replace(".", "/"), f"/{other}".replace(".", "/")), key=len)
    return leaf.shape == public.shape and long.endswith(short)


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a == b.astype(a.dtype)) | (a.astype(b.dtype) == b)


def _bits(leaf: np.ndarray) -> tuple[int, int]:
    """A digest that two leaves share if they hold the same values in any order: sums over bits, modulo 2^64."""
    words = np.ascontiguousarray(leaf).reshape(-1).view(f"u{leaf.dtype.itemsize}").astype(np.uint64)
    words = words * np.uint64(0x9E3779B97F4A7C15) ^ words >> np.uint64(7)
    return int(words.sum()), int((words * words).sum())
