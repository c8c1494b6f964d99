"""Fingerprints in what participants are given, who are suspects too."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smark_jax import carriers, keys


class Fingerprints(NamedTuple):
    """A fingerprint of its own in every model that a participant is given.

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

    It differs from round to round: a bias that is zero at the start carries nothing in the first round, and something
    later. So trace a copy of a round with what this returns for that round's own global model, and for no other.

    Args:
      params: arrays by name of the global model from which the round's copies were made.
      fingerprints: the strategy's.
    """
    return carriers.mark(keys.derive(fingerprints.key, "carrier"), dict(params), fingerprints.num_chips)
