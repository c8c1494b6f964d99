"""Decoys: codewords that nobody received, scored with every verdict as a check of its assumptions."""

import math
import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from smark_jax import statistics

# A decoy with so small a p-value means that an assumption is broken; sound verdicts give an alarm once in a million.
_DECOY_LEVEL = 1e-6


class Decoys(NamedTuple):
    """Scores of codewords that nobody received: an empirical check of the assumptions of the proof.

    Attributes:
      number: how many decoys were scored like customers.
      largest: their largest absolute statistic on what the accused leave unexplained; about 3.5 when all is well.
      alarm: whether this is too large for chance (probability below 1e-6): then trust no accusation of this verdict.
    """

    number: int
    largest: float
    alarm: bool


def score_decoys(rest: Float[np.ndarray, " m"], decoys: Float[np.ndarray, "D m"]) -> Decoys:
    """Scores decoys on the part of the read-out that the accused leave unexplained, and warns when one stands out."""
    direction = statistics.direction(rest)
    largest = float(np.abs(decoys @ direction).max())
    alarm = bool(statistics.log_p_value(largest, rest) + math.log(len(decoys)) <= math.log(_DECOY_LEVEL))
    if alarm:
        warnings.warn(
            f"trace: a codeword that nobody received scores {largest:.1f}, which by chance happens less than once in a "
            "million verdicts. An assumption is broken (did codewords leak, or shape the carrier or the alignment?): "
            "trust no accusation of this verdict.",
            RuntimeWarning,
            stacklevel=5,
        )
    return Decoys(len(decoys), largest, alarm)
