"""Shared by the sections: keys, coalitions, names of decoders."""

from typing import Any

import numpy as np

from experiments.common import sections
from smark_jax import keys, tracing

DECODERS = ("joint", "sequential", "single")


def master_key(seed: int, section: str) -> keys.SecretKey:
    return sections.secret(seed, "experiments.collusion", section)


def extrapolation(colluders: int, magnitude: float = 0.9) -> np.ndarray:
    """The shares of :func:`smark_jax.attacks.extrapolate`: the first colluder enters negatively."""
    shares = np.full(colluders, (1 + magnitude) / max(1, colluders - 1))
    shares[0] = -magnitude
    return shares


def caught(verdict: tracing.Verdict | Any, coalition: set[int]) -> tuple[int, int]:
    """How many of the coalition, and how many innocents, a verdict accuses."""
    accused = {int(accusation.serial) for accusation in verdict.accused}
    return len(accused & coalition), len(accused - coalition)
