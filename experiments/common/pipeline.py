"""The desk's one pipeline: a suspect is aligned to the base, read once, and traced."""

import time
from typing import NamedTuple

import numpy as np
from jax import Array

from experiments.common.networks import ALPHA
from smark_jax import alignment, carriers, codes, errors, extraction, statistics, tracing
from smark_jax._types import AnyArray, ApplyFn, PyTree


class Judged(NamedTuple):
    """What the pipeline found.

    Attributes:
      aligned: the suspect's weights in the base's layout, or as near to it as alignment came.
      refused: whether alignment refused the suspect, so that nobody is accused.
      chips: the reading, shape [m].
      accused: serials.
      seconds: that alignment took.
    """

    aligned: PyTree
    refused: bool
    chips: np.ndarray
    accused: frozenset[int]
    seconds: float

    def statistic(self, word: AnyArray) -> float:
        """T of the customer with this codeword."""
        return statistic(self.chips, word)


def judge(
    suspect: PyTree, base: PyTree, apply_fn: ApplyFn, image: AnyArray | Array, mark: carriers.Mark, book: codes.Codebook
) -> Judged:
    """The verdict at alpha = 1e-6; ``image`` is one image, shape [1, ...]."""
    refused, began = False, time.perf_counter()
    try:
        aligned = alignment.align(suspect, base, apply_fn, image).params
    except (errors.NothingMatched, errors.Undecided) as error:
        refused, aligned = True, suspect if error.attempt is None else error.attempt.params
    seconds = time.perf_counter() - began
    chips = np.asarray(extraction.extract(aligned, base, mark), np.float64)
    accused = [] if refused else [accusation.serial for accusation in tracing.trace(chips, book, ALPHA).accused]
    return Judged(aligned, refused, chips, frozenset(accused), seconds)


def statistic(chips: AnyArray | Array, word: AnyArray) -> float:
    """T, the projection of the chips' direction onto a codeword; 0 where there is no direction."""
    return float(statistics.direction(np.asarray(chips)) @ np.asarray(word, np.float64))
