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

from smark_jax.carriers import Carrier, Mark, Scales, hadamard, shapes, shifts
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
    vector, totals, start = jnp.zeros(mark.carrier.num_weights), [], 0
    counts = shapes.kept(mark.shape, mark.carrier.num_weights)
    for (leaf, one), x, y, rms, count in zip(mark.shape, found, base, mark.spec.scales, counts, strict=True):
        if shapes.is_vector(leaf) == vectors:
            vector, total = _write(vector, start, x, y, one, rms, mark.strength, shapes.unnamed(leaf), count)
            totals.append(total)
        start += count
    return _chips(vector, mark.carrier, _mean(totals, mark)), _finite(base)


@functools.partial(jax.jit, static_argnums=3)
def read_batch(suspects: Sequence[Array], base: Sequence[Array], mark: Mark, per_pass: int) -> tuple[Array, Array]:
    """:func:`read` for suspects stacked along a leading axis, ``per_pass`` at a time."""
    chips, ok = jax.lax.map(lambda suspect: read(suspect, base, mark), suspects, batch_size=per_pass)
    return chips, ok.all()


def parts(found: Sequence[Array], base: Sequence[Array], mark: Mark) -> tuple[list[Array], Array, Array]:
    """The weighted shifts leaf by leaf, the mean weight, and whether the base is finite."""
    assert mark.shape is not None
    values, totals = [], []
    for (leaf, one), x, y, rms in zip(mark.shape, found, base, mark.spec.scales, strict=True):
        if shapes.is_vector(leaf):
            values.append(jnp.zeros(leaf.shape))
            continue
        value, total = _part(x, y, one, rms, mark.strength, shapes.unnamed(leaf))
        values.append(value)
        totals.append(total)
    return values, _mean(totals, mark), _finite(base)


def _mean(totals: list[Array], mark: Mark) -> Array:
    """The mean weight of a coordinate; 1 where all are zero."""
    assert mark.shape is not None
    mean = jnp.asarray(totals).sum() / mark.shape.num_coordinates
    return jnp.where(mean > 0, mean, 1)


# Compiled for each shape of a leaf, of which a model has few. One program for all leaves would hold the intermediate
# arrays of several at a time, and would take more memory to compile than a small model has weights.
@functools.partial(jax.jit, static_argnames="leaf")
def _part(
    found: Array, base: Array, one: Scales, rms: float | Array, strength: float | Array, leaf: Leaf
) -> tuple[Array, Array]:
    """The weighted shifts of one leaf, and the sum of the weights."""
    shift = shifts_of(found, base, leaf, one, rms, strength)
    value = _less_shrinkage(shift, one.coefficients(_wide(base)) / one.sizes(leaf), leaf, one)
    weight = jnp.where(shift.there, _precision(value, leaf, one, strength), 0)
    return value * weight, weight.sum()


@functools.partial(jax.jit, static_argnames=("leaf", "count"), donate_argnums=0)
def _write(
    vector: Array,
    start: int,
    found: Array,
    base: Array,
    one: Scales,
    rms: float | Array,
    strength: float | Array,
    leaf: Leaf,
    count: int,
) -> tuple[Array, Array]:
    """Writes the first ``count`` values of :func:`_part` into the vector of all leaves; their sum of weights."""
    value, total = _part(found, base, one, rms, strength, leaf)
    return jax.lax.dynamic_update_slice(vector, value.reshape(-1)[:count], (start,)), total


@jax.jit
def _chips(vector: Array, carrier: Carrier, mean: Array) -> Float[Array, " m"]:
    return hadamard.despread(vector, carrier) / mean


@jax.jit
def _finite(leaves: Sequence[Array]) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def counts(found: Sequence[Array], base: Sequence[Array], mark: Mark) -> tuple[list[Array], float, Array]:
    """As for a white mark: NaN or infinite weights by leaf, a bound of 0, and how many shifts are left out besides."""
    assert mark.shape is not None
    rows = zip(mark.shape, found, base, mark.spec.scales, strict=True)
    pairs = [_count_of(x, y, one, rms, mark.strength, shapes.unnamed(leaf)) for (leaf, one), x, y, rms in rows]
    broken, out = zip(*pairs, strict=True)
    return list(broken), 0.0, jnp.stack(out).sum()


@functools.partial(jax.jit, static_argnames="leaf")
def _count_of(
    found: Array, base: Array, one: Scales, rms: float | Array, strength: float | Array, leaf: Leaf
) -> tuple[Array, Array]:
    """How many of a leaf's weights are NaN or infinite, and how many of its shifts are left out besides."""
    broken = jnp.sum(~jnp.isfinite(_wide(found)))
    out = jnp.sum(~shifts_of(found, base, leaf, one, rms, strength).there)
    return broken, out - (broken if one.basis is None else 0)


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
