"""The customers whose words correlate best with a read-out, collected over a pass of the codebook."""

import numpy as np
from jaxtyping import Float

from smark_jax import _processes


class Best:
    """The customers with the largest absolute correlations so far: at least ``floor``, and at most ``limit`` of them.

    Whenever there are more than the limit, the floor rises to the smallest one kept, so that one comparison skips most
    of a long codebook. In between, up to a quarter more than the limit are held, so that sorting is rare.
    """

    def __init__(self, limit: int, floor: float) -> None:
        self._limit, self._floor = limit, floor
        self._customers = [np.empty(0, np.int64)]
        self._scores = [np.empty(0, np.float32)]

    def add(self, start: int, scores: Float[np.ndarray, " rows"]) -> None:
        """Takes the scores of the customers from ``start`` on."""
        near = np.flatnonzero(np.abs(scores) >= self._floor)
        self._customers.append(start + near)
        self._scores.append(scores[near])
        if sum(part.size for part in self._scores) > 1.25 * self._limit:
            self._cut()

    def _cut(self) -> None:
        customers, scores = np.concatenate(self._customers), np.concatenate(self._scores)
        if scores.size > self._limit:
            strength = np.abs(scores)
            top = np.sort(np.argpartition(strength, scores.size - self._limit)[scores.size - self._limit :])
            customers, scores = customers[top], scores[top]
            self._floor = float(strength[top].min())
        self._customers, self._scores = [customers], [scores]

    def gather(self) -> None:
        """Puts together what all processes of ``jax.distributed`` have kept."""
        customers, scores = (np.concatenate(_processes.gathered(part)) for part in self.result())
        order = np.argsort(customers)
        self._customers, self._scores = [customers[order]], [scores[order]]

    def result(self) -> tuple[np.ndarray, Float[np.ndarray, " L"]]:
        """The customers, in codebook order, and their scores."""
        self._cut()
        return self._customers[0], self._scores[0]
