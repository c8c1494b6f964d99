r"""Orthogonal matching pursuit over a shortlist of customers, and its leave-one-out runs.

With u the read-out's direction, c = B u its correlations, S the selected customers, G = B B_S^T and a the least-squares
coefficients, the residual's correlations are c - G a: no pass over the codewords is needed but one for each customer
ever selected, whose column of G is then kept for all runs. Which customers are tested may depend on anything; the test
of j uses :func:`residual` of a run from which j was masked, in float64 and from the codewords themselves.

The shortlist keeps the guarantee: with j masked it holds those who correlate best among the others, whatever b_j.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from smark_jax.tracing import scoring

# No coalition that can be traced is larger than a quarter of the chips, or than this.
MAX_SELECTED = 128
# A strong colluder who is masked hides the others behind the noise of their own words; a few selections beyond the stop
# bring them out. Unless one of these then exceeds the stop, they are dropped.
_LOOK_AHEAD = 4
_SURPLUS = 0.5
# A residual below this part of the read-out is rounding.
_SMALLEST_RESIDUAL = 1e-4
# Columns of G are made for the next likely selections together, since one pass serves many.
_COLUMNS_A_PASS = 16


class Pursuit:
    """The pursuit of one read-out; holds the columns of G that its runs share.

    Args:
      direction: u, of unit length, shape [m].
      book: the codebook.
      chosen: the shortlist.
      scores: u's correlations with its words, shape [L].
      num_customers: N, which sets where to stop: sqrt(2 ln 2N), what the best of N innocents reaches.
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
        self._words: dict[int, np.ndarray] = {}
        self._columns: dict[int, np.ndarray] = {}

    def run(self, masked: int | None = None, start: Sequence[int] = ()) -> list[int]:
        """Selects customers, as places in the shortlist, in order of selection.

        Args:
          masked: a place to leave out, as if that customer were not in the codebook.
          start: first selections already known.
        """
        selected = list(start)
        kept = set(self._columns)
        sure = len(selected)  # selections up to the last that exceeded what innocents reach
        while len(selected) < min(self._cap, sure + _LOOK_AHEAD):
            correlations, norm = self._residual_correlations(selected)
            if norm < _SMALLEST_RESIDUAL:
                break
            strength = np.abs(correlations)
            strength[selected] = 0
            if masked is not None:
                strength[masked] = 0
            pick = int(strength.argmax())
            self._prepare(pick, strength)
            selected.append(pick)
            surplus = 0.0 if sure == len(selected) - 1 else _SURPLUS
            if strength[pick] >= (self._stop + surplus) * norm:
                sure = len(selected)
        if masked is not None:  # what only this run needed
            self._columns = {place: column for place, column in self._columns.items() if place in kept}
        return selected[:sure]

    def residual(self, selected: Sequence[int]) -> Float[np.ndarray, " m"]:
        """What of u is orthogonal to the selected codewords, in float64, shape [m]."""
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

    def _residual_correlations(self, selected: list[int]) -> tuple[np.ndarray, float]:
        """The residual's correlations with the whole shortlist, and its length."""
        if not selected:
            return self._scores.copy(), 1.0
        columns = np.stack([self._columns[place] for place in selected])  # [k, L]
        known = self._scores[selected].astype(np.float64)
        coefficients = np.linalg.lstsq(columns[:, selected].astype(np.float64), known, rcond=None)[0]
        norm = math.sqrt(max(0.0, 1.0 - float(coefficients @ known)))
        return self._scores - coefficients.astype(np.float32) @ columns, norm

    def _prepare(self, pick: int, strength: np.ndarray) -> None:
        """Makes the column of ``pick``, and with it those of the next best that have none yet."""
        if pick in self._columns:
            return
        count = min(4 * _COLUMNS_A_PASS, strength.size)
        likely = np.argpartition(-strength, count - 1)[:count]
        likely = likely[np.argsort(-strength[likely], kind="stable")]
        wanted = [int(place) for place in likely if place not in self._columns and strength[place] >= self._stop / 2]
        wanted = [pick, *(place for place in wanted if place != pick)][:_COLUMNS_A_PASS]
        missing = [place for place in wanted if place not in self._words]
        for place, word in zip(missing, scoring.rows(self._book, self._chosen.customers[missing]), strict=True):
            self._words[place] = word
        # A fixed number of rows, so that this compiles once.
        vectors = np.zeros((_COLUMNS_A_PASS, self._direction.size))
        vectors[: len(wanted)] = [self._words[place] for place in wanted]
        for place, column in zip(wanted, scoring.correlate(vectors, self._chosen), strict=False):
            self._columns[place] = column
