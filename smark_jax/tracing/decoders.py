"""Decoders: from a read-out and the customers who correlate best with it to tests, each with its p-value.

A new one is a function here and an entry of :data:`DECODERS`. It must obey A2 of :mod:`smark_jax.tracing`: a customer's
test may depend on the codebook only through the other customers' words, or must pay for the choice.
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
      direction: u, the read-out at unit length, shape [m].
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
    """What a decoder found.

    Attributes:
      tests: most significant first; the customers not tested count as those whose p-value is 1.
      rest: what the customers found leave unexplained of the read-out, shape [m], on which decoys are scored.
    """

    tests: list[Test]
    rest: Float[np.ndarray, " m"]


class Decoder(NamedTuple):
    """An entry of :data:`DECODERS`.

    Attributes:
      decode: the decoder. It is not called for a read-out of zeros.
      margin: how far below the threshold of one customer alone correlations are of use to it; None for all.
    """

    decode: Callable[[Near], Decoded]
    margin: float | None = None


def single(near: Near) -> Decoded:
    """T1+: each customer alone, Holm over all."""
    # Float32 scores chose whom to look at, a margin below the threshold; what counts is the float64 statistic.
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
"""All decoders by the names that :func:`smark_jax.tracing.trace` takes."""


def _chase(near: Near) -> pursuit.Pursuit:
    chosen = scoring.shortlist(near.book, near.customers)
    return pursuit.Pursuit(near.direction, near.book, chosen, near.scores, near.num_customers)


def _holm(found: Iterable[tuple[int, float, float]], num_customers: int) -> list[Test]:
    """Holm's step-down adjusted p-values, those of customers not tested counting as 1; most significant first."""
    tests, running = [], -math.inf
    for rank, (customer, statistic, log_p) in enumerate(sorted(found, key=lambda test: test[2])):
        running = max(running, min(0.0, log_p + math.log(num_customers - rank)))
        tests.append(Test(customer, statistic, running))
    return tests
