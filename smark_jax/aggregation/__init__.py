"""Masked aggregation: parties' updates as fixed-point words under pairwise masks that cancel in the sum.

A party's update becomes integers modulo 2^32 (:func:`encode`), to which it adds a mask made from pairwise shared keys
(:func:`pairwise_mask`). Without the pair keys, each masked message alone is uniform noise; the sum of all messages is
the exact sum of the integers (:func:`decode`). Within one program nothing more is needed. Between organisations, where
parties drop out and the server may lie, use the state machine of :mod:`~smark_jax.aggregation.protocol`. The sum
remains visible: use differential privacy where even the sum reveals too much.
"""

import importlib
from typing import TYPE_CHECKING, Any

from smark_jax.aggregation.exchange import agree, pair_keys, public_key
from smark_jax.aggregation.protocol import Neighbourhood, ProtocolError, neighbourhood

if TYPE_CHECKING:
    from smark_jax.aggregation.fixed_point import FixedPoint, decode, decode_weighted, encode, encode_weighted, stack
    from smark_jax.aggregation.masks import pairwise_mask, rounding_key
    from smark_jax.aggregation.rounds import RoundResult, run_round

__all__ = [
    "FixedPoint",
    "Neighbourhood",
    "ProtocolError",
    "RoundResult",
    "agree",
    "decode",
    "decode_weighted",
    "encode",
    "encode_weighted",
    "neighbourhood",
    "pair_keys",
    "pairwise_mask",
    "public_key",
    "rounding_key",
    "run_round",
    "stack",
]

_NEED_JAX = {
    "fixed_point": ("FixedPoint", "decode", "decode_weighted", "encode", "encode_weighted", "stack"),
    "masks": ("pairwise_mask", "rounding_key"),
    "rounds": ("RoundResult", "run_round"),
}


def __getattr__(name: str) -> Any:
    # jax takes half a second to load, and Flower starts a process per message to a client; most of these need no jax.
    for module, names in _NEED_JAX.items():
        if name in names:
            return getattr(importlib.import_module(f"smark_jax.aggregation.{module}"), name)
    raise AttributeError(f"module 'smark_jax.aggregation' has no attribute {name!r}")
