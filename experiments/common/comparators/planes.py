r"""Anti-collusion codes from finite planes, as in DeepMarks.

A (v, k, 1)-BIBD has v points and blocks of k points each, such that any two points lie together in exactly one block.
Hence every point is in r = (v - 1)/(k - 1) blocks and there are b = v (v - 1)/(k (k - 1)) blocks. A customer is a
block, a chip is a point, and the codeword is the complement of the block's column of the incidence matrix: bit 0 (chip
-1) on the block's k points, bit 1 (chip +1) elsewhere. The AND of at most k - 1 words is 0 exactly on the union of
their blocks. Any other block meets each of them in at most one point, so at most k - 1 of its k points are covered:
the union names its blocks, and the AND names the coalition.

References:
  Trappe, Wu, Wang, Liu: Anti-collusion fingerprinting for multimedia. IEEE Trans. Signal Processing 51(4), 2003.
  Chen, Rouhani, Fu, Zhao, Koushanfar: DeepMarks: a secure fingerprinting framework for digital rights management of
  deep learning models. ICMR 2019, arXiv:1804.03648.
"""

import functools
from typing import Literal

import numpy as np
from jaxtyping import Bool

from experiments.common.comparators.interface import Comparator, Decision
from smark_jax import _validate, statistics

Kind = Literal["projective", "affine"]


def bibd(
    kind: Kind = "projective", order: int = 17, *, num_customers: int | None = None, colluders: int | None = None
) -> Comparator:
    r"""The anti-collusion code of a plane of prime order q, with the published hard decision.

    Projective: v = q^2 + q + 1 chips, k = q + 1, v customers. Affine: v = q^2 chips, k = q, q^2 + q customers. At most
    k - 1 colluders.

    Decision. The mean of K words is +1 where all have +1 and at most 1 - 2/K elsewhere. A chip is read as bit 0 below

    .. math:: \tau = \hat a \, (1 - 1/K), \qquad \hat a = \frac{v}{v - 2k} \cdot \frac1v \sum_i y_i,

    halfway between the two for K = ``colluders``, and the blocks whose k points all read 0 are accused. The amplitude
    needs no knowledge of the coalition: all words have the same sum v - 2k, so any mixture with weights that sum to
    one has it too.

    There is no bound on false accusations for this rule: p-values are NaN, and alpha changes nothing.

    Args:
      kind: ``"projective"`` or ``"affine"``.
      order: q, a prime (planes of prime-power order are not built here); at least 3 for affine planes.
      num_customers: how many of the words to hand out, the first ones; by default all.
      colluders: K, the coalition for which the threshold stands; by default the design's k - 1. A smaller K lowers
        it: fewer chips read 0, so fewer are accused, innocent or guilty.

    Returns:
      The comparator. Its statistic is the number of the customer's k points that read 0.

    Raises:
      SmarkError: on an unknown kind, an order that is not prime, more customers than the plane has blocks, or colluders
        outside 1 to k - 1.

    Examples:
      >>> from experiments.common import comparators
      >>> code = comparators.bibd("projective", 5)
      >>> leaked = code.words[[3, 8, 21]].mean(axis=0)
      >>> sorted(accusation.serial for accusation in code.trace(leaked).accused)
      [3, 8, 21]
    """
    points = incidence(kind, order)
    v, blocks = points.shape
    k = order + 1 if kind == "projective" else order
    if v <= 2 * k:
        cause = "In the affine plane of order 2 every word sums to 0, which hides the amplitude, and k - 1 = 1."
        raise _validate.fail("bibd", "an order of at least 3", str(order), cause)
    colluders = k - 1 if colluders is None else colluders
    _validate.positive("bibd", "colluders", colluders)
    if colluders > k - 1:
        cause = "The AND of more words covers other blocks too; take a larger order."
        raise _validate.fail("bibd", f"at most k - 1 = {k - 1} colluders", str(colluders), cause)
    count = blocks if num_customers is None else num_customers
    _validate.positive("bibd", "num_customers", count)
    if count > blocks:
        cause = "A larger order has more blocks: q^2 + q + 1 (projective) or q^2 + q (affine)."
        raise _validate.fail("bibd", f"at most {blocks:,} customers", f"{count:,}", cause)
    words = (1 - 2 * points.T[:count].astype(np.int8)).astype(np.int8)
    decide = functools.partial(_and_logic, points[:, :count], k, colluders)
    return Comparator(f"BIBD {kind} q={order}", words, colluders, False, decide)


