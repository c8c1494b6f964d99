"""Masked aggregation: parties' updates as fixed-point words under pairwise masks that cancel in the sum.

A party's update becomes integers modulo 2^32 (:func:`encode`), and a mask from keys shared pairwise is added
(:func:`pairwise_mask`). Each masked message alone is uniform noise to whoever lacks the pair keys; the sum of all
messages is the exact sum of the integers (:func:`decode`). Inside one program that is all. Between organisations, where
parties drop out and the server may lie, :mod:`~smark_jax.aggregation.protocol` is the state machine. What remains
visible is that sum: use differential privacy where even it says too much.
"""

from smark_jax.aggregation.fixed_point import FixedPoint, decode, decode_weighted, encode, encode_weighted, stack
from smark_jax.aggregation.masks import agree, pair_keys, pairwise_mask, public_key, rounding_key
from smark_jax.aggregation.protocol import Neighbourhood, ProtocolError, RoundResult, neighbourhood, run_round

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
