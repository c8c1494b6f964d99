"""Reparametrised kernels, quantised or factored, in which a leaker continues the training."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from smark_jax import _validate
from smark_jax._types import ApplyFn, PyTree
from smark_jax.attacks.removal import quantise


@functools.lru_cache(maxsize=8)
def quantised(apply_fn: ApplyFn, bits: int) -> ApplyFn:
    """The network with kernels rounded as by :func:`quantise`, whose gradient passes straight through the rounding.

    Training it is quantisation-aware training: Jacob et al., "Quantization and training of neural networks for
    efficient integer-arithmetic-only inference", CVPR 2018, with the straight-through estimator of Bengio, Leonard,
    Courville 2013 (arXiv 1308.3432). Quantise the result once more, since the weights in training are not rounded.

    Args:
      apply_fn: ``apply_fn(params, images) -> logits``.
      bits: 2 to 16.

    Returns:
      An ``apply_fn`` of the same parameters; the same function for the same arguments.
    """

    def run(params: PyTree, images: Array) -> Array:
        rounded = jax.tree.map(
            lambda leaf, near: leaf + jax.lax.stop_gradient(near - leaf), params, quantise(params, bits)
        )
        return apply_fn(rounded, images)

    return run


class Factors(NamedTuple):
    """A kernel as a product over its input channels.

    Attributes:
      left: shape [..., inputs, rank].
      right: shape [rank, outputs].
    """

    left: Float[Array, "... inputs rank"]
    right: Float[Array, "rank outputs"]


def factorise(params: PyTree, fraction: float) -> PyTree:
    """Replaces each kernel (leaf of two or more axes) by two factors from its largest singular values.

    Denton, Zaremba, Bruna, LeCun, Fergus, "Exploiting linear structure within convolutional networks for efficient
    evaluation", NIPS 2014. Their product is the kernel that :func:`low_rank` gives; the leaker trains them on, and
    multiplies them out to hide what was done.

    Args:
      params: the copy.
      fraction: part of the singular values to keep, strictly between 0 and 1; at least one is kept.

    Returns:
      The tree with :class:`Factors` in place of kernels.

    Raises:
      SmarkError: when the fraction is outside (0, 1).

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import attacks
      >>> factored = attacks.factorise({"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}, 0.25)
      >>> factored["kernel"].left.shape, attacks.multiply_out(factored)["kernel"].shape
      ((6, 1), (6, 4))
    """
    _validate.unit_interval("factorise", "a fraction", fraction, "Half is 0.5.")

    def factored(leaf: Array) -> Array | Factors:
        if leaf.ndim < 2:
            return leaf
        matrix = leaf.astype(jnp.float32).reshape(-1, leaf.shape[-1])
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
        rank = max(1, int(fraction * values.size))
        roots = jnp.sqrt(values[:rank])
        left, right = left[:, :rank] * roots[None], roots[:, None] * right[:rank]
        return Factors(left.reshape(*leaf.shape[:-1], rank).astype(leaf.dtype), right.astype(leaf.dtype))

    return jax.tree.map(factored, params)


def multiply_out(params: PyTree) -> PyTree:
    """The tree that :func:`factorise` took apart, with each kernel the product of its factors."""
    is_factors = lambda node: isinstance(node, Factors)  # noqa: E731
    return jax.tree.map(lambda node: node.left @ node.right if is_factors(node) else node, params, is_leaf=is_factors)
