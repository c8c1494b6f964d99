"""Masked aggregation over Flower, for organisations that do not trust each other (extra ``flower``).

A client adds :func:`masked_mod` to its ClientApp, and the server wraps its strategy in :class:`Masked`. Flower carries
the messages; :mod:`smark_jax.aggregation.protocol` decides which messages are allowed.
"""

import importlib
from typing import TYPE_CHECKING, Any

from smark_jax import _validate

with _validate.needs("smark_jax.federation", "flower"):
    import flwr  # noqa: F401

from smark_jax.federation.mod import masked_mod

if TYPE_CHECKING:
    from smark_jax.federation.strategy import Fingerprints, Masked, RoundLog, participant_mark

__all__ = ["Fingerprints", "Masked", "RoundLog", "masked_mod", "participant_mark"]


def __getattr__(name: str) -> Any:
    # Flower starts a client process for every message; importing the server's side there would only cost time.
    if name in __all__:
        return getattr(importlib.import_module("smark_jax.federation.strategy"), name)
    raise AttributeError(f"module 'smark_jax.federation' has no attribute {name!r}")
