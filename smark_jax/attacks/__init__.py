"""What leakers may do to copies before one turns up: pure functions from parameters to parameters."""

from smark_jax.attacks.collusion import (
    COLLUSIONS,
    Collusion,
    average,
    extrapolate,
    interleave,
    largest_difference,
    maximum,
    median,
    min_max,
    minimum,
    modified_negative,
    randomised_negative,
)
from smark_jax.attacks.removal import add_noise, fine_tune, prune, quantise

__all__ = [
    "COLLUSIONS",
    "Collusion",
    "add_noise",
    "average",
    "extrapolate",
    "fine_tune",
    "interleave",
    "largest_difference",
    "maximum",
    "median",
    "min_max",
    "minimum",
    "modified_negative",
    "prune",
    "quantise",
    "randomised_negative",
]
