"""What the sections share: keys, confidence intervals, coalitions, names of decoders."""

from typing import Any

import numpy as np
from scipy import stats

from experiments import sections
from smark_jax import keys, tracing

DECODERS = ("joint", "sequential", "single")


def master_key(seed: int, section: str) -> keys.SecretKey:
    return sections.secret(seed, "experiments.collusion", section)


def interval(events: int, trials: int, confidence: float = 0.999) -> tuple[float, float]:
    """Clopper-Pearson's exact interval of a probability."""
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = float(stats.beta.ppf(1 - tail, events + 1, trials - events)) if events < trials else 1.0
    return low, high


def extrapolation(colluders: int, magnitude: float = 0.9) -> np.ndarray:
    """The shares of :func:`smark_jax.attacks.extrapolate`: the first colluder enters negatively."""
    shares = np.full(colluders, (1 + magnitude) / max(1, colluders - 1))
    shares[0] = -magnitude
    return shares


def caught(verdict: tracing.Verdict | Any, coalition: set[int]) -> tuple[int, int]:
    """How many of the coalition, and how many innocents, a verdict accuses."""
    accused = {int(accusation.serial) for accusation in verdict.accused}
    return len(accused & coalition), len(accused - coalition)
