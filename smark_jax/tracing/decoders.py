"""Decoders: they test the customers who correlate best with a read-out, each with a p-value.

A new decoder is a function here and an entry of :data:`DECODERS`. It must obey A2 of :mod:`smark_jax.tracing`: a
customer's test may depend on the codebook only through the other customers' words, or must correct for the selection.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from smark_jax import statistics
from smark_jax.tracing import pursuit, scoring


class Near(NamedTuple):
    """A read-out, and the customers who correlate best with it.

    Attributes:
      direction: u, the read-out normalised to unit length, shape [m].
      book: the codebook.
      customers: their places in it, at most ``320e6 / m`` of them.
      scores: their words' correlations with u, float32.
      num_customers: N.
    """

    direction: Float[np.ndarray, " m"]
    book: scoring.Book
    customers: np.ndarray
    scores: Float[np.ndarray, " L"]
    num_customers: int


class Test(NamedTuple):
    """One customer's test: place in the codebook, statistic, and ln of its p-value corrected for the customers."""

    customer: int
    statistic: float
    log_p: float


class Decoded(NamedTuple):
    """The result of a decoder.

    Attributes:
      tests: most significant first; customers that were not tested count as having p-value 1.
      rest: the part of the read-out that the customers found leave unexplained, shape [m]; decoys are scored on it.
    """

    tests: list[Test]
    rest: Float[np.ndarray, " m"]


class Decoder(NamedTuple):
    """An entry of :data:`DECODERS`.

    Attributes:
      decode: the decoder. It is not called for a read-out of zeros.
      margin: how far below the threshold for a single customer a correlation may be and still be used; None for any.
    """

    decode: Callable[[Near], Decoded]
    margin: float | None = None


def single(near: Near) -> Decoded:
    """T1+: each customer alone, Holm over all."""
    # Float32 scores, with a margin below the threshold, chose these customers; the float64 statistic decides.
    scores = scoring.rows(near.book, near.customers).astype(np.float64) @ near.direction
    log_p = statistics.log_p_value(scores, near.direction)
    found = zip(near.customers.tolist(), scores.tolist(), log_p.tolist(), strict=True)
    return Decoded(_holm(found, near.num_customers), near.direction)


def joint(near: Near) -> Decoded:
    """T2: each selected customer on the residual of the run that never saw its codeword, Holm over all."""
    chase = _chase(near)
    selected = chase.run()
    found = []
    for place in selected:
        residual = chase.residual(chase.run(masked=place))
        statistic = chase.statistic(residual, place)
        log_p = float(statistics.log_p_value(statistic, residual))
        found.append((int(near.customers[place]), statistic, log_p))
    return Decoded(_holm(found, near.num_customers), chase.residual(selected))


def sequential(near: Near) -> Decoded:
    """T3: the pick of step k on the residual before it, at level alpha / 2^k."""
    chase = _chase(near)
    selected = chase.run()
    tests = []
    for step, place in enumerate(selected):
        residual = chase.residual(selected[:step])
        statistic = chase.statistic(residual, place)
        log_p = float(statistics.log_p_value(statistic, residual)) + math.log(near.num_customers)
        tests.append(Test(int(near.customers[place]), statistic, min(0.0, log_p + (step + 1) * math.log(2))))
    return Decoded(sorted(tests, key=lambda test: test.log_p), chase.residual(selected))


DECODERS = {"joint": Decoder(joint), "sequential": Decoder(sequential), "single": Decoder(single, margin=1.0)}
"""All decoders, by the names that :func:`smark_jax.tracing.trace` accepts."""


def _chase(near: Near) -> pursuit.Pursuit:
    chosen = scoring.shortlist(near.book, near.customers)
    return pursuit.Pursuit(near.direction, near.book, chosen, near.scores, near.num_customers)


def _holm(found: Iterable[tuple[int, float, float]], num_customers: int) -> list[Test]:
    """Holm's step-down adjusted p-values, most significant first; customers that were not tested count as 1."""
    tests, running = [], -math.inf
    for rank, (customer, statistic, log_p) in enumerate(sorted(found, key=lambda test: test[2])):
        running = max(running, min(0.0, log_p + math.log(num_customers - rank)))
        tests.append(Test(customer, statistic, running))
    return tests
