"""Fingerprint losses: pure functions of the soft read-out and the codeword, one example per call.

For batches, the caller uses ``vmap``. Every loss is small when each chip y_i agrees in sign with its code bit b_i. They
differ in what they still demand of a chip that already agrees.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smark_jax import _validate


def bit_cross_entropy(chips: Float[Array, " m"], code: Float[Array, " m"]) -> Float[Array, ""]:
    r"""Mean of :math:`\ln(1 + e^{-b_i y_i})`: the cross-entropy of the bits with the chips as logits.

    It is never zero: it keeps pushing every chip outward, but ever more gently. This is the loss of Uchida et al. 2017
    (arXiv 1701.04082), written for b in {-1, +1}.

    Args:
      chips: soft read-out y, shape [m].
      code: the customer's codeword b in {-1, +1}, shape [m].

    Returns:
      A scalar, at least 0.

    Raises:
      SmarkError: when the shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(bit_cross_entropy(jnp.zeros(4), jnp.ones(4)))  # ln 2
      0.6931472
    """
    _validate.same_shape("bit_cross_entropy", chips=chips, code=code)
    return jnp.mean(jax.nn.softplus(-code * chips))


def code_mse(chips: Float[Array, " m"], code: Float[Array, " m"]) -> Float[Array, ""]:
    r"""Mean of :math:`(y_i - b_i)^2`: pulls every chip to exactly its bit, from both sides.

    This is the fingerprint loss of DeepMarks (Chen et al. 2019, arXiv 1804.03648).

    Args:
      chips: soft read-out y, shape [m].
      code: the customer's codeword b in {-1, +1}, shape [m].

    Returns:
      A scalar, at least 0.

    Raises:
      SmarkError: when the shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(code_mse(jnp.zeros(4), jnp.ones(4)))
      1.0
    """
    _validate.same_shape("code_mse", chips=chips, code=code)
    return jnp.mean(jnp.square(chips - code))


def sign_hinge(chips: Float[Array, " m"], code: Float[Array, " m"], margin: float = 0.1) -> Float[Array, ""]:
    r"""Mean of :math:`\max(0, \mu - b_i y_i)`: zero once every chip clears ``margin``.

    Its gradient vanishes as soon as every chip reads right by this margin.

    Args:
      chips: soft read-out y, shape [m].
      code: the customer's codeword b in {-1, +1}, shape [m].
      margin: :math:`\mu`, in the unit of the chips.

    Returns:
      A scalar, at least 0.

    Raises:
      SmarkError: when the shapes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> print(sign_hinge(jnp.array([0.5, -0.5]), jnp.ones(2)))
      0.3
    """
    _validate.same_shape("sign_hinge", chips=chips, code=code)
    return jnp.mean(jax.nn.relu(margin - code * chips))
