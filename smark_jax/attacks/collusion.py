r"""Collusion: K leakers merge their copies into one pirate model, weight by weight.

An attack takes ``copies``, a pytree whose leaves are stacked along a leading axis of K colluders (as
:func:`smark_jax.embedding.embed_batch` returns them), and gives one model. Write :math:`x_1, \ldots, x_K` for the K
values of one weight. Every attack is a rule :math:`\hat w = g(x_1, \ldots, x_K)` that is applied to each weight
separately (masking also compares the weights of a leaf), computed in float32 or wider and cast back to the leaf's
dtype. Leaves that are not floating-point (step counters) hold no mark and are taken from the first colluder.

On a dense carrier the attacks differ less than it seems. Colluders see how their copies differ from the mean, but not
how the mean differs from the base. Where marks are dense, the former says next to nothing about the latter. The
differences sum to zero over the colluders. So a rule that treats all colluders alike reads as their mean plus noise,
and a rule that hides some colluders exposes others all the more.

Later steps of a leaker are compositions: ``prune(median(copies), 0.3)``, and likewise with
:func:`~smark_jax.attacks.fine_tune`, :func:`~smark_jax.attacks.quantise` and :func:`~smark_jax.attacks.add_noise`.

References:
  Wu, Trappe, Wang, Liu (2004), Collusion-resistant fingerprinting for multimedia, IEEE Signal Processing Magazine
  21(2). Zhao, Wu, Wang, Liu (2005), Forensic analysis of nonlinear collusion attacks for multimedia fingerprinting,
  IEEE Transactions on Image Processing 14(5): the order-statistics attacks as defined here.
"""

import functools
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from smark_jax import _validate
from smark_jax._types import AnyArray, PyTree

Collusion = Callable[[PyTree, Array], PyTree]
"""``attack(copies, key) -> pirate``: the form of every entry of :data:`COLLUSIONS`."""


def average(copies: PyTree, weights: Float[AnyArray, " K"] | None = None) -> PyTree:
    r"""The mean :math:`\sum_k c_k x_k`, with :math:`c_k = 1/K` unless ``weights`` are given.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...].
      weights: the share c of each colluder, shape [K]; they sum to 1 and may be negative.

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders, there is not one weight per colluder,
        or the weights do not sum to 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> copies = {"kernel": jnp.asarray([[1.0, 2.0], [3.0, 6.0]])}
      >>> average(copies)["kernel"].tolist()
      [2.0, 4.0]
      >>> average(copies, jnp.asarray([0.75, 0.25]))["kernel"].tolist()
      [1.5, 3.0]
    """
    num_colluders = _num_colluders("average", copies)
    if weights is None:
        return _merge(functools.partial(jnp.mean, axis=0), copies)
    _validate.vector("average", "weights", weights, num_colluders, "Each colluder has one share in the mean.")
    if not _validate.is_traced(weights):
        total = float(np.sum(np.asarray(weights, np.float64)))
        if not abs(total - 1) <= 1e-5:
            raise _validate.fail("average", "weights that sum to 1", f"a sum of {total!r}", "Divide them by their sum.")
    return _weighted(copies, jnp.asarray(weights))


def median(copies: PyTree) -> PyTree:
    """The median of the colluders' values; for an even number of colluders, the mean of the two in the middle.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...]. Two colluders get their average.

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders.
    """
    _num_colluders("median", copies)
    return _merge(functools.partial(jnp.median, axis=0), copies)


def minimum(copies: PyTree) -> PyTree:
    r"""The smallest of the colluders' values, :math:`\min_k x_k`.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...].

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders.
    """
    _num_colluders("minimum", copies)
    return _merge(functools.partial(jnp.min, axis=0), copies)


def maximum(copies: PyTree) -> PyTree:
    r"""The largest of the colluders' values, :math:`\max_k x_k`.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...].

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders.
    """
    _num_colluders("maximum", copies)
    return _merge(functools.partial(jnp.max, axis=0), copies)


def min_max(copies: PyTree) -> PyTree:
    r"""The middle of the range, :math:`(\min_k x_k + \max_k x_k) / 2`.

    On a carrier whose weights serve one chip each, it erases every chip in which the colluders differ.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...].

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders.
    """
    _num_colluders("min_max", copies)
    return _merge(lambda x: (x.min(axis=0) + x.max(axis=0)) / 2, copies)


def modified_negative(copies: PyTree) -> PyTree:
    r"""The median mirrored in the range, :math:`\min_k x_k + \max_k x_k - \mathrm{median}_k\, x_k`.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...]. Two colluders get their average.

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders.
    """
    _num_colluders("modified_negative", copies)
    return _merge(lambda x: x.min(axis=0) + x.max(axis=0) - jnp.median(x, axis=0), copies)


def randomised_negative(copies: PyTree, key: Array, probability: float = 0.5) -> PyTree:
    r"""The smallest value with probability p, the largest otherwise, drawn independently for each weight.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...].
      key: a ``jax.random`` key.
      probability: p, strictly between 0 and 1.

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders, or the probability is outside (0, 1).
    """
    _num_colluders("randomised_negative", copies)
    _validate.unit_interval("randomised_negative", "probability", probability, "For 1 and 0, use minimum and maximum.")
    return _merge(functools.partial(_random_extreme, probability=probability), copies, key)


