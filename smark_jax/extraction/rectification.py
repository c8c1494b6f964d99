"""Rectification: subtracts what suspect and base weights predict of each other, and weights the rest by information.

The method is described at :func:`smark_jax.extraction.extract`.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smark_jax.carriers import shifts

# At least _BIN weights per bin and at most _BINS bins per leaf; leaves with fewer than four bins are not rectified.
_BIN, _BINS = 128, 256
_TINY = 1e-20
# A mean square shift too small for a mark: as a share of what is typical of all weights, and from rounding alone.
_STILL, _ROUNDING = 1e-6, 1e-12


def scores(
    suspect: Sequence[Array], base: Sequence[Array], factors: Sequence[float | Array], limit: Float[Array, ""]
) -> Float[Array, " D"]:
    """The scores of the suspect's weights for shifts of the base's, scaled to a mean weight of 1.

    Args:
      suspect: its carrying leaves.
      base: the base's carrying leaves.
      factors: one over each leaf's RMS in the base.
      limit: the bound of all shifts together.
    """
    least = _ROUNDING + _STILL * jnp.square(shifts.typical(limit))
    leaves = [_score(*part, least) for part in zip(suspect, base, factors, strict=True)]
    scores, weights = (jnp.concatenate(values) for values in zip(*leaves, strict=True))
    mean = weights.mean()
    return scores / jnp.where(mean > 0, mean, 1)


def _score(
    found: Array, base: Array, factor: float | Array, least: Float[Array, ""]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """The scores of one leaf's weights for shifts of the base's, and each weight's factor in its score.

    Both are zero where the mean square shift, or the part that the suspect's weights do not predict, is not above
    ``least``: such a leaf is the base's own and carries no information. The same holds for weights that are NaN,
    infinite or at the bound.
    """
    shift = shifts.shift(found, base, factor).reshape(-1)
    limit = shifts.bound([shift])
    there = jnp.isfinite(jnp.asarray(found).astype(jnp.float32)).reshape(-1) & (jnp.abs(shift) < limit)
    shift = jnp.clip(shift, -limit, limit)
    ours = jnp.asarray(base).astype(jnp.float32).reshape(-1) * factor
    score, weight, power = _score_of_moved(ours + shift, ours, shift)
    speaks = there & (jnp.minimum(jnp.mean(jnp.square(shift)), power) > least)
    return jnp.where(speaks, score, 0), jnp.where(speaks, weight, 0)


def _score_of_moved(
    found: Float[Array, " n"], base: Float[Array, " n"], shift: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, ""]]:
    """Scores, weights, and the mean square of the unpredicted part."""
    bins = min(_BINS, found.size // _BIN)
    if bins < 4:
        power = jnp.mean(jnp.square(shift))
        weight = jnp.full(found.shape, 1 / jnp.maximum(power, _TINY))
        return shift * weight, weight, power
    by_found = _binned(found, bins)
    shift = -_unpredicted(by_found, base)
    power = by_found.mean(jnp.square(shift))
    factors = 1 / jnp.maximum(power + power.mean() / 10, _TINY)
    weight = jnp.zeros_like(found).at[by_found.order].set(factors[by_found.bin_of])
    return _unpredicted(_binned(base, bins), shift * weight), weight, power.mean()


class _Bins(NamedTuple):
    """The sorted values x, the bin of each place in that order, and a function that averages any values over bins."""

    x: Array
    order: Array
    bin_of: Array
    mean: Callable[[Array], Array]


def _unpredicted(bins: _Bins, y: Float[Array, " n"]) -> Float[Array, " n"]:
    """The residual of y after a piecewise linear fit in x, which is extended beyond the means of the outer bins."""
    x = bins.x
    at, to = bins.mean(x), bins.mean(y)
    steps = jnp.diff(at)
    slopes = jnp.where(steps > 0, jnp.diff(to) / jnp.where(steps > 0, steps, 1), 0)
    outside = slopes[0] * jnp.minimum(x - at[0], 0) + slopes[-1] * jnp.maximum(x - at[-1], 0)
    return y - jnp.interp(x, at, to) - outside


def _binned(x: Float[Array, " n"], bins: int) -> _Bins:
    order, size = jnp.argsort(x), -(-x.size // bins)
    bin_of = jnp.arange(x.size) // size
    count = jnp.bincount(bin_of, length=-(-x.size // size))

    def mean(values: Array) -> Array:
        total = jax.ops.segment_sum(values[order], bin_of, count.size, indices_are_sorted=True)
        return total / count

    return _Bins(x, order, bin_of, mean)
