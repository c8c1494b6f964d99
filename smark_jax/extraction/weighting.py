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
import numpy as np
from jaxtyping import Array, Float

from smark_jax import _compiling
from smark_jax.carriers import Carrier, Mark, Scales, hadamard, shapes, shifts
from smark_jax.carriers.selection import Leaf

# Means over fewer entries than this say little of a row's or a column's noise.
_LEAST = 32
_SHARE = 0.1
# Shifts of an intact copy are within this many standard deviations.
_WITHIN = 6.0
_TINY = 1e-30


class Sums(NamedTuple):
    """Of one leaf, the sum of its coordinates' weights, and how many of its shifts are left out."""

    weight: Float[Array, ""]
    left_out: Float[Array, ""]


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
    (chips,), ok = read_each(found, base, mark, [mark.carrier], vectors)
    return chips, ok


def read_each(
    found: Sequence[Array], base: Sequence[Array], mark: Mark, carriers: Sequence[Carrier], vectors: bool = False
) -> tuple[list[Float[Array, " m"]], Array]:
    """:func:`read` by each of these carriers in the mark's coordinates; the shifts are weighted once."""
    values, parts = vector(found, base, mark, vectors)
    mean = _mean([part.weight for part in parts], mark)
    return [_chips(values, carrier, mean) for carrier in carriers], _all_finite(base)


@functools.partial(jax.jit, static_argnums=3)
def read_batch(suspects: Sequence[Array], base: Sequence[Array], mark: Mark, per_pass: int) -> tuple[Array, Array]:
    """:func:`read` for suspects stacked along a leading axis, ``per_pass`` at a time."""
    chips, ok = jax.lax.map(lambda suspect: read(suspect, base, mark), suspects, batch_size=per_pass)
    return chips, ok.all()


def vector(
    found: Sequence[Array], base: Sequence[Array], mark: Mark, vectors: bool = False
) -> tuple[Float[Array, " D"], list[Sums]]:
    """The weighted shifts of all coordinates in one vector, zero where they are not read; and the sums of each leaf."""
    assert mark.shape is not None
    values, sums, start = jnp.zeros(mark.carrier.num_weights), [], 0
    counts = shapes.kept(mark.shape, mark.carrier.num_weights)
    for (leaf, one), x, y, rms, count in zip(mark.shape, found, base, mark.spec.scales, counts, strict=True):
        if shapes.is_vector(leaf) == vectors:
            values, part = _write(values, start, x, y, one, rms, mark.strength, shapes.unnamed(leaf), count)
            sums.append(part)
        start += count
    return values, sums


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
        totals.append(total.weight)
    return values, _mean(totals, mark), _all_finite(base)


def _mean(totals: list[Array], mark: Mark) -> Array:
    """The mean weight of a coordinate; 1 where all are zero."""
    assert mark.shape is not None
    mean = jnp.asarray(totals).sum() / mark.shape.num_coordinates
    return jnp.where(mean > 0, mean, 1)


# Compiled for each shape of a leaf. One program for all leaves would hold the intermediate arrays of several at a time,
# and would take more memory to compile than a small model has weights.
@functools.partial(_compiling.by_shape, array=0, static_argnums=5)
def _part(
    found: Array, base: Array, one: Scales, rms: float | Array, strength: float | Array, leaf: Leaf
) -> tuple[Array, Sums]:
    """The weighted shifts of one leaf, and their sums."""
    shift = shifts_of(found, base, leaf, one, rms, strength)
    value = _less_shrinkage(shift, one.coefficients(_wide(base)) / one.sizes(leaf), leaf, one)
    weight = jnp.where(shift.there, _precision(value, leaf, one, strength), 0)
    return value * weight, Sums(weight.sum(), shifts.number(~shift.there))


@functools.partial(_compiling.by_shape, array=2, static_argnums=(7, 8), donate_argnums=0)
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
) -> tuple[Array, Sums]:
    """Writes the first ``count`` values of :func:`_part` into the vector of all leaves; and its sums."""
    value, total = _part(found, base, one, rms, strength, leaf)
    return jax.lax.dynamic_update_slice(vector, value.reshape(-1)[:count], (start,)), total


@jax.jit
def _chips(vector: Array, carrier: Carrier, mean: Array) -> Float[Array, " m"]:
    return hadamard.despread(vector, carrier) / mean


def _all_finite(leaves: Sequence[Array]) -> Array:
    return jnp.asarray([_finite(leaf) for leaf in leaves]).all()


@functools.partial(_compiling.by_shape, array=0)
def _finite(leaf: Array) -> Array:
    return jnp.isfinite(leaf).all()


def counts(found: Sequence[Array], base: Sequence[Array], mark: Mark) -> tuple[list[int], float, int]:
    """As for a white mark: NaN or infinite weights by leaf, a bound of 0, and how many shifts are left out besides.

    The latter are those of the leaves that :func:`read` reads.
    """
    assert mark.shape is not None
    broken = [int(np.sum(~np.isfinite(np.asarray(leaf, np.float32)))) for leaf in found]
    _, parts = vector(found, base, mark)
    out = sum(int(part.left_out) for part in parts)
    plain = zip(mark.shape, broken, strict=True)
    return broken, 0.0, out - sum(n for (leaf, one), n in plain if one.basis is None and not shapes.is_vector(leaf))


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
