"""Confidence intervals of probabilities."""

from scipy import stats


def clopper_pearson(events: int, trials: int, confidence: float = 0.999) -> tuple[float, float]:
    """Clopper-Pearson's exact interval of a probability, from ``events`` in ``trials``."""
    tail = (1 - confidence) / 2
    low = float(stats.beta.ppf(tail, events, trials - events + 1)) if events else 0.0
    high = float(stats.beta.ppf(1 - tail, events + 1, trials - events)) if events < trials else 1.0
    return low, high
