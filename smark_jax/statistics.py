r"""Test statistics and p-values that hold for every attack.

Setting. A suspect's read-out is y in R^m. Customer j's codeword b_j consists of m fair, independent signs. It is
secret, and for an innocent j it is independent of y (whatever the attackers did, they never saw b_j). The statistic is

.. math:: T_j = \langle u, b_j \rangle, \qquad u = y / |y|.

Formal guarantee (T1+). For an innocent j, for every y and every t > 0,

.. math:: P(|T_j| \ge t) \le 2 \min\Big\{ c \bar\Phi(t),\ \inf_{s>0} e^{\sum_i \ln\cosh(s u_i) - s t} \Big\},
          \qquad c = \frac{1}{4 \bar\Phi(\sqrt 2)} = 3.1787...

The first bound is Bentkus and Dzindzalieta, "A tight Gaussian bound for weighted sums of Rademacher random variables"
(Bernoulli 21, 2015). The second is Chernoff's, never worse than Hoeffding's 2 exp(-t^2/2), since
ln cosh x <= x^2/2. The test is two-sided because colluders can extrapolate, which makes a guilty customer's T negative.

Everything here is computed in float64 on the host, in logarithms, so that p-values far below 1e-300 stay accurate.
"""

import math

import numpy as np
from jaxtyping import Float
from scipy import special

from smark_jax import _validate
from smark_jax._types import AnyArray

_LOG_TWO = math.log(2)
_LOG_NORMAL_FACTOR = -math.log(4) - float(special.log_ndtr(-math.sqrt(2)))
_NEWTON_STEPS = 60
_BISECTIONS = 30  # t changes with the square of the error in s
_ROUNDING = 1e-12


def direction(chips: AnyArray) -> Float[np.ndarray, " m"]:
    r"""The direction u = y / |y| of a read-out in float64, shape [m]; zero when y is zero.

    Raises:
      SmarkError: when chips are not a vector of finite numbers.
    """
    y = _validate.chips("direction", chips)
    largest = np.abs(y).max()
    if largest == 0:
        return y
    y = y / largest  # the squares of very small or large chips would leave the range of float64
    return y / np.linalg.norm(y)


def log_p_value(statistic: float | AnyArray, chips: AnyArray) -> Float[np.ndarray, "..."]:
    r"""Natural logarithm of the two-sided T1+ bound at each \|T\|, before any correction for the number of customers.

    Newton's method finds Chernoff's infimum, starting from s = t. It approaches the minimum from below without
    overshooting, because the derivative in s is concave. Every s gives a valid bound, so an early stop costs power but
    never validity.

    Args:
      statistic: T of each customer, shape [K] (or a single number).
      chips: the read-out y, shape [m].

    Returns:
      ln p of the same shape, at most 0.

    Raises:
      SmarkError: when chips are not a vector of finite numbers.

    Examples:
      >>> import numpy as np
      >>> float(round(log_p_value(16.0, np.ones(256)) / np.log(10), 2))  # all 256 signs agree: 2 * 2^-256
      -76.76
    """
    u = np.abs(direction(chips))
    t = np.abs(np.asarray(statistic, np.float64))
    if not u.any():
        return np.zeros(t.shape)
    # No codeword scores above sum |u_i|; any excess is rounding. Rounding errors are resolved in the accused's favour.
    flat = np.minimum(t.reshape(-1), u.sum()) * (1 - _ROUNDING)
    log_p = np.minimum(_LOG_NORMAL_FACTOR + special.log_ndtr(-flat), _log_chernoff(flat, u))
    return np.minimum(0.0, _LOG_TWO + log_p).reshape(t.shape)


def threshold(chips: AnyArray, log_alpha: float) -> float:
    r"""The smallest \|T\| whose two-sided p-value is at most exp(``log_alpha``): an accusation needs this much.

    Args:
      chips: the read-out y, shape [m].
      log_alpha: natural logarithm of the level for a single customer (alpha / N for N customers).

    Returns:
      The threshold, to within 1e-9 of the true one and never below it; infinity when even perfect agreement of all
      chips would not be significant (too few chips for this level).

    Raises:
      SmarkError: when chips are not a vector of finite numbers.
    """
    u = np.abs(direction(chips))
    most = float(u.sum())
    if log_p_value(most, chips) > log_alpha or most == 0:
        return math.inf
    if log_alpha >= 0:
        return 0.0
    normal = -float(special.ndtri_exp(log_alpha - _LOG_TWO - _LOG_NORMAL_FACTOR))
    found = max(0.0, min(normal, _chernoff_threshold(log_alpha - _LOG_TWO, u)))
    while found < most and log_p_value(found, chips) > log_alpha:
        found += 1e-10 * max(1.0, found)  # rounding
    return min(found, most)


def _chernoff_threshold(log_level: float, u: np.ndarray) -> float:
    r"""The smallest t that Chernoff's bound puts at this level.

    It is :math:`\inf_s (K(s) - L) / s` with :math:`K(s) = \sum_i \ln\cosh(s u_i)` and the level's logarithm L. The
    infimum is where :math:`s K'(s) - K(s) = -L`, whose left side rises with s. Every s gives a t that is large enough.
    """

    def excess(s: float) -> float:
        return s * float(u @ np.tanh(s * u)) - _log_cosh(s, u)

    low = high = math.sqrt(-2 * log_level)  # the root for small u; others are larger
    while excess(high) < -log_level and high < 1e300:
        low, high = high, 2 * high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < -log_level else (low, middle)
    return (_log_cosh(high, u) - log_level) / high


def _log_cosh(s: float, u: np.ndarray) -> float:
    """The sum of ln cosh(s u_i) = s u_i + ln(1 + e^(-2 s u_i)) - ln 2, which neither overflows nor cancels."""
    return s * float(u.sum()) + float(np.sum(np.log1p(np.exp(-2 * s * u)) - _LOG_TWO))


def _log_chernoff(t: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Logarithm of inf_s exp(sum_i ln cosh(s u_i) - s t) for each t in [0, sum u], u >= 0."""
    return np.array([_log_chernoff_one(x, u) for x in t])


def _log_chernoff_one(t: float, u: np.ndarray) -> float:
    s = t
    best = 0.0
    for _ in range(_NEWTON_STEPS):
        value = _log_cosh(s, u) - s * t
        tanh = np.tanh(s * u)
        slope, curvature = float(u @ tanh) - t, float(np.square(u) @ (1 - np.square(tanh)))
        if value < best:
            best = value
        if slope >= 0 or curvature <= 0 or -slope / curvature <= 1e-12 * s:
            break
        s -= slope / curvature
    return best
