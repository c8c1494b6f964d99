"""Attempts to remove the fingerprint from one copy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from smark_jax import _validate, parallel
from smark_jax._types import AnyArray, ApplyFn, PyTree


def fine_tune(
    params: PyTree,
    apply_fn: ApplyFn,
    images: AnyArray,
    labels: Int[AnyArray, " N"],
    *,
    epochs: int = 3,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> PyTree:
    """Trains all layers on with Adam and true labels, the "fine-tune all layers" of the usual removal suites.

    Args:
      params: the copy.
      apply_fn: ``apply_fn(params, images) -> logits``.
      images: the leaker's images, shape [N, ...].
      labels: their labels, shape [N].
      epochs: passes over the data.
      batch_size: examples in a step, at most N.
      learning_rate: Adam's.
      seed: of the shuffles.
      on_step: called after each step: a progress bar.

    Returns:
      The fine-tuned copy.

    Raises:
      ValueError: when the batch is larger than the data, or epochs or batch size not at least 1.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        _validate.positive("fine_tune", name, value)
    if not batch_size <= len(images) == len(labels):
        got = f"{len(images)} images and {len(labels)} labels"
        cause = "Use smaller batches, or pass images and labels of the same split."
        raise _validate.fail("fine_tune", f"at least {batch_size} images with a label each", got, cause)
    optimizer = optax.adam(learning_rate)

    @jax.jit
    def step(params: PyTree, opt_state: optax.OptState, x: Array, y: Array) -> tuple[PyTree, optax.OptState]:
        gradient = jax.grad(lambda p: parallel.cross_entropy(apply_fn(p, x), y))(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(seed)
    opt_state = optimizer.init(params)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            index = order[start : start + batch_size]
            params, opt_state = step(params, opt_state, images[index], labels[index])
            on_step()
    return params


def prune(params: PyTree, fraction: float) -> PyTree:
    """Sets the smallest weights of each kernel (leaf of two or more axes) to zero: magnitude pruning, layer by layer.

    Args:
      params: the copy.
      fraction: part of each kernel's weights to remove, strictly between 0 and 1.

    Raises:
      ValueError: when the fraction is outside (0, 1).
    """
    _validate.unit_interval("prune", "a fraction", fraction, "50 % is 0.5.")
    return jax.tree.map(functools.partial(_prune_kernel, fraction=fraction), params)


def _prune_kernel(leaf: Array, fraction: float) -> Array:
    if leaf.ndim < 2:
        return leaf
    bar = jnp.quantile(jnp.abs(leaf).astype(jnp.float32).reshape(-1), fraction)
    return jnp.where(jnp.abs(leaf) < bar, 0, leaf).astype(leaf.dtype)


def quantise(params: PyTree, bits: int) -> PyTree:
    """Rounds each kernel (leaf of two or more axes) to 2^bits - 1 evenly spaced levels between -max and max.

    Args:
      params: the copy.
      bits: 2 to 16.

    Raises:
      ValueError: when bits are outside 2 to 16.
    """
    if bits not in range(2, 17):
        raise _validate.fail("quantise", "bits from 2 to 16", repr(bits), "Common choices are 8 and 4.")
    return jax.tree.map(functools.partial(_quantise_kernel, levels=2 ** (bits - 1) - 1), params)


def _quantise_kernel(leaf: Array, levels: int) -> Array:
    if leaf.ndim < 2:
        return leaf
    step = jnp.maximum(jnp.abs(leaf).max().astype(jnp.float32), 1e-30) / levels
    return (jnp.round(leaf.astype(jnp.float32) / step) * step).astype(leaf.dtype)


def add_noise(params: PyTree, key: Array, relative: float) -> PyTree:
    """Adds Gaussian noise to every floating-point leaf, in units of that leaf's root mean square.

    Args:
      params: the copy.
      key: a ``jax.random`` key.
      relative: the noise's standard deviation as a multiple of the leaf's root mean square, the unit in which
        :func:`smark_jax.embedding.embed` measures its strength.

    Raises:
      ValueError: when ``relative`` is not positive and finite.
    """
    _validate.finite_number("add_noise", "relative", relative)
    add = functools.partial(_add_noise_to_leaf, relative=relative)
    return jax.tree.map(add, params, optax.tree.split_key_like(key, params))


def _add_noise_to_leaf(leaf: Array, key: Array, relative: float) -> Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    spread = jnp.sqrt(jnp.mean(jnp.square(wide)))
    return (wide + relative * spread * jax.random.normal(key, leaf.shape, wide.dtype)).astype(leaf.dtype)


def prune_filters(params: PyTree, fraction: float) -> PyTree:
    """Sets the output channels of least L1 norm of every convolution (leaf of three or more axes) to zero.

    Li, Kadav, Durdanovic, Samet, Graf, "Pruning filters for efficient ConvNets", ICLR 2017, without the fine-tuning
    that may follow. Dense layers, and so the logits' own, are left alone.

    Args:
      params: the copy.
      fraction: part of each convolution's output channels (its last axis) to remove, strictly between 0 and 1; rounded
        down to whole channels.

    Raises:
      ValueError: when the fraction is outside (0, 1).
    """
    _validate.unit_interval("prune_filters", "a fraction", fraction, "50 % is 0.5.")
    return jax.tree.map(functools.partial(_prune_filters_of_kernel, fraction=fraction), params)


def _prune_filters_of_kernel(leaf: Array, fraction: float) -> Array:
    if leaf.ndim < 3:
        return leaf
    norms = jnp.abs(leaf).astype(jnp.float32).sum(axis=tuple(range(leaf.ndim - 1)))
    return leaf.at[..., jnp.argsort(norms)[: int(fraction * norms.size)]].set(0)


def cast(params: PyTree, dtype: Any) -> PyTree:
    """Rounds every floating-point leaf to a narrower type and gives it back in its own.

    Args:
      params: the copy.
      dtype: a floating-point type, such as ``jax.numpy.bfloat16`` or ``"float16"``.

    Raises:
      ValueError: when ``dtype`` is not a floating-point type.
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise _validate.fail("cast", "a floating-point dtype", repr(dtype), "For whole numbers, use quantise.")
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(dtype).astype(leaf.dtype) if floating(leaf) else leaf, params)


def low_rank(params: PyTree, fraction: float) -> PyTree:
    """Keeps the largest singular values of each kernel (leaf of two or more axes) as a matrix [inputs, outputs].

    By Eckart and Young the nearest kernel of that rank.

    Args:
      params: the copy.
      fraction: part of the singular values to keep, strictly between 0 and 1; at least one is kept.

    Raises:
      ValueError: when the fraction is outside (0, 1).
    """
    _validate.unit_interval("low_rank", "a fraction", fraction, "Half is 0.5.")
    return jax.tree.map(functools.partial(_low_rank_kernel, fraction=fraction), params)


def _low_rank_kernel(leaf: Array, fraction: float) -> Array:
    if leaf.ndim < 2:
        return leaf
    matrix = leaf.astype(jnp.float32).reshape(-1, leaf.shape[-1])
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    rank = max(1, int(fraction * values.size))
    return ((left[:, :rank] * values[None, :rank]) @ right[:rank]).reshape(leaf.shape).astype(leaf.dtype)
