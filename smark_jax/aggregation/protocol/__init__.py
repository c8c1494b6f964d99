"""Secure aggregation between parties that do not trust each other, as a state machine of messages without a network.

Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning", figure 4, with signed
keys: pairwise masks cancel, a self mask protects words that were thought lost, shares of both secrets recover what
drop-outs leave behind, and survivors are agreed before anything is revealed. Masks are bound to task, round and roster
(Pasquini et al. 2022), and each party may mask with a few neighbours only (Bell et al. 2020).

Why agreement in advance is safe: a party agrees to "all members" along with its words, and perhaps later to one smaller
set, but reveals shares once, for one set. To collect both secrets of a party a server needs t answers about either set,
2 t <= n + c with c corrupt parties that answer twice. With t > 2n/3 and c < n/3 there are never so many.
"""

from smark_jax.aggregation.protocol import messages, party, server
from smark_jax.aggregation.protocol.parameters import Neighbourhood, ProtocolError, Setup, neighbourhood, setup
from smark_jax.aggregation.protocol.policy import Policy

__all__ = [
    "Neighbourhood",
    "Policy",
    "ProtocolError",
    "Setup",
    "messages",
    "neighbourhood",
    "party",
    "server",
    "setup",
]
