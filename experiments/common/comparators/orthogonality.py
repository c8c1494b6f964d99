"""Orthogonal fingerprints: the oldest answer to collusion by averaging."""

import functools

import numpy as np
from scipy import linalg

from experiments.common.comparators.interface import Comparator, Decision
from smark_jax import _validate, statistics

_MOST_CHIPS = 1 << 14  # a table of 256 MB


def orthogonal(num_customers: int, num_chips: int | None = None) -> Comparator:
    r"""Rows of a Hadamard matrix of order m, one for each customer, and a correlation decoder.

    T_j = <y, b_j> / \|y\|, accused at the two-sided threshold that :func:`smark_jax.statistics.threshold` gives for
    alpha / N, the one of our single decoder. Words do not disturb each other: the mean of K copies has T = sqrt(m/K)
    for each colluder and 0 for all others. The price is N <= m - 1 customers.

    These words are a fixed table, so the threshold is used as a yardstick only: nothing bounds the probability of a
    false accusation, and p-values are NaN. (Colluders who know the table and the carrier can frame anybody.)

    Args:
      num_customers: N.
      num_chips: m, a power of two above N (the row of ones serves nobody); by default the smallest.

    Returns:
      The comparator. ``colluders`` is None: the construction names no coalition.

    Raises:
      SmarkError: when ``num_chips`` is not a power of two up to 2^14 or has room for fewer customers.

    Examples:
      >>> from experiments.common import comparators
      >>> code = comparators.orthogonal(100)
      >>> code.words.shape, [accusation.serial for accusation in code.trace(code.words[42]).accused]
      ((100, 128), [42])
    """
    _validate.positive("orthogonal", "num_customers", num_customers)
    m = 1 << int(num_customers).bit_length() if num_chips is None else num_chips
    _validate.positive("orthogonal", "num_chips", m)
    if m & (m - 1):
        raise _validate.fail(
            "orthogonal", "a power of two for num_chips", str(m), "Sylvester's matrices have no other."
        )
    if num_customers > m - 1:
        cause = "There are no more orthogonal words than chips, and the row of ones is left out."
        raise _validate.fail("orthogonal", f"at most {m - 1:,} customers", f"{num_customers:,}", cause)
    if m > _MOST_CHIPS:
        cause = "Orthogonal words need a chip for every customer; that is their limit, not ours."
        raise _validate.fail("orthogonal", f"at most {_MOST_CHIPS:,} chips", f"{m:,}", cause)
    words = linalg.hadamard(m, np.int8)[1 : num_customers + 1]  # pyright: ignore[reportArgumentType]
    return Comparator(f"orthogonal m={m}", words, None, False, functools.partial(_correlate, words))


def _correlate(words: np.ndarray, y: np.ndarray, log_level: float) -> Decision:
    scores = words @ statistics.direction(y)
    bar = statistics.threshold(y, log_level)
    guilty = np.flatnonzero(np.abs(scores) >= bar)
    return Decision(scores, -bar, bar, guilty, np.full(guilty.size, np.nan))
