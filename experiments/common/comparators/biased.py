r"""Codes whose chips have secret biases: symmetric Tardos, and Nuida's discrete biases.

Chip i of every word is +1 with probability p_i, drawn once for the code. Biases and words come from ChaCha20 streams
derived from the code key. Words are compared with p_i rounded to multiples of 2^-32, and the rounded p_i is the one
that scores and bounds use, so that the null distribution is exact.

Scores. The published symmetric score (hard bits, y in {-1, +1}) adds y_i (x_i - p_i)/sqrt(p_i q_i) at each chip, where
x is the bit: mean 0 and variance 1 for an innocent. Here y is soft, and is centred first (:func:`centre`). Accusation
is two-sided with the bound of :mod:`experiments.common.comparators.chernoff`, Bonferroni-corrected for N customers.

Formal guarantee. Given p, an innocent's word is independent of y (assumptions A1 to A3 of :mod:`smark_jax.tracing`),
and so of every function of y and p, including the centred read-out. The bound holds for each such function, and hence
for any attack, even by colluders who know p.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from experiments.common.comparators import chernoff
from experiments.common.comparators.interface import Comparator, Decision
from smark_jax import _validate, chacha, keys, statistics
from smark_jax._types import AnyArray

_BYTES_PER_PASS = 1 << 24


def tardos(key: keys.SecretKey, num_customers: int, num_chips: int, colluders: int) -> Comparator:
    r"""The symmetric Tardos code for c colluders: arcsine biases with a cut-off.

    .. math:: p = \sin^2 r, \quad r \text{ uniform on } [t', \pi/2 - t'], \quad \sin^2 t' = \frac{1}{300 c}.

    The cut-off is Tardos' own. The length that the papers prescribe is for the marking assumption, which a mean of
    weights does not follow, so ``num_chips`` is the caller's.

    Args:
      key: the code key.
      num_customers: N.
      num_chips: m.
      colluders: c.

    Returns:
      The comparator, bounded.

    Raises:
      SmarkError: when a count is not a whole number of at least one.

    References:
      Tardos: Optimal probabilistic fingerprint codes. Journal of the ACM 55(2), 2008.
      Skoric, Katzenbeisser, Celik: Symmetric Tardos fingerprinting codes for arbitrary alphabet sizes. Designs, Codes
      and Cryptography 46(2), 2008.

    Examples:
      >>> from experiments.common import comparators
      >>> from smark_jax import keys
      >>> code = comparators.tardos(keys.from_bytes(bytes(32)), 1000, 304, colluders=5)
      >>> [accusation.serial for accusation in code.trace(code.words[42]).accused]
      [42]
    """
    _check("tardos", num_customers, num_chips, colluders)
    start = math.asin(math.sqrt(1 / (300 * colluders)))
    biases = np.sin(start + _uniform(key, "tardos", num_chips) * (math.pi / 2 - 2 * start)) ** 2
    return _comparator(key, "tardos", biases, num_customers, colluders)


def nuida(key: keys.SecretKey, num_customers: int, num_chips: int, colluders: int) -> Comparator:
    """The code with Nuida's discrete biases for c colluders (:func:`nuida_distribution`), symmetric score.

    Args:
      key: the code key.
      num_customers: N.
      num_chips: m.
      colluders: c. For c = 1 and 2 all biases are 1/2: our own code.

    Returns:
      The comparator, bounded.

    Raises:
      SmarkError: when a count is not a whole number of at least one.

    Examples:
      >>> from experiments.common import comparators
      >>> from smark_jax import keys
      >>> code = comparators.nuida(keys.from_bytes(bytes(32)), 1000, 304, colluders=4)
      >>> [accusation.serial for accusation in code.trace(code.words[42]).accused]
      [42]
    """
    _check("nuida", num_customers, num_chips, colluders)
    values, weights = nuida_distribution(colluders)
    drawn = np.searchsorted(np.cumsum(weights), _uniform(key, "nuida", num_chips), side="right")
    return _comparator(key, "nuida", values[np.minimum(drawn, values.size - 1)], num_customers, colluders)


def nuida_distribution(colluders: int) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    r"""The biases and their probabilities that Nuida et al. found best for c colluders.

    .. math:: p_i = (1 + x_i)/2, \qquad w_i \propto (1 - x_i^2)^{-3/2} P_t'(x_i)^{-2}, \qquad t = \lceil c/2 \rceil,

    with x_i the roots of the Legendre polynomial P_t. (Gauss' own weights are 2 (1 - x_i^2)^{-1} P_t'(x_i)^{-2}.)

    Args:
      colluders: c.

    Returns:
      Biases in rising order and their probabilities, shapes [t].

    Raises:
      SmarkError: when ``colluders`` is not a whole number of at least one.

    References:
      Nuida et al.: An improvement of discrete Tardos fingerprinting codes. Designs, Codes and Cryptography 52(3), 2009.

    Examples:
      >>> from experiments.common import comparators
      >>> comparators.nuida_distribution(4)[0].round(5).tolist()
      [0.21132, 0.78868]
    """
    _validate.positive("nuida_distribution", "colluders", colluders)
    roots, gauss = np.polynomial.legendre.leggauss((colluders + 1) // 2)
    weights = gauss / np.sqrt(1 - roots**2)
    return (1 + roots) / 2, weights / weights.sum()


def centre(chips: Float[AnyArray, " m"], biases: Float[AnyArray, " m"]) -> Float[np.ndarray, " m"]:
    r"""The read-out without what all words have in common: y - a (2p - 1).

    .. math:: a = \langle y, 2p - 1 \rangle / |2p - 1|^2

    Biased words have mean 2p - 1, and so has any mixture of them with weights that sum to one, times the amplitude;
    this part of y tells nobody apart but adds to the variance of every score. Least squares finds the amplitude from y
    and p alone, never from a word, so that the bound on false accusations stands.

    Args:
      chips: y, shape [m].
      biases: p, shape [m].

    Returns:
      The centred read-out, shape [m]; y itself where all biases are 1/2.

    Raises:
      SmarkError: when chips are not a finite vector, or biases have another shape.
    """
    y, mean = _validate.chips("centre", chips), 2 * np.asarray(biases, np.float64) - 1
    _validate.vector("centre", "biases", mean, y.size, "One bias for each chip of the code.")
    square = mean @ mean
    return y - (y @ mean / square) * mean if square > 0 else y


def _check(who: str, num_customers: int, num_chips: int, colluders: int) -> None:
    for name, value in (("num_customers", num_customers), ("num_chips", num_chips), ("colluders", colluders)):
        _validate.positive(who, name, value)
    if num_customers > 2**31:
        cause = "Comparators hold their words: take a smaller table."
        raise _validate.fail(who, "at most 2^31 customers", f"{num_customers:,}", cause)


def _uniform(key: keys.SecretKey, name: str, count: int) -> np.ndarray:
    """Keyed numbers in [0, 1) of 53 bits."""
    bias_key = keys.derive(key, "comparator", name, "biases")
    stream = np.asarray(chacha.keystream(bias_key.to_words(), np.zeros(3, np.uint32), 2 * count), np.uint64)
    return ((stream[::2] << np.uint64(21)) ^ (stream[1::2] >> np.uint64(11))).astype(np.float64) * 2.0**-53


def _comparator(key: keys.SecretKey, name: str, biases: np.ndarray, num_customers: int, colluders: int) -> Comparator:
    cuts = np.clip(np.rint(biases * 2.0**32), 1, 2**32 - 1).astype(np.uint32)
    words = _draw(keys.derive(key, "comparator", name, "words"), cuts, num_customers)
    decide = functools.partial(_score, words, cuts.astype(np.float64) * 2.0**-32)
    return Comparator(f"{name} c={colluders}", words, colluders, True, decide)


def _draw(key: keys.SecretKey, cuts: np.ndarray, num_customers: int) -> np.ndarray:
    """Words of -1 and +1, shape [N, m], the same for a serial whatever N is."""
    rows = min(num_customers, max(1, _BYTES_PER_PASS // (4 * cuts.size)))
    words = np.empty((num_customers, cuts.size), np.int8)
    for first in range(0, num_customers, rows):
        serials = jnp.arange(rows, dtype=jnp.uint32) + jnp.uint32(first)
        words[first : first + rows] = _biased_words(key.to_words(), cuts, serials)[: num_customers - first]
    return words


@jax.jit
def _biased_words(key: Array, cuts: Array, serials: Array) -> Array:
    count, num_chips = serials.shape[0], cuts.shape[0]
    blocks_per_word = -(-num_chips // chacha.BLOCK_WORDS)
    zeros = jnp.zeros_like(serials)
    nonces = jnp.repeat(jnp.stack([zeros, serials, zeros]), blocks_per_word, axis=1)
    counters = jnp.tile(jnp.arange(blocks_per_word, dtype=jnp.uint32), count)
    stream = chacha.blocks(key, counters, nonces).reshape(count, -1)[:, :num_chips]
    return 2 * (stream < cuts[None, :]).astype(jnp.int8) - 1


def _score(words: np.ndarray, biases: np.ndarray, y: np.ndarray, log_level: float) -> Decision:
    centred = centre(statistics.direction(y), biases)
    half = statistics.direction(centred) / (2 * np.sqrt(biases * (1 - biases)))  # x - p = (word - (2p - 1)) / 2
    rows = max(1, _BYTES_PER_PASS // (8 * biases.size))
    scores = np.concatenate(
        [words[first : first + rows].astype(np.float64) @ half for first in range(0, len(words), rows)]
    )
    scores -= (2 * biases - 1) @ half
    lower, upper = chernoff.thresholds(centred, biases, log_level)
    close = np.flatnonzero((scores >= upper - 1e-9) | (scores <= lower + 1e-9))
    log_p = chernoff.log_p_value(scores[close], centred, biases)
    guilty = log_p <= log_level
    return Decision(scores, lower, upper, close[guilty], log_p[guilty])
