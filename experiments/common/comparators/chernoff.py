r"""The tail of a biased word's score, bounded for every read-out.

Bit x_i is 1 with probability p_i, independently; q_i = 1 - p_i. For a direction u = y/\|y\| the score is

.. math:: T = \sum_i u_i \frac{x_i - p_i}{\sqrt{p_i q_i}},

with mean 0 and variance 1 when x is independent of y, as for an innocent. With up_i = u_i sqrt(q_i/p_i), dn_i = -u_i
sqrt(p_i/q_i) and psi(l) = sum_i ln(p_i e^{l up_i} + q_i e^{l dn_i}), Chernoff's bound for t > 0 is

.. math:: \ln P(T \ge t) \le \inf_{l \ge 0} \psi(l) - l t, \qquad \psi'(l) = t \text{ at the infimum},

whose value there is minus the sum of the divergences KL(pi_i || p_i), where pi_i is the tilted probability:
logit(pi_i) = logit(p_i) + l u_i / sqrt(p_i q_i). That form neither overflows nor cancels. The other tail is the same
with u replaced by -u. Testing both tails costs a factor of 2: p = 2 exp(bound of the tail in which T lies).

A normal tail would not be a bound: rare bits with small p_i carry large scores (see the negative control in the
tests).
"""

import math

import numpy as np
from jaxtyping import Float
from scipy import special

from smark_jax import _validate, statistics
from smark_jax._types import AnyArray

_LOG_TWO = math.log(2)
# Rounding errors of a score must not count against the accused.
_ROUNDING = 1e-12
_NEGLIGIBLE = 1e-100
_CANDIDATES_PER_PASS = 256
_BISECTIONS = 90


def log_p_value(
    statistic: float | AnyArray, chips: Float[AnyArray, " m"], biases: Float[AnyArray, " m"]
) -> Float[np.ndarray, "..."]:
    """Natural logarithm of the two-sided Chernoff bound at each T, before correction for the number of customers.

    Args:
      statistic: T of each customer, shape [K] (or a single number).
      chips: the read-out y (centred if the decoder centres it), shape [m].
      biases: p, the probability of +1 at each chip, shape [m].

    Returns:
      ln p of the same shape, at most 0. Any l gives a valid bound, so an early stop costs power, never validity.

    Raises:
      SmarkError: when chips are not a finite vector, or the biases not as many numbers strictly between 0 and 1.

    Examples:
      >>> import numpy as np
      >>> t = np.sqrt(99 * 4)  # four bits of probability 0.01 that are all 1: 2 * 0.01^4
      >>> float(round(log_p_value(t, np.ones(4), np.full(4, 0.01)) / np.log(10), 2))
      -7.7
    """
    u, p = _checked("log_p_value", chips, biases)
    t = np.asarray(statistic, np.float64)
    flat = t.reshape(-1)
    log_p = np.zeros(flat.shape)
    for sign in (1.0, -1.0):
        side = np.flatnonzero(sign * flat > 0)
        for start in range(0, side.size, _CANDIDATES_PER_PASS):
            rows = side[start : start + _CANDIDATES_PER_PASS]
            log_p[rows] = np.minimum(0.0, _LOG_TWO + _log_tail(sign * flat[rows], sign * u, p))
    return log_p.reshape(t.shape)


def thresholds(chips: Float[AnyArray, " m"], biases: Float[AnyArray, " m"], log_alpha: float) -> tuple[float, float]:
    """The T at or below which, and the T at or above which, the two-sided p-value is at most exp(``log_alpha``).

    Args:
      chips: the read-out y, shape [m].
      biases: p, shape [m].
      log_alpha: natural logarithm of the level of a single customer (alpha / N for N customers).

    Returns:
      Lower and upper threshold; infinite on a side where even the most extreme word is not significant.

    Raises:
      SmarkError: as :func:`log_p_value`.
    """
    u, p = _checked("thresholds", chips, biases)
    return -_threshold(-u, p, log_alpha - _LOG_TWO), _threshold(u, p, log_alpha - _LOG_TWO)


def _checked(who: str, chips: AnyArray, biases: AnyArray) -> tuple[np.ndarray, np.ndarray]:
    u, p = statistics.direction(chips), np.asarray(biases, np.float64)
    _validate.vector(who, "biases", p, u.size, "One bias for each chip of the code.")
    if not bool(((p > 0) & (p < 1)).all()):
        cause = "A chip that is the same in all words tells nobody apart."
        raise _validate.fail(who, "biases strictly between 0 and 1", f"{p.min()} to {p.max()}", cause)
    return u, p


def _tilt(tilt: np.ndarray, u: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """psi'(l), and psi(l) - l psi'(l), the negative divergence, for each l: shapes [K]."""
    weight = u / np.sqrt(p * (1 - p))
    logit = special.logit(p) + tilt[:, None] * weight
    up, down = special.expit(logit), special.expit(-logit)
    slope = (up - p) @ weight
    return slope, -(special.rel_entr(up, p) + special.rel_entr(down, 1 - p)).sum(axis=1)


def _log_tail(t: np.ndarray, u: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Logarithm of the bound on P(T >= t) for each t > 0: bisection for psi'(l) = t, from below."""
    weight = u / np.sqrt(p * (1 - p))
    largest = float(np.where(weight > 0, weight * (1 - p), -weight * p).sum())
    if largest == 0:
        return np.zeros(t.shape)
    t = np.minimum(t, largest) * (1 - _ROUNDING)
    low, high = np.zeros(t.shape), np.ones(t.shape)
    for _ in range(_BISECTIONS):
        short = _tilt(high, u, p)[0] < t
        if not short.any():
            break
        low, high = np.where(short, high, low), np.where(short, 2 * high, high)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = _tilt(middle, u, p)[0] < t
        low, high = np.where(below, middle, low), np.where(below, high, middle)
        if (high - low <= 1e-12 * high).all():
            break
    slope, log_bound = _tilt(low, u, p)
    return np.minimum(0.0, log_bound + low * (slope - t))


def _threshold(u: np.ndarray, p: np.ndarray, log_level: float) -> float:
    """The t where the bound crosses the level: psi - l psi' falls in l, and its l gives t = psi'(l)."""
    # ln P(T = its largest value). Chips below rounding cannot decide; without them the answer is on the safe side.
    atom = np.where(u > 0, np.log(p), np.log1p(-p))[np.abs(u) > _NEGLIGIBLE].sum()
    if atom >= log_level * (1 + 1e-9):
        return math.inf
    low, high = 0.0, 1.0
    while _tilt(np.array([high]), u, p)[1][0] > log_level:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _tilt(np.array([middle]), u, p)[1][0] > log_level else (low, middle)
    return float(_tilt(np.array([high]), u, p)[0][0])
