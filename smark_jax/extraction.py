"""Informed extraction: the soft chips in the difference between a suspect and the base model.

The base is subtracted because its weights are by far the largest noise that a read-out could contain. One compiled
function serves all suspects of a model: the suspect and the base are arguments, the selection is static.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smark_jax import _validate, carriers
from smark_jax._types import PyTree

# extract_batch reads this many suspects at a time, so that a long batch does not multiply the working memory.
_SUSPECTS_A_PASS = 8
# Rectification: at least so many weights in a bin, at most so many bins in a leaf; leaves of fewer than four stay.
_BIN, _BINS = 128, 256


def extract(
    suspect: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier, rectify: bool = False
) -> Float[Array, " m"]:
    r"""The suspect's soft chips: ``despread(read(suspect) - read(base))``, shape [m].

    A copy embedded at strength s reads ``s * sqrt(D / m)`` times its codeword; the mean of several copies reads the
    mean of theirs. :func:`smark_jax.tracing.trace` does not depend on the scale. Composes with jit, vmap and grad
    (there, values cannot be checked and NaN passes through).

    Pruning, regularisation and coarse quantisation move a weight by far more than a mark does, and mostly by an amount
    that follows from the weight itself. ``rectify`` reads what is left beyond that: with :math:`f_l(b)` the mean of
    leaf l's suspect weights as a function of the base's (piecewise linear over bins of at least 128 weights) and
    :math:`v` the mean square of :math:`r = s - f_l(b)` in a weight's bin, :math:`\bar v` in its leaf, it despreads
    :math:`2 r \bar v / (v + \bar v)`. The weights of an intact copy pass as they are, but for a share of bins over
    weights, below 1 %. It depends on suspect and base only, so the bound on accusing the innocent holds as it does
    without. Choose one way before you look: where both are tried, say so to ``trace`` by ``num_alignments``.

    Args:
      suspect: the model to read, with the base's structure.
      base: the model that the copies were made from.
      spec: the carrying leaves, selected on the base.
      carrier: the model's carrier.
      rectify: take out first what the base's weights predict of the suspect's.

    Returns:
      Soft chips in units of the leaves' root mean square, shape [m].

    Raises:
      ValueError: when the suspect or base lacks a carrying leaf or has one of another shape, the carrier was drawn for
        another number of weights, or carrying weights are NaN or infinite.
    """
    carriers.check_carrier("extract", carrier, spec)
    carriers.check_params("extract: suspect", suspect, spec)
    carriers.check_params("extract: base", base, spec)
    chips, ok = _extract(suspect, base, spec, carrier, rectify)
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
    parts = [_rectify_leaf(found[a:b], original[a:b]) for a, b in itertools.pairwise(ends)]
    return carriers.despread(jnp.concatenate(parts), carrier), ok


def _rectify_leaf(found: Float[Array, " n"], base: Float[Array, " n"]) -> Float[Array, " n"]:
    """What the base's weights do not predict, bins that vary more counting less."""
    bins = min(_BINS, found.size // _BIN)
    if bins < 4:
        return found - base
    order = jnp.argsort(base)
    bin_of = jnp.arange(found.size) // -(-found.size // bins)  # of the weights in the base's order
    bins = (found.size - 1) // -(-found.size // bins) + 1
    x, y = base[order], found[order]

    def mean(values: Array) -> Array:
        return jax.ops.segment_sum(values, bin_of, bins, indices_are_sorted=True) / jnp.bincount(bin_of, length=bins)

    at, to = mean(x), mean(y)
    steps = jnp.diff(at)
    slopes = jnp.where(steps > 0, jnp.diff(to) / jnp.where(steps > 0, steps, 1), 0)
    below, above = jnp.minimum(x - at[0], 0), jnp.maximum(x - at[-1], 0)  # beyond the outer bins' means
    rest = y - jnp.interp(x, at, to) - slopes[0] * below - slopes[-1] * above
    power = mean(jnp.square(rest))
    typical = jnp.mean(jnp.square(rest))
    weight = jnp.where(typical > 0, 2 * typical / (power + typical), 1)
    return jnp.zeros_like(found).at[order].set(rest * weight[bin_of])


@functools.partial(jax.jit, static_argnames="spec")
def _extract_batch(
    suspects: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier
) -> tuple[Array, Array]:
    chips, ok = jax.lax.map(
        lambda suspect: _extract(suspect, base, spec, carrier), suspects, batch_size=_SUSPECTS_A_PASS
    )
    return chips, ok.all()
