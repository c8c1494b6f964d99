"""Informed extraction: the soft chips in the difference between a suspect and the base model.

The base is subtracted because its weights are by far the largest noise that a read-out could contain. One compiled
function serves all suspects of a model: the suspect and the base are arguments, the selection is static.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smark_jax import _validate, carriers
from smark_jax._types import PyTree

# extract_batch reads this many suspects at a time, so that a long batch does not multiply the working memory.
_SUSPECTS_A_PASS = 8


def extract(suspect: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier) -> Float[Array, " m"]:
    """The suspect's soft chips: ``despread(read(suspect) - read(base))``, shape [m].

    A copy embedded at strength s reads ``s * sqrt(D / m)`` times its codeword; the mean of several copies reads the
    mean of theirs. :func:`smark_jax.tracing.trace` does not depend on the scale. Composes with jit, vmap and grad
    (there, values cannot be checked and NaN passes through).

    Args:
      suspect: the model to read, with the base's structure.
      base: the model that the copies were made from.
      spec: the carrying leaves, selected on the base.
      carrier: the model's carrier.

    Returns:
      Soft chips in units of the leaves' root mean square, shape [m].

    Raises:
      ValueError: when the suspect or base lacks a carrying leaf or has one of another shape, the carrier was drawn for
        another number of weights, or carrying weights are NaN or infinite.
    """
    carriers.check_carrier("extract", carrier, spec)
    carriers.check_params("extract: suspect", suspect, spec)
    carriers.check_params("extract: base", base, spec)
    chips, ok = _extract(suspect, base, spec, carrier)
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


@functools.partial(jax.jit, static_argnames="spec")
def _extract(suspect: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier) -> tuple[Array, Array]:
    delta = carriers.read(suspect, spec) - carriers.read(base, spec)
    return carriers.despread(delta, carrier), jnp.isfinite(delta).all()


@functools.partial(jax.jit, static_argnames="spec")
def _extract_batch(
    suspects: PyTree, base: PyTree, spec: carriers.Spec, carrier: carriers.Carrier
) -> tuple[Array, Array]:
    chips, ok = jax.lax.map(
        lambda suspect: _extract(suspect, base, spec, carrier), suspects, batch_size=_SUSPECTS_A_PASS
    )
    return chips, ok.all()