def interleave(copies: PyTree, key: Array) -> PyTree:
    """The value of a uniformly random colluder, drawn independently for each weight.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...].
      key: a ``jax.random`` key.

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders.
    """
    num_colluders = _num_colluders("interleave", copies)

    def rule(x: Array, key: Array) -> Array:
        owner = jax.random.randint(key, (1, *x.shape[1:]), 0, num_colluders)
        return jnp.take_along_axis(x, owner, axis=0)[0]

    return _merge(rule, copies, key)


def extrapolate(copies: PyTree, magnitude: float = 0.9) -> PyTree:
    r"""The first colluder enters negatively, :math:`-M x_1 + \frac{1 + M}{K - 1} \sum_{k \ge 2} x_k`.

    The others step away from the first. The first colluder's correlation turns negative, which a one-sided score takes
    for innocence; a two-sided score detects this colluder better than in an average as soon as M > 1 / (K - 2). Values
    leave the colluders' range: the pirate is about :math:`\sqrt{M^2 + (1 + M)^2 / (K - 1)}` times as far from the base
    as one copy. At the default of 0.9 that is 2.1 for two colluders, 1.1 for ten and 1 for twenty. This costs the
    pirate little accuracy, while the first colluder's part is nearly that of a whole copy with the sign reversed.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...]; the first enters negatively.
      magnitude: M, positive and finite.

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders, or M is not positive and finite.
    """
    num_colluders = _num_colluders("extrapolate", copies)
    _validate.finite_number("extrapolate", "magnitude", magnitude)
    weights = jnp.full(num_colluders, (1 + magnitude) / (num_colluders - 1)).at[0].set(-magnitude)
    return _weighted(copies, weights)


def largest_difference(copies: PyTree, key: Array, fraction: float = 0.5) -> PyTree:
    r"""Masks the weights in which the copies differ most, and averages the others.

    In each leaf, the given fraction of weights with the largest :math:`\max_k x_k - \min_k x_k` gets one of the two
    extremes at random, as by :func:`randomised_negative` at p = 1/2.

    Why extremes? Of all values within the colluders' range, a random extreme leaves the most noise around the middle of
    that range, and starting with the weights of largest range leaves the most noise per changed weight. Filling in the
    average would change nothing, interleaved values leave less noise, and one colluder's values expose that colluder
    even more. On a carrier whose weights serve one chip each, the extremes cancel over a chip in which the colluders
    differ, as the middles of :func:`min_max` do, up to that noise.

    Args:
      copies: the colluders' models, each leaf of shape [K, ...].
      key: a ``jax.random`` key.
      fraction: part of each leaf's weights to mask, strictly between 0 and 1. Weights that tie are masked together.

    Returns:
      The pirate model, each leaf of shape [...].

    Raises:
      SmarkError: when the leaves share no leading axis of at least two colluders, or the fraction is outside (0, 1).
    """
    _num_colluders("largest_difference", copies)
    _validate.unit_interval("largest_difference", "fraction", fraction, "1 is randomised_negative; 0 is average.")

    def rule(x: Array, key: Array) -> Array:
        difference = x.max(axis=0) - x.min(axis=0)
        masked = difference >= jnp.quantile(difference, 1 - fraction)
        return jnp.where(masked, _random_extreme(x, key, 0.5), x.mean(axis=0))

    return _merge(rule, copies, key)


def _num_colluders(who: str, copies: PyTree) -> int:
    num_colluders = _validate.stacked(who, "copies", copies)
    if num_colluders < 2:
        raise _validate.fail(who, "copies of at least two colluders", "one copy", "For one copy, see attacks.removal.")
    return num_colluders


def _merge(rule: Callable[..., Array], copies: PyTree, *keys: Array) -> PyTree:
    """Applies ``rule(x [K, ...]) -> [...]`` to each leaf; with a key, ``rule(x, key)`` with a key for each leaf."""

    def merge_leaf(leaf: AnyArray, *leaf_keys: Array) -> Array:
        x = jnp.asarray(leaf)
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.size == 0:
            return x[0]
        return rule(x.astype(jnp.promote_types(x.dtype, jnp.float32)), *leaf_keys).astype(x.dtype)

    return jax.tree.map(merge_leaf, copies, *(optax.tree.split_key_like(key, copies) for key in keys))


def _weighted(copies: PyTree, weights: Array) -> PyTree:
    # A product and a sum, not a matmul: the matmul precision of accelerators would drown the mark.
    return _merge(lambda x: (x * weights.astype(x.dtype).reshape(-1, *(1,) * (x.ndim - 1))).sum(axis=0), copies)


def _random_extreme(x: Array, key: Array, probability: float) -> Array:
    return jnp.where(jax.random.bernoulli(key, probability, x.shape[1:]), x.min(axis=0), x.max(axis=0))


def _keyless(attack: Callable[[PyTree], PyTree]) -> Collusion:
    return lambda copies, key: attack(copies)


_DETERMINISTIC = (average, median, minimum, maximum, min_max, modified_negative, extrapolate)
_RANDOM = (randomised_negative, interleave, largest_difference)
COLLUSIONS: Mapping[str, Collusion] = types.MappingProxyType(
    {attack.__name__: _keyless(attack) for attack in _DETERMINISTIC} | {attack.__name__: attack for attack in _RANDOM}
)
"""Every attack by name at its default settings, as ``attack(copies, key)``; the deterministic ones ignore the key."""
