"""Licences: a second fingerprint of each copy that only its customer knows, and that alone convicts.

The owner's codeword finds the leaker. But the owner knows it, and so could put it into any model. Beside it, a licensed
copy carries a secret word that the customer draws and the owner embeds without learning it: both variants of each of n
segments are sent sealed, and the customer can open one of each. In a dispute the accused opens a part of its word. A
suspect that carries it was made from this customer's copy; an owner who frames a customer has to guess it.

The steps, each a file: :func:`sign_offer` (owner), :func:`request` (customer), :func:`package` (owner), :func:`unpack`
(customer). In a dispute: a challenge with the keys of a part (owner), :func:`answer` (customer) or
:func:`answer_deposit` (the arbiter whom the customer named), :func:`opened_word` and :func:`convict` (anybody).

The documents and what is signed: :mod:`smark_jax.licence.documents`; the transfers and their guarantee:
:mod:`smark_jax.licence.transfer`; the bound on convicting the innocent: :mod:`smark_jax.licence.conviction`.
"""

from smark_jax.licence.conviction import (
    Conviction,
    answer,
    answer_deposit,
    check_challenge,
    convict,
    opened_word,
    order,
    shifts,
)
from smark_jax.licence.documents import Answer, Arbiter, Challenge, Offer, Package, Request, SignedOffer, SignedRequest
from smark_jax.licence.identities import Identity
from smark_jax.licence.issuing import package, unpack
from smark_jax.licence.packages import Damaged
from smark_jax.licence.requests import Secrets, check, check_offer, request, scalar, sign_offer

__all__ = [
    "Answer",
    "Arbiter",
    "Challenge",
    "Conviction",
    "Damaged",
    "Identity",
    "Offer",
    "Package",
    "Request",
    "Secrets",
    "SignedOffer",
    "SignedRequest",
    "answer",
    "answer_deposit",
    "check",
    "check_challenge",
    "check_offer",
    "convict",
    "opened_word",
    "order",
    "package",
    "request",
    "scalar",
    "shifts",
    "sign_offer",
    "unpack",
]
