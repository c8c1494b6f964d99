"""The interface of every comparator: words to embed, and a trace from soft chips to accusations."""

import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int8

from smark_jax import _validate
from smark_jax._types import AnyArray


class Accusation(NamedTuple):
    """One accused customer; the attributes are named as in :class:`smark_jax.tracing.Accusation`.

    Attributes:
      serial: the customer's row in :attr:`Comparator.words`.
      statistic: the decoder's statistic for this customer.
      p_value: bound on the probability of so extreme a statistic for any innocent customer, corrected for all N; NaN
        where no bound is known. Never 0: below the smallest float it is that float, and ``log10_p`` goes on.
      log10_p: its logarithm to base 10; NaN where no bound is known.
    """

    serial: int
    statistic: float
    p_value: float
    log10_p: float


class Verdict(NamedTuple):
    """What :meth:`Comparator.trace` found.

    Attributes:
      accused: the accused, most significant first; empty when nobody is.
      alpha: the level asked for; a bound on accusing anybody innocent only where :attr:`Comparator.bounded`.
      num_customers: N, for which every p-value is corrected.
      statistics: the statistic of every customer, shape [N].
      lower: a statistic at or below it accuses; minus infinity for a one-sided rule.
      upper: a statistic at or above it accuses.
      decoder: the comparator's name.
    """

    accused: tuple[Accusation, ...]
    alpha: float
    num_customers: int
    statistics: Float[np.ndarray, " N"]
    lower: float
    upper: float
    decoder: str


class Decision(NamedTuple):
    """What a decoder hands to :meth:`Comparator.trace`.

    Attributes:
      statistics: the statistic of every customer, shape [N].
      lower: a statistic at or below it accuses.
      upper: a statistic at or above it accuses.
      guilty: rows of the accused, shape [G].
      log_p: natural logarithm of their p-values before correction for N, shape [G]; NaN where no bound is known.
    """

    statistics: Float[np.ndarray, " N"]
    lower: float
    upper: float
    guilty: Int[np.ndarray, " G"]
    log_p: Float[np.ndarray, " G"]


class Comparator(NamedTuple):
    """A code with its decoder.

    Attributes:
      name: what a table calls it.
      words: the customers' codewords of -1 and +1, shape [N, m], as :func:`smark_jax.embedding.embed` takes them.
      colluders: size of the coalition it was designed for; None when its construction names none.
      bounded: whether its p-values bound the probability of accusing anybody innocent.
      decide: the decoder: finite chips y, shape [m], and ln(alpha / N) to a :class:`Decision`.
    """

    name: str
    words: Int8[np.ndarray, "N m"]
    colluders: int | None
    bounded: bool
    decide: Callable[[Float[np.ndarray, " m"], float], Decision]

    def trace(self, chips: Float[AnyArray, " m"], alpha: float = 1e-6) -> Verdict:
        """Accuses customers from a suspect's soft chips; their scale does not matter.

        Args:
          chips: the suspect's read-out y, shape [m], as from :func:`smark_jax.extraction.extract`.
          alpha: level, corrected for the N customers. Decoders without one (:func:`bibd`) are not moved by it.

        Returns:
          The verdict. Chips of zero (the base model itself) accuse nobody.

        Raises:
          SmarkError: on chips that are not a finite vector of the code's length, or alpha outside (0, 1).
        """
        who = f"{self.name}: trace"
        num_customers, num_chips = self.words.shape
        _validate.probability(who, "alpha", alpha)
        y = _validate.chips(who, chips)
        _validate.vector(who, "chips", y, num_chips, "Was the carrier drawn with as many chips as comparator.words?")
        log_n = math.log(num_customers)
        decision = self.decide(y, math.log(alpha) - log_n)
        scores = decision.statistics[decision.guilty]
        log_p = np.minimum(0.0, decision.log_p + log_n)  # np.minimum and np.maximum keep NaN
        p_values = np.maximum(np.exp(log_p), sys.float_info.min)
        accused = tuple(
            Accusation(
                serial=int(decision.guilty[i]),
                statistic=float(scores[i]),
                p_value=float(p_values[i]),
                log10_p=float(log_p[i] / math.log(10)),
            )
            for i in np.lexsort((-np.abs(scores), log_p))
        )
        return Verdict(
            accused, float(alpha), num_customers, decision.statistics, decision.lower, decision.upper, self.name
        )
