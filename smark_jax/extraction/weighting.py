r"""The reading of a shaped mark: each coordinate's shift in units of its scale, weighted by its precision.

In each leaf, with d the shifts over the scales s:

1. Weights that are NaN or infinite, and shifts beyond the bound of :mod:`smark_jax.carriers.shifts`, are left out.
2. What follows from the base's own weights w, as after weight decay, is subtracted: :math:`d - \beta w / s` with
   :math:`\beta` by least squares in each row.
3. The noise is estimated from d itself: :math:`v_{ij} = (r_i + g / 10)(k_j + g / 10) / (1.21 g)`, from the mean squares
   r of rows, k of columns and g of the leaf. A mean over fewer than 32 entries is not used. A small share of g in each
   factor keeps a few dead channels from taking all the weight.
4. Coordinate (i, j) has weight :math:`p_{ij} = \min(\text{strength}^2 / v_{ij}, 1)`: no coordinate is believed to be
   less noisy than the mark is strong, so all coordinates of an intact copy count alike.

The chips are :math:`X (p \circ d) / \bar p`. Weights depend on suspect, base and shape, and never on a codeword, so the
bound on false accusation holds for every suspect. Leaves that are vectors are left out (:func:`is_vector`).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smark_jax.carriers import Mark, Scales, hadamard, shapes, shifts
from smark_jax.carriers.selection import Leaf

# Means over fewer entries than this say little of a row's or a column's noise.
_LEAST = 32
_SHARE = 0.1
# Shifts of an intact copy are within this many standard deviations.
_WITHIN = 6.0
_TINY = 1e-30


class Shifts(NamedTuple):
    """The shifts d of a leaf's coordinates, and which of them are within bounds."""

    values: Float[Array, "..."]
    there: Array


@functools.partial(jax.jit, static_argnames="vectors")
def read(
    found: Sequence[Array], base: Sequence[Array], mark: Mark, vectors: bool = False
) -> tuple[Float[Array, " m"], Array]:
    """The chips, and whether the base is finite.

    Args:
      found: the suspect's carrying leaves.
      base: the base's.
      mark: a mark with a shape.
      vectors: read the leaves that are vectors, and them alone.
    """
    assert mark.shape is not None
    values, mean, finite = parts(found, base, mark, vectors)
    vector = shapes.join(values, mark.shape, mark.carrier.num_weights)
    return hadamard.despread(vector, mark.carrier) / mean, finite


@functools.partial(jax.jit, static_argnums=3)
def read_batch(suspects: Sequence[Array], base: Sequence[Array], mark: Mark, per_pass: int) -> tuple[Array, Array]:
    """:func:`read` for suspects stacked along a leading axis, ``per_pass`` at a time."""
    chips, ok = jax.lax.map(lambda suspect: read(suspect, base, mark), suspects, batch_size=per_pass)
    return chips, ok.all()


@functools.partial(jax.jit, static_argnames="vectors")
def parts(
    found: Sequence[Array], base: Sequence[Array], mark: Mark, vectors: bool = False
) -> tuple[list[Array], Array, Array]:
    """The weighted shifts leaf by leaf, the mean weight (1 where all are zero), and whether the base is finite."""
    assert mark.shape is not None
    values, total = [], jnp.float32(0)
    for (leaf, one), x, y, rms in zip(mark.shape, found, base, mark.spec.scales, strict=True):
        if shapes.is_vector(leaf) != vectors:
            values.append(jnp.zeros(one.coordinates(leaf)))
            continue
        shift = shifts_of(x, y, leaf, one, rms, mark.strength)
        value = _less_shrinkage(shift, one.coefficients(_wide(y)) / one.sizes(leaf), leaf, one)
        weight = jnp.where(shift.there, _precision(value, leaf, one, mark.strength), 0)
        values.append(value * weight)
        total += weight.sum()
    mean = total / mark.shape.num_coordinates
    finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in base]).all()
    return values, jnp.where(mean > 0, mean, 1), finite


@jax.jit
def counts(found: Sequence[Array], base: Sequence[Array], mark: Mark) -> tuple[list[Array], float, Array]:
    """As for a white mark: NaN or infinite weights by leaf, a bound of 0, and how many shifts are left out besides."""
    assert mark.shape is not None
    broken = [jnp.sum(~jnp.isfinite(_wide(leaf))) for leaf in found]
    rows = zip(mark.shape, found, base, mark.spec.scales, broken, strict=True)
    out = [
        jnp.sum(~shifts_of(x, y, leaf, one, rms, mark.strength).there) - (number if one.basis is None else 0)
        for (leaf, one), x, y, rms, number in rows
    ]
    return broken, 0.0, jnp.stack(out).sum()


def shifts_of(
    found: Array, base: Array, leaf: Leaf, one: Scales, rms: float | Array, strength: float | Array
) -> Shifts:
    """The shifts of one leaf's coordinates in units of their scales; zero where they are left out."""
    change = shifts.shift(found, base, 1 / rms)
    if one.basis is not None:  # one huge weight would be in every direction
        limit = shifts.bound([change])
        change = jnp.where(jnp.abs(change) < limit, change, 0)
    unit = _WITHIN * strength
    values = one.coefficients(change * rms) / one.sizes(leaf)
    there = jnp.abs(values) < unit * shifts.bound([values / unit])
    if one.basis is None:
        there &= jnp.isfinite(_wide(found))
    return Shifts(jnp.where(there, values, 0), there)


def _wide(leaf: Array) -> Array:
    return jnp.asarray(leaf).astype(jnp.float32)


def _less_shrinkage(shift: Shifts, own: Array, leaf: Leaf, one: Scales) -> Array:
    """The shifts, less what the base's own weights predict of them."""
    own = jnp.where(shift.there, own, 0)
    _, columns = one.sides(leaf)
    over = columns if _count(own, columns) >= _LEAST else tuple(range(own.ndim))
    power = jnp.sum(own * own, axis=over, keepdims=True)
    share = jnp.sum(own * shift.values, axis=over, keepdims=True) / jnp.where(power > 0, power, 1)
    return shift.values - share * own


def _precision(shift: Array, leaf: Leaf, one: Scales, strength: float | Array) -> Array:
    rows, columns = one.sides(leaf)
    square = jnp.square(shift)
    whole = square.mean()
    noise = whole
    for over in (rows, columns):
        if _count(shift, over) >= _LEAST:
            noise *= (square.mean(axis=over, keepdims=True) / jnp.maximum(whole, _TINY) + _SHARE) / (1 + _SHARE)
    return jnp.minimum(jnp.square(strength) / jnp.maximum(noise, _TINY), 1)


def _count(values: Array, axes: tuple[int, ...]) -> int:
    return math.prod(values.shape[axis] for axis in axes)
