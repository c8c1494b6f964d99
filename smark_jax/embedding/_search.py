"""The largest strength whose cost is within bounds, in few tries: each runs several copies on all images."""

import math
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

# The cost is within 4 % of its bound, or the strength known to within 4 %, or both beyond a thousand times the first.
_NEAR, _RANGE = 1.04, 1000
# A cost grows as a power of the strength, about in proportion to it. So the first tries aim a little below the bound,
# and go no further than by a factor of four at once; later ones bisect.
_AIM, _FURTHEST, _GUESSES = 0.98, 4, 6


def largest(tried: Callable[[float], tuple[float, Found | None]], start: float) -> tuple[Found | None, float]:
    """What was found at the largest strength, if anything; and the smallest strength that costs too much.

    Args:
      tried: gives the cost of a strength over its bound, and what was found if that is 1 or less.
      start: the first strength that is tried.
    """
    best, low, strength, high = None, start / _RANGE, start, start * _RANGE
    before, tries = None, 0
    while True:
        ratio, found = tried(strength)
        tries += 1
        best = found or best
        low, high = (strength, high) if found else (low, strength)
        if high <= _NEAR * low or 1 / _NEAR <= ratio <= 1:
            return best, high
        guess = strength * _further(ratio, strength, before)
        before = strength, ratio
        strength = guess if tries <= _GUESSES and low < guess < high else math.sqrt(low * high)


def _further(ratio: float, strength: float, before: tuple[float, float] | None) -> float:
    """The factor by which to change a strength of this cost, by its power of the strength since the try before."""
    if not 0 < ratio < math.inf:
        return 1 / _FURTHEST if ratio > 0 else _FURTHEST
    power = 1.0
    if before and 0 < before[1] < math.inf and before[1] != ratio:
        power = math.log(ratio / before[1]) / math.log(strength / before[0])
    factor = (_AIM / ratio) ** (1 / min(max(power, 1 / _FURTHEST), _FURTHEST))
    return min(max(factor, 1 / _FURTHEST), _FURTHEST)
