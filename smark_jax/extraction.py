"""Informed extraction: the soft chips in the difference between a suspect and the base model.

The base is subtracted because its weights are by far the largest noise that a read-out could contain. One compiled
function serves all suspects of a model: the suspect and the base are arguments, the selection is static.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smark_jax import _validate, carriers
from smark_jax._types import PyTree

# extract_batch reads this many suspects at a time, so that a long batch does not multiply the working memory.
_SUSPECTS_A_PASS = 8
# Rectification: at least so many weights in a bin, at most so many bins in a leaf; leaves of fewer than four stay.
_BIN, _BINS = 128, 256
_TINY = 1e-20
# A leaf's mean square shift that is no mark: as a share of all weights', and as rounding leaves it.
_STILL, _ROUNDING = 1e-6, 1e-12


def extract(
    suspect: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier, rectify: bool = False
) -> Float[Array, " m"]:
    r"""The suspect's soft chips: ``despread(read(suspect) - read(base))``, shape [m].

    A copy embedded at strength s reads ``s * sqrt(D / m)`` times its codeword; the mean of several copies reads the
    mean of theirs. :func:`smark_jax.tracing.trace` does not depend on the scale. Composes with jit, vmap and grad
    (there, values cannot be checked and NaN passes through).

    Pruning, regularisation and coarse quantisation move a weight by far more than a mark does, mostly in a way that
    follows from the weight itself. ``rectify`` reads what a small shift of the base's weight b would have made more
    likely, the score :math:`\partial_b \log p(s \mid b)` of the suspect's weight s, which is the locally most powerful
    statistic. By Bayes it is that of :math:`p(b \mid s)` plus a function of b, and with :math:`p(b \mid s)` taken as
    normal, :math:`q = (\mathrm{E}[b \mid s] - b) / (v + \bar v / 10)` less :math:`\mathrm{E}[q \mid b]`. In each leaf
    the means are piecewise linear over bins of at least 128 weights, v is the mean square of the numerator in the bin
    of s, :math:`\bar v` in the leaf; q is scaled to a mean weight of 1. A weight that was pruned says little, then, and
    one that was kept much; an intact copy reads as it does without, but for a share of bins over weights, below 1 %.
    A leaf that moved a thousand times less than the weights altogether (alignment takes one from the base where the
    suspect's has nothing in common with it) is left out.
    It depends on suspect and base only, so the bound on accusing the innocent holds as it does without. Choose one way
    before you look: where both are tried, say so to ``trace`` by ``num_alignments``.

    Parameters that a mesh of devices holds (leaves split by a ``NamedSharding``) are read where they lie: only chips
    cross between devices, each of which holds the carrier beside them (about a byte a weight of the whole model). If
    suspect and base are split differently, the base's leaves are moved, and where only the base is split, the
    suspect's. Not so with ``rectify``, which sorts whole leaves, nor under a jit of your own, where the compiler
    decides.

    Args:
      suspect: the model to read, with the base's structure.
      base: the model that the copies were made from.
      spec: the carrying leaves, selected on the base.
      carrier: the model's carrier.
      rectify: take out what the weights predict of each other, and count each weight by what it still tells.

    Returns:
      Soft chips in units of the leaves' root mean square, shape [m].

    Raises:
      ValueError: when the suspect or base lacks a carrying leaf or has one of another shape, the carrier was drawn for
        another number of weights, carrying weights are NaN or infinite, or one model's are split over several meshes.
    """
    carriers.check_carrier("extract", carrier, spec)
    carriers.check_params("extract: suspect", suspect, spec)
    carriers.check_params("extract: base", base, spec)
    where = None if rectify else carriers.layout("extract", suspect, spec) or carriers.layout("extract", base, spec)
    if where is None:
        chips, ok = _extract(suspect, base, spec, carrier, rectify)
    else:
        chips, ok = carriers.despread_difference(suspect, base, spec, where, carrier)
    _validate.all_finite("extract", "carrying weights in suspect and base", ok)
    return chips


def extract_batch(
    suspects: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier
) -> Float[Array, "M m"]:
    """:func:`extract` of M suspects at once.

    Args:
      suspects: pytree whose leaves carry a leading axis of M suspects.
      base: the model that the copies were made from, without that axis.
      spec: the carrying leaves, selected on the base.
      carrier: the model's carrier.

    Returns:
      Soft chips, shape [M, m].

    Raises:
      ValueError: as :func:`extract`, or when the leaves disagree about M.
    """
    carriers.check_carrier("extract_batch", carrier, spec)
    _validate.stacked("extract_batch", "suspects", suspects)
    first = jax.eval_shape(functools.partial(jax.tree.map, lambda leaf: leaf[0]), suspects)
    carriers.check_params("extract_batch: suspect", first, spec)
    carriers.check_params("extract_batch: base", base, spec)
    chips, ok = _extract_batch(suspects, base, spec, carrier)
    _validate.all_finite("extract_batch", "carrying weights in suspects and base", ok)
    return chips


@functools.partial(jax.jit, static_argnames=("spec", "rectify"))
def _extract(
    suspect: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier, rectify: bool = False
) -> tuple[Array, Array]:
    found, original = carriers.read(suspect, spec), carriers.read(base, spec)
    ok = jnp.isfinite(found - original).all()
    if not rectify:
        return carriers.despread(found - original, carrier), ok
    ends = [0]
    for leaf in spec.leaves:
        ends.append(ends[-1] + math.prod(leaf.shape))
    least = _ROUNDING + _STILL * jnp.mean(jnp.square(found - original))
    leaves = [_score(found[a:b], original[a:b], least) for a, b in itertools.pairwise(ends)]
    scores, weights = (jnp.concatenate(parts) for parts in zip(*leaves, strict=True))
    mean = weights.mean()
    return carriers.despread(scores / jnp.where(mean > 0, mean, 1), carrier), ok


def _score(
    found: Float[Array, " n"], base: Float[Array, " n"], least: Float[Array, ""]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    """How a leaf's weights in the suspect speak for shifts of those in the base, and each weight's factor in that.

    Both are zero where the leaf's mean square shift is not above ``least``: it is the base's own and says nothing.
    """
    moved = jnp.mean(jnp.square(found - base)) > least
    score, weight = _score_of_moved(found, base)
    return jnp.where(moved, score, 0), jnp.where(moved, weight, 0)


def _score_of_moved(
    found: Float[Array, " n"], base: Float[Array, " n"]
) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
    bins = min(_BINS, found.size // _BIN)
    if bins < 4:
        shift = found - base
        weight = jnp.full(found.shape, 1 / jnp.maximum(jnp.mean(jnp.square(shift)), _TINY))
        return shift * weight, weight
    by_found = _binned(found, bins)
    shift = -_unpredicted(by_found, base)
    power = by_found.mean(jnp.square(shift))
    factors = 1 / jnp.maximum(power + power.mean() / 10, _TINY)
    weight = jnp.zeros_like(found).at[by_found.order].set(factors[by_found.bin_of])
    return _unpredicted(_binned(base, bins), shift * weight), weight


class _Bins(NamedTuple):
    """Values x in their order, the bin of each place in it, and a function that averages any values over the bins."""

    x: Array
    order: Array
    bin_of: Array
    mean: Callable[[Array], Array]


def _unpredicted(bins: _Bins, y: Float[Array, " n"]) -> Float[Array, " n"]:
    """What a piecewise linear function of x leaves of y; beyond the outer bins' means it goes on as it was."""
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


@functools.partial(jax.jit, static_argnames="spec")
def _extract_batch(
    suspects: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier
) -> tuple[Array, Array]:
    chips, ok = jax.lax.map(
        lambda suspect: _extract(suspect, base, spec, carrier), suspects, batch_size=_SUSPECTS_A_PASS
    )
    return chips, ok.all()
