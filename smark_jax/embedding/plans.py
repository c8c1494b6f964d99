r"""Predicts, before the first copy is made, what a mark of a given number of chips and strength can trace.

*Damage.* Under noise n_i in coordinate i, a chip has the SNR
:math:`\frac{1}{m} \sum_i (\text{strength} \, s_i / n_i)^2` when each coordinate is read by its precision, the sum taken
over the coordinates of kernels. Then :math:`T = \sqrt{m / (1 + 1 / \text{SNR})}`. Damage is taken as noise in
proportion to each leaf's RMS, as it is for weights that are normally distributed.

*Coalitions.* Of K copies' mean with chip SNR q of one copy, the joint decoder (T2) finds a first colluder while
:math:`\sqrt{m / (K + K^2 / q)}` reaches :math:`\sqrt{2 \ln 2N}`, and accuses each with probability 95 % while
:math:`\sqrt{m / (1 + K^2 / q)}` exceeds the threshold by 1.64. The smaller K counts. Simulations of the decoder found
10 of 10 at m = 304 and 20 dB among a million (here 10), and 28 at 1,024 (here 30 to 32): docs/tracing.md has what was
measured on real copies.
"""

import math
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, carriers
from smark_jax.carriers import shapes
from smark_jax.embedding.costs import MAX_CHANGE

_CHIPS = (304, 1024, 4096)
_SURE = 1.645
# Noise in units of a leaf's RMS, and the share of the mark that is left in the mean, for normal weights. Quantisers
# round to steps of largest / (2^(bits - 1) - 1), with the largest at 4 RMS; half of all weights hold 7 % of the power.
_DAMAGE = {
    "intact": (1e-7, 1.0),
    "float16": (2**-11 / math.sqrt(12), 1.0),
    "int8": (4 / 127 / math.sqrt(12), 1.0),
    "int4": (4 / 7 / math.sqrt(12), 1.0),
    "noise 30 %": (0.3, 1.0),
    "prune 50 %": (math.sqrt(0.072), 0.5),
}
# Seconds for each chip of a customer, and for each coordinate, on one core: orders of magnitude.
_SECONDS_PER_SIGN, _SECONDS_PER_COORDINATE = 3e-10, 1e-8


class Row(NamedTuple):
    """The prediction for one number of chips.

    Attributes:
      num_chips: m.
      strength: the mark's, scaled to the stated cost.
      statistic: the expected T of a copy after each kind of damage, by the name of the damage.
      coalition: the largest number of colluders with intact copies who are all accused with probability 95 %.
      coalition_after_noise: the same after noise of 30 % of each leaf's RMS.
      carrier_bytes: memory that the carrier takes.
      seconds: of one verdict on one core, a suspect's reading included.
      enough: whether ``coalition`` is at least what was asked for.
    """

    num_chips: int
    strength: float
    statistic: dict[str, float]
    coalition: int
    coalition_after_noise: int
    carrier_bytes: int
    seconds: float
    enough: bool


class Plan(NamedTuple):
    """A prediction for each number of chips, and the number to choose.

    Attributes:
      rows: in rising order of chips.
      num_chips: the smallest that is enough; None where none is.
      threshold: the T from which a customer is accused, at the largest number of chips.
    """

    rows: tuple[Row, ...]
    num_chips: int | None
    threshold: float


def plan(
    mark: carriers.Mark, *, customers: int, coalition: int = 1, max_change: float = MAX_CHANGE, alpha: float = 1e-6
) -> Plan:
    """Predicts what a model's mark can trace with different numbers of chips, all at the same cost in accuracy.

    More chips at the same cost trace larger coalitions; fewer are faster. T of a lone leaker hardly depends on their
    number.

    Args:
      mark: the model's mark; its own strength counts as that of a relative change of the logits of 0.8 %, as
        :func:`calibrate` finds it by default.
      customers: N, the number of customers among whom a verdict looks.
      coalition: the number of colluders, all of whom should be accused.
      max_change: relative change of the logits, to which the strength is scaled.
      alpha: bound on the probability of accusing anybody innocent.

    Returns:
      The plan.

    Raises:
      SmarkError: when a number is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers, embedding, keys
      >>> base = {"kernel": jnp.sin(jnp.arange(90_000.0)).reshape(300, 300)}
      >>> found = embedding.plan(carriers.mark(keys.from_bytes(bytes(32)), base), customers=1000, coalition=20)
      >>> found.num_chips, [row.coalition for row in found.rows]
      (1024, [19, 67, 269])
    """
    for name, value in (("customers", customers), ("coalition", coalition)):
        _validate.positive("plan", name, value)
    _validate.finite_number("plan", "max_change", max_change)
    _validate.probability("plan", "alpha", alpha)
    strength = float(mark.strength) * max_change / MAX_CHANGE
    power, count = _power(mark)
    rows = [
        _row(m, strength, power, count, customers, coalition, alpha)
        for m in sorted({*_CHIPS, mark.num_chips})
        if m <= count // 4 or m == mark.num_chips
    ]
    enough = [row.num_chips for row in rows if row.enough]
    bar = _threshold(rows[-1].num_chips, customers, alpha)
    return Plan(tuple(rows), min(enough, default=None), bar)


def _power(mark: carriers.Mark) -> tuple[float, int]:
    """The sum of (s / RMS)^2 over the coordinates of kernels, and the number of coordinates."""
    if mark.shape is None:
        return float(mark.carrier.num_carrying), mark.carrier.num_carrying
    found = 0.0
    for (leaf, one), rms in zip(mark.shape, mark.spec.scales, strict=True):
        if not shapes.is_vector(leaf):
            found += float(np.square(np.asarray(one.sizes(leaf), np.float64) / float(rms)).sum())
    return found, mark.carrier.num_carrying


def _row(m: int, strength: float, power: float, count: int, customers: int, coalition: int, alpha: float) -> Row:
    ratios = {name: (left * strength / noise) ** 2 * power / m for name, (noise, left) in _DAMAGE.items()}
    statistic = {name: math.sqrt(m / (1 + 1 / ratio)) for name, ratio in ratios.items()}
    most, noisy = (_coalition(m, ratios[name], customers, alpha) for name in ("intact", "noise 30 %"))
    carrier_bytes = count // 4 + 4 * m * max(1, count // max(2048, 4 * m))
    seconds = _SECONDS_PER_SIGN * m * customers + _SECONDS_PER_COORDINATE * count
    return Row(m, strength, statistic, most, noisy, carrier_bytes, seconds, most >= coalition)


def _threshold(num_chips: int, customers: int, alpha: float) -> float:
    from smark_jax import statistics  # which loads scipy: embedding itself does without

    return statistics.threshold(np.ones(num_chips), math.log(alpha / customers))


def _coalition(m: int, ratio: float, customers: int, alpha: float) -> int:
    """The largest K that the joint decoder accuses; see the module's text."""
    first, each = 2 * math.log(2 * customers), (_threshold(m, customers, alpha) + _SURE) ** 2
    if m <= each:
        return 0
    found = ratio / 2 * (math.sqrt(1 + 4 * m / first / ratio) - 1)  # K + K^2 / q = m / first
    found = m / first if ratio > 1e6 * m else found
    return min(customers, int(found), int(math.sqrt(ratio * (m / each - 1))))
