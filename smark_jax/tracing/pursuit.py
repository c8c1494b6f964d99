r"""Orthogonal matching pursuit over a shortlist of customers, and its leave-one-out runs.

With u the read-out's direction, c = B u its correlations, S the selected customers, G = B B_S^T and a the least-squares
coefficients, the residual's correlations are c - G a. So the only passes over the codewords are one per customer ever
selected, whose column of G is then kept for all runs. Which customers are tested may depend on anything; the test of j
uses :func:`residual` of a run from which j was masked, in float64 and from the codewords themselves.

The shortlist preserves the guarantee: with j masked, it holds the best-correlated of the others, whatever b_j is.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from smark_jax.tracing import scoring

# Traceable coalitions are no larger than a quarter of the chips, nor than this.
MAX_SELECTED = 128
# When a strong colluder is masked, their part stays in the residual and keeps the others' correlations with it below
# the stop. So at the stop the next few customers are added on trial, and are kept only if somebody then exceeds the
# stop by the surplus.
_LOOK_AHEAD = 4
_SURPLUS = 0.5
# A residual below this fraction of the read-out is rounding: its square is 1 minus a square of float32 scores.
_SMALLEST_RESIDUAL = 2e-3
# Columns of G are computed together for the most likely next selections, since one pass serves many.
_COLUMNS_PER_PASS = 16


class Pursuit:
    """The pursuit of one read-out; holds the columns of G that its runs share.

    Args:
      direction: u, of unit length, shape [m].
      book: the codebook.
      chosen: the shortlist.
      scores: u's correlations with its words, shape [L].
      num_customers: N, which sets the stop: sqrt(2 ln 2N), about the best correlation of N innocents.
    """

    def __init__(
        self,
        direction: Float[np.ndarray, " m"],
        book: scoring.Book,
        chosen: scoring.Shortlist,
        scores: Float[np.ndarray, " L"],
        num_customers: int,
    ) -> None:
        self._direction = direction
        self._book = book
        self._chosen = chosen
        self._stop = math.sqrt(2 * math.log(2 * num_customers))
        self._cap = min(MAX_SELECTED, direction.size // 4, chosen.customers.size)
        self._scores = scores
        self._prefix: list[int] = []
        self._words: dict[int, np.ndarray] = {}
        # The columns of G, as rows; those of the unmasked run come first, in the order of its selections.
        self._columns = np.empty((_COLUMNS_PER_PASS, chosen.customers.size), np.float32)
        self._rows: dict[int, int] = {}

    def run(self, masked: int | None = None) -> list[int]:
        """Selects customers, as places in the shortlist, in order of selection.

        Args:
          masked: a place to leave out, as if that customer were not in the codebook.
        """
        # Until its first trial, each selection of the unmasked run exceeded the stop and all others, with or without
        # the masked customer. So the masked run starts with the same selections, up to that of the masked customer.
        before = self._prefix.index(masked) if masked in self._prefix else len(self._prefix)
        selected = self._prefix[:before] if masked is not None else []
        single = masked is None
        kept = len(self._rows)
        while len(selected) < self._cap:
            strength, norm = self._strength(selected, masked)
            if norm < _SMALLEST_RESIDUAL:
                break
            order = _largest(strength, _COLUMNS_PER_PASS)
            if strength[order[0]] >= self._stop * norm:
                likely = [place for place in order if masked is None and strength[place] >= self._stop / 2]
                self._prepare(order[0], likely, _COLUMNS_PER_PASS)
                selected.append(order[0])
                if single:
                    self._prefix = selected.copy()
                    self._move(order[0], len(selected) - 1)
                continue
            single = False
            trial = order[:_LOOK_AHEAD]
            ahead = [*selected, *trial]
            if len(ahead) > self._cap or strength[trial[-1]] < 0:  # too few are left
                break
            for place in trial:
                self._prepare(place, trial, _LOOK_AHEAD)
            strength, norm = self._strength(ahead, masked)
            if norm < _SMALLEST_RESIDUAL or strength.max() < (self._stop + _SURPLUS) * norm:
                break
            selected = ahead
        if masked is not None:  # columns that only this run needed
            self._rows = dict(list(self._rows.items())[:kept])
        return selected

    def residual(self, selected: Sequence[int]) -> Float[np.ndarray, " m"]:
        """The part of u that is orthogonal to the selected codewords, in float64, shape [m]."""
        if not len(selected):
            return self._direction
        words = np.stack([self._word(place) for place in selected]).astype(np.float64)
        return self._direction - np.linalg.lstsq(words.T, self._direction, rcond=None)[0] @ words

    def statistic(self, residual: Float[np.ndarray, " m"], place: int) -> float:
        """<r, b> / |r| of one customer, in float64."""
        norm = float(np.linalg.norm(residual))
        return float(residual @ self._word(place)) / norm if norm > 0 else 0.0

    def _word(self, place: int) -> np.ndarray:
        if place not in self._words:
            self._words[place] = scoring.rows(self._book, self._chosen.customers[[place]])[0]
        return self._words[place]

    def _strength(self, selected: list[int], masked: int | None) -> tuple[np.ndarray, float]:
        """The residual's absolute correlations with all customers, -1 for those not to be selected, and its length."""
        if selected:
            rows = [self._rows[place] for place in selected]
            known = self._scores[selected].astype(np.float64)
            gram = self._columns[np.ix_(rows, selected)].astype(np.float64)
            coefficients = np.linalg.lstsq(gram, known, rcond=None)[0]
            norm = math.sqrt(max(0.0, 1.0 - float(coefficients @ known)))
            factors = np.zeros(max(rows) + 1, np.float32)  # a few zeros cost less than a copy of the columns
            factors[rows] = coefficients
            strength = np.abs(self._scores - factors @ self._columns[: len(factors)])
        else:
            strength, norm = np.abs(self._scores), 1.0
        strength[selected] = -1
        if masked is not None:
            strength[masked] = -1
        return strength, norm

    def _prepare(self, place: int, likely: Sequence[int], rows: int) -> None:
        """Computes a missing column of G, and in the same pass those that are likely to be needed next."""
        if place in self._rows:
            return
        wanted = [place, *(other for other in likely if other != place and other not in self._rows)][:rows]
        # The number of rows is fixed, so that this compiles once.
        columns = scoring.correlate([*wanted, *[place] * (rows - len(wanted))], self._chosen)
        start, end = len(self._rows), len(self._rows) + len(wanted)
        if end > len(self._columns):
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)])
        self._columns[start:end] = columns[: len(wanted)]
        self._rows |= zip(wanted, range(start, end), strict=True)

    def _move(self, place: int, row: int) -> None:
        """Exchanges a column of G with the one that lies in this row."""
        other = next(other for other, its_row in self._rows.items() if its_row == row)
        self._columns[[row, self._rows[place]]] = self._columns[[self._rows[place], row]]
        self._rows[other], self._rows[place] = self._rows[place], row


def _largest(strength: np.ndarray, count: int) -> list[int]:
    """The places of the largest values, in descending order."""
    count = min(count, strength.size)
    top = np.argpartition(strength, strength.size - count)[strength.size - count :]
    return top[np.argsort(-strength[top], kind="stable")].tolist()
