"""Attempts to remove the fingerprint from one copy."""

import functools
from collections.abc import Callable

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
    if not 0 < fraction < 1:
        raise _validate.fail("prune", "a fraction strictly between 0 and 1", repr(fraction), "50 % is 0.5.")
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