def _and_logic(points: np.ndarray, k: int, colluders: int, y: np.ndarray, log_level: float) -> Decision:
    del log_level  # the published rule has no level
    v, y = len(points), statistics.direction(y)
    amplitude = y.sum() / (v - 2 * k)
    zeros = y < amplitude * (1 - 1 / colluders)
    # Without a positive amplitude no copy is there to be read, and the threshold would mean nothing.
    counts = zeros.astype(np.float64) @ points if amplitude > 0 else np.zeros(points.shape[1])
    guilty = np.flatnonzero(counts == k)
    return Decision(counts, -np.inf, float(k), guilty, np.full(guilty.size, np.nan))


def incidence(kind: Kind, order: int) -> Bool[np.ndarray, "v b"]:
    """Which points lie in which blocks (lines) of the plane over the integers modulo a prime.

    Projective: points and lines are the one-dimensional subspaces of F_q^3, incident when their product is 0. Affine:
    points (x, y), lines y = s x + c and x = c.

    Args:
      kind: ``"projective"`` or ``"affine"``.
      order: q, a prime.

    Returns:
      The incidence matrix: points in rows, blocks in columns.

    Raises:
      SmarkError: on an unknown kind or an order that is not prime.
    """
    if kind not in ("projective", "affine"):
        raise _validate.fail("bibd", "kind 'projective' or 'affine'", repr(kind), "Is the name spelt right?")
    _validate.positive("bibd", "order", order)
    if order < 2 or any(order % divisor == 0 for divisor in range(2, int(order**0.5) + 1)):
        cause = "Arithmetic modulo a composite number is no field, so two points could share no line, or several."
        raise _validate.fail("bibd", "a prime order", str(order), cause)
    field = np.arange(order)
    pairs = np.stack(np.meshgrid(field, field, indexing="ij"), -1).reshape(-1, 2)
    if kind == "projective":
        spaces = np.concatenate(
            [
                np.c_[np.ones(len(pairs), int), pairs],
                np.c_[np.zeros(order, int), np.ones(order, int), field],
                [[0, 0, 1]],
            ]
        )
        return spaces @ spaces.T % order == 0
    x, y = pairs.T
    sloped = (x[:, None] * pairs[:, 0] + pairs[:, 1] - y[:, None]) % order == 0
    return np.concatenate([sloped, x[:, None] == field], axis=1)


def bibd_capacity(num_chips: int, colluders: int) -> int:
    """The most customers that any (v, k, 1)-BIBD code with v <= ``num_chips`` could carry against ``colluders``.

    k = colluders + 1, and v (v - 1)/(k (k - 1)) blocks at the largest v that meets the necessary conditions: k - 1
    divides v - 1, k (k - 1) divides v (v - 1), and v >= k^2 - k + 1 (Fisher). An upper bound: for k >= 6 some
    admissible v have no design.

    Args:
      num_chips: m.
      colluders: K.

    Returns:
      The number of customers; 0 when there are too few chips for any design.

    Raises:
      SmarkError: when either is not a whole number of at least one.

    Examples:
      >>> from experiments.common import comparators
      >>> comparators.bibd_capacity(1024, 2), comparators.bibd_capacity(1024, 5)
      (174251, 34714)
    """
    _validate.positive("bibd_capacity", "num_chips", num_chips)
    _validate.positive("bibd_capacity", "colluders", colluders)
    k = colluders + 1
    for v in range(num_chips, k * k - k, -1):
        if (v - 1) % (k - 1) == 0 and v * (v - 1) % (k * (k - 1)) == 0:
            return v * (v - 1) // (k * (k - 1))
    return 0
