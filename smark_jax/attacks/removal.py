"""Attacks that try to remove the fingerprint from one copy without data."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from smark_jax import _trees, _validate, carriers, codes, embedding, keys
from smark_jax._types import PyTree


def prune(params: PyTree, fraction: float) -> PyTree:
    """Sets the smallest weights of each kernel (leaf of two or more axes) to zero: magnitude pruning, layer by layer.

    Args:
      params: the copy.
      fraction: part of each kernel's weights to remove, strictly between 0 and 1.

    Raises:
      SmarkError: when the fraction is outside (0, 1).
    """
    _validate.unit_interval("prune", "a fraction", fraction, "50 % is 0.5.")
    return _map_kernels(functools.partial(_prune_kernel, fraction=fraction), params)


def _map_kernels(change: Callable[..., Array], params: PyTree, *others: PyTree, axes: int = 2) -> PyTree:
    """Applies ``change`` to every leaf of at least ``axes`` axes; the others, and empty ones, stay as they are."""
    large = lambda leaf: leaf.ndim >= axes and leaf.size > 0  # noqa: E731
    return jax.tree.map(lambda leaf, *rest: change(leaf, *rest) if large(leaf) else leaf, params, *others)


@jax.jit
def _prune_kernel(leaf: Array, fraction: Array | float) -> Array:
    bar = jnp.quantile(jnp.abs(leaf).astype(jnp.float32).reshape(-1), fraction)
    return jnp.where(jnp.abs(leaf) < bar, 0, leaf).astype(leaf.dtype)


def quantise(params: PyTree, bits: int) -> PyTree:
    """Rounds each kernel (leaf of two or more axes) to 2^bits - 1 evenly spaced levels between -max and max.

    Args:
      params: the copy.
      bits: 2 to 16.

    Raises:
      SmarkError: when bits are outside 2 to 16.
    """
    if bits not in range(2, 17):
        raise _validate.fail("quantise", "bits from 2 to 16", repr(bits), "Common choices are 8 and 4.")
    return _map_kernels(functools.partial(_quantise_kernel, levels=2 ** (bits - 1) - 1), params)


@jax.jit
def _quantise_kernel(leaf: Array, levels: Array | int) -> Array:
    step = jnp.maximum(jnp.abs(leaf).max().astype(jnp.float32), 1e-30) / levels
    return (jnp.round(leaf.astype(jnp.float32) / step) * step).astype(leaf.dtype)


def add_noise(params: PyTree, key: Array, relative: float, match: str = "") -> PyTree:
    """Adds Gaussian noise to every floating-point leaf, or to some, in units of that leaf's RMS.

    Args:
      params: the copy.
      key: a ``jax.random`` key.
      relative: the noise's standard deviation as a multiple of the leaf's RMS, the unit in which
        :func:`smark_jax.embedding.embed` measures its strength.
      match: a regular expression searched in leaves' paths; the leaves that it is not found in stay as they are.

    Raises:
      SmarkError: when ``relative`` is not positive and finite, or ``match`` is found in no path.
    """
    _validate.finite_number("add_noise", "the noise relative to the RMS", relative)
    chosen = _trees.matching("add_noise", params, match)
    noisy = lambda leaf, moved: moved and jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(
        lambda leaf, key, moved: _add_noise_to_leaf(leaf, key, relative) if noisy(leaf, moved) else leaf,
        params,
        optax.tree.split_key_like(key, params),
        chosen,
    )


@jax.jit
def _add_noise_to_leaf(leaf: Array, key: Array, relative: Array | float) -> Array:
    wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    spread = jnp.sqrt(jnp.mean(jnp.square(wide)))
    return (wide + relative * spread * jax.random.normal(key, leaf.shape, wide.dtype)).astype(leaf.dtype)


def prune_filters(params: PyTree, fraction: float) -> PyTree:
    """Sets the output channels with the smallest L1 norm of every convolution (leaf of three or more axes) to zero.

    Li, Kadav, Durdanovic, Samet, Graf, "Pruning filters for efficient ConvNets", ICLR 2017, without the fine-tuning
    that may follow. Dense layers are left alone, including the one that computes the logits.

    Args:
      params: the copy.
      fraction: part of each convolution's output channels (its last axis) to remove, strictly between 0 and 1; rounded
        down to whole channels.

    Raises:
      SmarkError: when the fraction is outside (0, 1).
    """
    _validate.unit_interval("prune_filters", "a fraction", fraction, "50 % is 0.5.")
    return _map_kernels(functools.partial(_prune_filters_of_kernel, fraction=fraction), params, axes=3)


def _prune_filters_of_kernel(leaf: Array, fraction: float) -> Array:
    norms = jnp.abs(leaf).astype(jnp.float32).sum(axis=tuple(range(leaf.ndim - 1)))
    return leaf.at[..., jnp.argsort(norms)[: int(fraction * norms.size)]].set(0)


def cast(params: PyTree, dtype: Any) -> PyTree:
    """Rounds every floating-point leaf to a narrower type and returns it in its own type.

    Args:
      params: the copy.
      dtype: a floating-point type, such as ``jax.numpy.bfloat16`` or ``"float16"``.

    Raises:
      SmarkError: when ``dtype`` is not a floating-point type.
    """
    try:
        fits = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except (TypeError, ValueError, SyntaxError):
        fits = False
    if not fits:
        cause = "Take bfloat16 or float16, say; for whole numbers, use quantise."
        desk = "Take bfloat16 or float16, say; for whole numbers, use --quantise."
        raise _validate.fail("cast", "a floating-point dtype", f"{dtype!r:.60}", cause, desk=desk)
    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.astype(dtype).astype(leaf.dtype) if floating(leaf) else leaf, params)


def low_rank(params: PyTree, fraction: float) -> PyTree:
    """Keeps the largest singular values of each kernel (leaf of two or more axes) as a matrix [inputs, outputs].

    By the Eckart-Young theorem, the result is the nearest kernel of that rank.

    Args:
      params: the copy.
      fraction: part of the singular values to keep, strictly between 0 and 1; at least one is kept.

    Raises:
      SmarkError: when the fraction is outside (0, 1).
    """
    _validate.unit_interval("low_rank", "a fraction", fraction, "Half is 0.5.")
    return _map_kernels(functools.partial(_low_rank_kernel, fraction=fraction), params)


def _low_rank_kernel(leaf: Array, fraction: float) -> Array:
    matrix = leaf.astype(jnp.float32).reshape(-1, leaf.shape[-1])
    left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    rank = max(1, int(fraction * values.size))
    return ((left[:, :rank] * values[None, :rank]) @ right[:rank]).reshape(leaf.shape).astype(leaf.dtype)


def shift_weights(params: PyTree, key: Array, mean: float = 1.5, noise: float = 1.0) -> PyTree:
    r"""Weight shifting: moves every kernel (leaf of two or more axes) away from its filters' mean, and adds noise.

    :math:`W \leftarrow W - \text{mean} \cdot \bar W - \text{noise} \cdot \mathcal N(0, \sigma_W^2)`

    with :math:`\bar W` the mean over output channels (the last axis) and :math:`\sigma_W` the kernel's standard
    deviation: Lukas, Jiang, Li, Kerschbaum, "SoK: How robust is image classification deep neural network
    watermarking?", IEEE S&P 2022, whose factors are the defaults.
    The network is useless until it is fine-tuned.

    Args:
      params: the copy.
      key: a ``jax.random`` key.
      mean: factor of the filters' mean, at least 0.
      noise: factor of the noise, at least 0.

    Raises:
      SmarkError: when a factor is negative or not finite.
    """
    for name, value in (("mean", mean), ("noise", noise)):
        if not 0 <= value < float("inf"):
            raise _validate.fail("shift_weights", f"{name} to be finite and at least 0", repr(value), "Try 1.5 and 1.")
    shift = functools.partial(_shift_kernel, mean=mean, noise=noise)
    return _map_kernels(shift, params, optax.tree.split_key_like(key, params))


def _shift_kernel(leaf: Array, key: Array, mean: float, noise: float) -> Array:
    wide = leaf.astype(jnp.float32)
    random = noise * wide.std() * jax.random.normal(key, leaf.shape, jnp.float32)
    return (wide - mean * wide.mean(axis=-1, keepdims=True) - random).astype(leaf.dtype)


def overwrite(
    params: PyTree, key: keys.SecretKey, *, times: int = 1, strength: float = 0.03, num_chips: int = 304
) -> PyTree:
    """Overwriting: embeds fingerprints of the leaker's own by the same method.

    Each fingerprint has a new carrier and codeword, drawn by a leaker who knows this library but not the owner's key.

    Args:
      params: the copy.
      key: the leaker's key.
      times: number of fingerprints.
      strength: of each, as in :func:`smark_jax.embedding.embed`.
      num_chips: length of each.

    Raises:
      SmarkError: when ``times`` is not at least 1, or as ``embed``.
    """
    _validate.positive("overwrite", "times", times)
    spec = carriers.select(params)  # once: its scales are the copy's
    for number in range(times):
        mark = carriers.Mark(spec, carriers.draw(keys.derive(key, "carrier", str(number)), spec, num_chips))
        word = codes.codebook(keys.derive(key, "code"), [number], num_chips)[0]
        params = embedding.embed(params, mark, word, strength)
    return params
