r"""From soft chips to accusations: which customers' codewords does a suspect carry, and how sure is that.

Formal guarantee. Whatever the attackers did, the probability that :func:`trace` accuses any innocent customer is at
most alpha (plus the advantage of telling ChaCha20 from random bits), provided that

- A1: codewords are independent fair signs, never filtered or redrawn (:mod:`smark_jax.codes`);
- A2: the read-out depends on the codebook only through the guilty customers' words: innocents' words stay secret, and
  carrier, alignment and choice of layers never depend on them;
- A3: decoder and alpha were fixed before looking.

It does not cover an insider who holds the code key, nor an owner who frames a customer on purpose.
"""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from smark_jax import _validate, codes, statistics
from smark_jax._types import AnyArray

# Codewords are made and scored this many at a time: some 10 MB at 304 chips.
_ROWS_A_PASS = 8192


class Accusation(NamedTuple):
    """One accused customer.

    Attributes:
      serial: the customer's number in the owner's registry.
      statistic: T, signed: about sqrt(m) for an intact copy; negative when colluders extrapolated away from it.
      p_value: bound on the probability of so large an absolute T for any innocent customer, corrected for all N
        customers. Never 0: below the smallest float it is that float, and ``log10_p`` goes on.
      log10_p: its logarithm to base 10, exact at any size.
      share: this customer's part in the coalition as estimated from the accused, 0 to 1.
    """

    serial: int
    statistic: float
    p_value: float
    log10_p: float
    share: float


class Verdict(NamedTuple):
    """What :func:`trace` found.

    Attributes:
      accused: the accused, most significant first; empty when nobody is.
      alpha: bound on the probability of accusing any innocent customer.
      num_customers: N, for which every p-value is corrected.
      statistics: T of every customer in the order of the codebook, shape [N].
      threshold: the absolute T from which a customer is accused.
      decoder: the decoder's name.
    """

    accused: tuple[Accusation, ...]
    alpha: float
    num_customers: int
    statistics: Float[np.ndarray, " N"]
    threshold: float
    decoder: str


def trace(
    chips: Float[AnyArray, " m"],
    codebook: Int8[AnyArray, "K m"] | codes.Codebook,
    alpha: float = 1e-6,
    decoder: Literal["single"] = "single",
    *,
    serials: Sequence[int] | None = None,
) -> Verdict:
    """Accuses the customers whose codewords the chips carry; any innocent one with probability at most alpha.

    The single decoder tests each customer alone: T_j = <y, b_j> / norm(y), accused when N p(T_j) <= alpha with the
    two-sided p-value T1+ of :mod:`smark_jax.statistics` (Bonferroni over the N customers).

    Args:
      chips: the suspect's read-out y, shape [m], as from :func:`smark_jax.extraction.extract`.
      codebook: every customer who might be accused: words of -1 and +1, shape [K, m], or a streamed
        :class:`~smark_jax.codes.Codebook`. Leaving customers out, or trying several codebooks, breaks the guarantee.
      alpha: bound on the probability of accusing anybody innocent.
      decoder: ``"single"``.
      serials: the customers' serials in the order of the rows; by default the row numbers.

    Returns:
      The verdict. Chips of zero (the base model itself) accuse nobody.

    Raises:
      ValueError: on chips that are not a finite vector, a codebook of another length or with entries other than -1 and
        +1, no customers, serials that do not match, or alpha outside (0, 1).

    Examples:
      >>> from smark_jax import codes, keys, tracing
      >>> words = codes.codebook(keys.from_bytes(bytes(32)), range(1000))
      >>> [accusation.serial for accusation in tracing.trace(0.3 * words[42], words).accused]
      [42]
    """
    _validate.probability("trace", "alpha", alpha)
    if decoder != "single":
        raise _validate.fail("trace", "decoder 'single'", repr(decoder), "Is the name spelt right?")
    y = _validate.chips("trace", chips)
    num_customers, num_chips = _size(codebook)
    cause = "Was the codebook made with another num_chips than the carrier?"
    _validate.vector("trace", "chips", y, num_chips, cause)
    if serials is None:
        numbers = np.arange(num_customers)
    else:
        numbers = _validate.serials("trace", serials)
        _validate.vector("trace", "serials", numbers, num_customers, "One serial for each row of the codebook.")

    u = statistics.direction(y)
    scores = np.asarray(_scores(u, codebook), np.float64)
    log_level = math.log(alpha) - math.log(num_customers)
    bar = statistics.threshold(y, log_level)
    # Scores were summed in float32; those near the bar or above it are summed again in float64 before they count.
    close = np.flatnonzero(np.abs(scores) >= bar - 1e-3)
    scores[close] = _rows(codebook, close).astype(np.float64) @ u
    log_p = statistics.log_p_value(scores[close], y)
    guilty = close[log_p <= log_level]
    log_p = np.minimum(0.0, log_p[log_p <= log_level] + math.log(num_customers))
    total = np.abs(scores[guilty]).sum()
    order = np.argsort(-np.abs(scores[guilty]), kind="stable")
    accused = tuple(
        Accusation(
            serial=int(numbers[guilty[i]]),
            statistic=float(scores[guilty[i]]),
            p_value=max(math.exp(log_p[i]), sys.float_info.min),
            log10_p=float(log_p[i] / math.log(10)),
            share=float(abs(scores[guilty[i]]) / total),
        )
        for i in order
    )
    return Verdict(accused, float(alpha), num_customers, scores, bar, decoder)


