r"""Undoes factors of channels, as of batch norm that was folded into a kernel, or taken out of one.

A runtime that folds batch norm stores :math:`s_c W_c` in place of the kernel's channel :math:`W_c`. The suspect's
factors are estimated from its kernel V and the base's kernel W alone, channel by channel by least squares,

.. math:: s_c = \langle V_c, W_c \rangle / \langle W_c, W_c \rangle ,

and divided out if they explain the suspect far better than the kernel as it is: if they leave less than a quarter of
the squared difference. A channel that its factor does not explain, since it is dead in the base or the suspect has
rounded it away, becomes NaN, which no reading counts. No codeword takes part, so the bound on false accusations holds.
Of a mark, the estimate takes its component along each :math:`W_c`: one part in as many as the channel has weights.
"""

from typing import NamedTuple

import numpy as np

from smark_jax.files import _changes

_LEAST = 8  # weights in a channel: of fewer, the factor would explain too much by itself
_SAMPLE = 1 << 14
_DIFFERENT = 0.05  # of the squared norm: useful copies that nobody folded are closer to the base
_LEFT = 0.25
_TOLD = 0.5  # of a channel's squared norm, that its factor explains; else it is left out, as a dead one is


class _Fit(NamedTuple):
    """Least squares along one axis, with one value for each channel, shaped to multiply a leaf.

    Attributes:
      axis: the axis.
      factors: the factor, NaN where it explains too little of its channel.
      left: the squared difference that the factors leave of all the leaf.
    """

    axis: int
    factors: np.ndarray
    left: float


def undone(leaf: np.ndarray, base: np.ndarray) -> tuple[np.ndarray, str]:
    """The suspect's leaf without factors of channels, and in words what was done; the leaf itself if there are none.

    Args:
      leaf: the suspect's leaf, in the base's shape.
      base: the base's leaf.
    """
    if leaf.shape != base.shape or len(_changes.squeezed(base.shape)) < 2 or not _differs(leaf, base):
        return leaf, ""
    with np.errstate(all="ignore"):
        there = np.isfinite(leaf)
        theirs = np.where(there, leaf, 0).astype(np.float32)
        ours = np.where(there, base, 0).astype(np.float32)
        axes = [axis for axis, size in enumerate(base.shape) if size > 1 and base.size // size >= _LEAST]
        fits = [_fit(theirs, ours, axis) for axis in axes]
        best = min(fits, key=lambda fit: fit.left, default=None)
        whole = float(np.square(theirs - ours, dtype=np.float64).sum())
        if best is None or not best.left < _LEFT * whole:
            return leaf, ""
        values = leaf / best.factors.astype(np.result_type(leaf.dtype, np.float32))
    return values, f"factors along axis {best.axis} undone"


def _differs(leaf: np.ndarray, base: np.ndarray) -> bool:
    """Whether a sample of the leaf is so far from the base's that factors are worth a look."""
    index = np.unravel_index(np.linspace(0, leaf.size - 1, min(leaf.size, _SAMPLE)).astype(np.int64), leaf.shape)
    with np.errstate(all="ignore"):
        theirs, ours = leaf[index].astype(np.float64), base[index].astype(np.float64)
        there = np.isfinite(theirs)
        return bool(np.square(theirs - ours)[there].sum() > _DIFFERENT * np.square(ours)[there].sum())


def _fit(theirs: np.ndarray, ours: np.ndarray, axis: int) -> _Fit:
    """The factors along one axis that explain their leaf best by ours."""
    others = tuple(other for other in range(ours.ndim) if other != axis)
    product = np.multiply(theirs, ours, dtype=np.float64).sum(others, keepdims=True)
    norm = np.square(ours, dtype=np.float64).sum(others, keepdims=True)
    power = np.square(theirs, dtype=np.float64).sum(others, keepdims=True)
    factors = product / np.where(norm > 0, norm, 1)
    told = factors * product > _TOLD * power
    return _Fit(axis, np.where(told, factors, np.nan), float((power - factors * product).sum()))
