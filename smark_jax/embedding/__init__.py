r"""Embedding a codeword in a model: in closed form, without data, or by training; and what that costs.

In closed form a copy is ``w + delta * spread(word, mark)`` with

.. math:: \delta = \text{strength} \sqrt{D' / m},

where D' is the number of coordinates that the carrier covers. So the RMS change of a coordinate is ``strength`` times
its scale. The read-out of an intact copy is ``delta * word``. :func:`calibrate` finds the strength that a model bears,
:func:`measure` what a copy costs, and :func:`plan` what can then be traced.

Trained embedding minimises a fingerprint loss of the read-out together with the loss of the task::

    optax.chain(add_fingerprint_gradient(losses.sign_hinge, mark, word), optax.adam(1e-3))
"""

from smark_jax.embedding.copies import embed, embed_batch
from smark_jax.embedding.costs import (
    MAX_CHANGE,
    Answers,
    Calibration,
    Cost,
    Intervals,
    Measured,
    answers,
    calibrate,
    measure,
)
from smark_jax.embedding.gradients import FingerprintLoss, FingerprintState, add_fingerprint_gradient
from smark_jax.embedding.plans import Plan, Row, plan

__all__ = [
    "MAX_CHANGE",
    "Answers",
    "Calibration",
    "Cost",
    "FingerprintLoss",
    "FingerprintState",
    "Intervals",
    "Measured",
    "Plan",
    "Row",
    "add_fingerprint_gradient",
    "answers",
    "calibrate",
    "embed",
    "embed_batch",
    "measure",
    "plan",
]
