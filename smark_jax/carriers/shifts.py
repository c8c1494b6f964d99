r"""How far the suspect's weights are from the base's, with nothing in it that a few odd weights could drown.

A weight's shift is :math:`v = (s - b) / \text{RMS}`, in units of its leaf in the base. Weights that are NaN or infinite
have none. The others are bounded: :math:`v \to \max(-c, \min(c, v))`, as in Huber's estimators, with c the smallest
power of two, 1 to 1,024, for which a quarter of the shifts that are not zero lie within c / 16. For normal shifts that
is 5 to 10 standard deviations, so that neither a mark nor noise of any size meets the bound; and no set of weights
smaller than three quarters of all can raise it. It depends on suspect and base only.

References:
  Huber (1964), "Robust estimation of a location parameter".
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from smark_jax._types import AnyArray

_BOUNDS = tuple(2.0**k for k in range(10))  # and 1,024, where none of these will do
_INSIDE = 1 / 16
_SHARE = 0.25


class Tally(NamedTuple):
    """Counts over some weights.

    Attributes:
      moved: shifts other than zero.
      near: of these, for each possible bound c those within c / 16, shape [10].
    """

    moved: Int32[Array, ""]
    near: Int32[Array, " 10"]


def shift(found: AnyArray, base: AnyArray, factor: float | Array) -> Float[Array, "..."]:
    """The shifts of a leaf's weights, unbounded: zero where the suspect's are NaN or infinite.

    Args:
      found: the suspect's.
      base: the base's.
      factor: one over the leaf's root mean square in the base.
    """
    found, base = (jnp.asarray(x).astype(jnp.float32) for x in (found, base))
    return jnp.where(jnp.isfinite(found), found - base, 0) * factor


def tally(values: Float[Array, "..."]) -> Tally:
    """Counts shifts."""
    size = jnp.abs(values)
    near = [jnp.sum((size > 0) & (size <= some * _INSIDE), dtype=jnp.int32) for some in _BOUNDS]
    return Tally(jnp.sum(size > 0, dtype=jnp.int32), jnp.stack(near))


def bound(tallies: Sequence[Tally]) -> Float[Array, ""]:
    """The bound c for leaves that are read together."""
    total = functools.partial(functools.reduce, jnp.add)
    moved = total([one.moved.astype(jnp.float32) for one in tallies])
    near = total([one.near.astype(jnp.float32) for one in tallies])
    return jnp.exp2(jnp.sum(near < _SHARE * moved).astype(jnp.float32))


def bound_alone(values: Float[Array, "..."]) -> Float[Array, ""]:
    """:func:`bound` of these shifts: it counts for one bound after the other, and mostly the first will do."""
    size = jnp.abs(jax.lax.stop_gradient(values))
    moved = jnp.sum(size > 0, dtype=jnp.int32).astype(jnp.float32)

    def too_few(step: Array) -> Array:
        near = jnp.sum((size > 0) & (size <= jnp.exp2(step.astype(jnp.float32)) * _INSIDE), dtype=jnp.int32)
        return near.astype(jnp.float32) < _SHARE * moved

    last = len(_BOUNDS)
    step = jax.lax.while_loop(
        lambda step: (step < last) & too_few(step), lambda step: step + 1, jnp.zeros((), jnp.int32)
    )
    return jnp.exp2(step.astype(jnp.float32))


def typical(limit: Array) -> Array:
    """The shift that a quarter of the weights do not exceed, as the bound tells it: within a factor of two above."""
    return limit * _INSIDE


@functools.partial(jax.jit, static_argnames="factors")
def bound_of(found: Sequence[Array], base: Sequence[Array], factors: tuple[float, ...]) -> Float[Array, ""]:
    """The bound for these leaves, wherever they lie."""
    return bound([tally(shift(x, y, factor)) for x, y, factor in zip(found, base, factors, strict=True)])
