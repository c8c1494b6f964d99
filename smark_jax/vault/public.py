"""Which leaves of a model everybody has: those of a public model, from which a mark could be subtracted.

Whoever has the base of a copy reads the mark off the difference and takes it away. Of a model that was trained from
public weights everybody has the leaves that training left alone, so only the others are worth marking.
"""

import functools
from collections.abc import Mapping

import numpy as np

from smark_jax import _validate

MOST = 0.5
"""A leaf carries nothing when this share of its weights or more is public: the leaker could put those back."""


def shares(leaves: Mapping[str, np.ndarray], public: Mapping[str, np.ndarray]) -> dict[str, float]:
    """By name, the share of a leaf's weights that are public ones; leaves that have none are left out.

    A weight is public when it equals the public one, or the rounding of it to the narrower of the two dtypes. Leaves
    are paired by name, a prefix such as ``backbone.`` aside, where shapes agree; and whole leaves by content whatever
    their name, also where another framework transposed them.

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
    """What two leaves share that have the same values in any order: sums over their bits, modulo 2^64."""
    words = np.ascontiguousarray(leaf).reshape(-1).view(f"u{leaf.dtype.itemsize}").astype(np.uint64)
    words = words * np.uint64(0x9E3779B97F4A7C15) ^ words >> np.uint64(7)
    return int(words.sum()), int((words * words).sum())