def _size(codebook: AnyArray | codes.Codebook) -> tuple[int, int]:
    if isinstance(codebook, codes.Codebook):
        return codebook.num_customers, codebook.num_chips
    shape = np.shape(codebook)
    if len(shape) != 2 or shape[0] == 0:
        cause = "Pass the words of all customers, from codes.codebook or codes.Codebook."
        raise _validate.fail("trace", "a codebook of shape [K, m] with K >= 1", f"shape {shape}", cause)
    if not bool(_all_signs(jnp.asarray(codebook))):
        cause = "Bits 0 and 1 become chips by 1 - 2 * bits."
        raise _validate.fail("trace", "codewords of -1 and +1", "other entries", cause)
    return shape[0], shape[1]


@jax.jit
def _all_signs(codebook: Array) -> Array:
    return jnp.all(jnp.abs(codebook) == 1)


def _rows(codebook: AnyArray | codes.Codebook, index: np.ndarray) -> np.ndarray:
    if index.size == 0:
        return np.empty((0, _size(codebook)[1]), np.int8)
    if isinstance(codebook, codes.Codebook):
        return np.asarray(codes.codebook(codebook.key, jnp.asarray(index), codebook.num_chips))
    return np.asarray(codebook)[index]


def _scores(u: np.ndarray, codebook: AnyArray | codes.Codebook) -> Float[Array, " N"]:
    """<u, b_j> of every customer in float32."""
    unit = jnp.asarray(u, jnp.float32)
    if isinstance(codebook, codes.Codebook):
        return _stream_scores(unit, jnp.asarray(codebook.key.to_words()), codebook.num_customers)
    return _held_scores(unit, jnp.asarray(codebook, jnp.int8))


@jax.jit
def _held_scores(unit: Array, codebook: Array) -> Array:
    return jax.lax.map(lambda word: _dot(word, unit), codebook, batch_size=_ROWS_A_PASS)


@functools.partial(jax.jit, static_argnames="num_customers")
def _stream_scores(unit: Array, key: Array, num_customers: int) -> Array:
    def score(first: Array) -> Array:
        serials = first + jnp.arange(_ROWS_A_PASS, dtype=jnp.uint32)
        return _dot(codes.words(key, serials, jnp.zeros_like(serials), unit.shape[0]), unit)

    firsts = jnp.arange(0, num_customers, _ROWS_A_PASS, dtype=jnp.uint32)
    return jax.lax.map(score, firsts).reshape(-1)[:num_customers]


def _dot(words: Array, unit: Array) -> Array:
    return jnp.matmul(words.astype(jnp.float32), unit, precision=jax.lax.Precision.HIGHEST)
