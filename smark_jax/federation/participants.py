"""Fingerprints in the models sent to participants, who may leak them too."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smark_jax import carriers, keys


class Fingerprints(NamedTuple):
    """Settings that give every participant's model its own fingerprint.

    Attributes:
      key: the model's key; carrier and codewords are derived from it as ``keys.derive(key, "carrier")`` and
        ``keys.derive(key, "code")``.
      num_chips: m.
      strength: per-weight strength relative to a layer's spread, as for :func:`smark_jax.embedding.embed`.
    """

    key: keys.SecretKey
    num_chips: int = 304
    strength: float = 0.03


def participant_mark(params: Mapping[str, np.ndarray], fingerprints: Fingerprints) -> carriers.Mark:
    """The mark of participants' copies, for :func:`smark_jax.extraction.extract`.

    The mark differs between rounds: a bias that starts at zero carries nothing in the first round, but does later. So
    trace a copy from some round with the mark that this function returns for the global model of that same round.

    Args:
      params: the arrays, by name, of the global model from which the round's copies were made.
      fingerprints: the strategy's settings.
    """
    return carriers.mark(keys.derive(fingerprints.key, "carrier"), dict(params), fingerprints.num_chips)
