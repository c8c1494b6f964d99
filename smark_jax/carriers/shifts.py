r"""How far the suspect's weights are from the base's, bounded so that a few extreme weights cannot drown the rest.

A weight's shift is :math:`v = (s - b) / \text{RMS}`, in units of the RMS of its leaf in the base. Weights that are NaN
or infinite count as unshifted. The other shifts are bounded: :math:`v \to \max(-c, \min(c, v))`, as in Huber's
estimators, where c is the smallest power of two, 1 to 1,024, for which a quarter of the nonzero shifts lie within
c / 16. For normal shifts that is 5 to 10 standard deviations, so neither a mark nor noise of any size reaches the
bound, and no set of weights smaller than three quarters of all can raise it. The bound depends on suspect and base
only.

References:
  Huber (1964), "Robust estimation of a location parameter".
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from smark_jax._types import AnyArray

_STEPS = 10  # doublings of c, which starts at 1
_INSIDE = 1 / 16
_SHARE = 0.25


def shift(found: AnyArray, base: AnyArray, factor: float | Array) -> Float[Array, "..."]:
    """The shifts of a leaf's weights, unbounded: zero where the suspect's are NaN or infinite.

    Args:
      found: the suspect's.
      base: the base's.
      factor: one over the leaf's RMS in the base.
    """
    found, base = (jnp.asarray(x).astype(jnp.float32) for x in (found, base))
    return jnp.where(jnp.isfinite(found), found - base, 0) * factor


def bound(parts: Sequence[Float[Array, "..."]]) -> Float[Array, ""]:
    """The bound c for shifts that are read together. It tries one c after another; usually the first one suffices."""
    sizes = [jnp.abs(jax.lax.stop_gradient(part)) for part in parts]

    def count(inside: Callable[[Array], Array]) -> Array:
        return functools.reduce(jnp.add, [number((size > 0) & inside(size)) for size in sizes])

    moved = count(lambda size: size > 0)

    def too_few(step: Array) -> Array:
        near = _INSIDE * jnp.exp2(step.astype(jnp.float32))
        return (step < _STEPS) & (count(lambda size: size <= near) < _SHARE * moved)

    steps = jax.lax.while_loop(too_few, lambda step: step + 1, jnp.zeros((), jnp.int32))
    return jnp.exp2(steps.astype(jnp.float32))


def number(mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """How many entries are true. XLA compiles sums of floats several times as fast as sums of integers."""
    ones = jnp.where(mask, 1.0, 0.0)  # by rows first, since float32 stops counting at 2^24
    return ones.sum(axis=tuple(range(1, ones.ndim))).sum()


def typical(limit: Array) -> Array:
    """An estimate of the first quartile of nonzero absolute shifts from the bound: up to a factor of two too large."""
    return limit * _INSIDE


@jax.jit
def bound_of(found: Sequence[Array], base: Sequence[Array], factors: Sequence[float | Array]) -> Float[Array, ""]:
    """The bound for these leaves, on whatever devices they lie."""
    return bound([shift(x, y, factor) for x, y, factor in zip(found, base, factors, strict=True)])
