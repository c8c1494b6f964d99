r"""n oblivious transfers at once: the customer receives one of two keys each, and the owner does not learn which.

The protocol is "the simplest" of Chou and Orlandi (2015). The owner publishes :math:`A = aG`. For choice
:math:`c_i \in \{0, 1\}`, the customer draws :math:`b_i` and sends :math:`B_i = b_i G + c_i A`. The keys are

.. math:: k_i^0 = H(i, A, B_i, a B_i), \quad k_i^1 = H(i, A, B_i, a (B_i - A)),
          \quad k_i^{c_i} = H(i, A, B_i, b_i A)

with H = SHA-256 over a label, the context and these values. A word's chip of +1 is choice 0, and -1 is choice 1.

Formal guarantees. :math:`B_i` is uniform whatever :math:`c_i` is, so the choices are hidden unconditionally. The signed
:math:`B_i` bind the customer: opening one both ways gives the discrete logarithm of A, and the key of the other choice
takes a solution of the computational Diffie-Hellman problem (in the random-oracle model). The owner knows a, and so
could open any :math:`B_i` both ways: an opening counts only under the customer's signature.
"""

import hashlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, keys
from smark_jax.licence import group

_LABEL = b"smark licence transfer v1"


class Choices(NamedTuple):
    """What only the customer knows. Nothing prints it.

    Attributes:
      scalars: b_i, 32 bytes each, n of them.
      word: the secret word c, int8 chips of -1 and +1, shape [n].
    """

    scalars: bytes
    word: np.ndarray

    def __repr__(self) -> str:
        return f"Choices({len(self.word)} hidden)"

    @property
    def bits(self) -> np.ndarray:
        """c_i as 0 and 1, shape [n]."""
        return (self.word < 0).astype(np.uint8)


def draw(num_choices: int) -> Choices:
    """Fresh choices from the operating system's entropy: a uniform word, and a uniform scalar for each chip."""
    _validate.positive("licence", "num_choices", num_choices)
    bits = np.unpackbits(np.frombuffer(os.urandom(-(-num_choices // 8)), np.uint8), count=num_choices)
    return Choices(b"".join(group.random_scalar() for _ in range(num_choices)), 1 - 2 * bits.astype(np.int8))


def points(choices: Choices, owner: bytes) -> bytes:
    """The points B_i, 32 bytes each: what the customer sends.

    Args:
      choices: the customer's.
      owner: the owner's point A.
    """
    found = []
    for scalar, bit in zip(split(choices.scalars), choices.bits, strict=True):
        point = group.times_base(scalar)
        found.append(group.add(point, owner) if bit else point)
    return b"".join(found)


def owner_keys(secret: bytes, sent: bytes, context: bytes) -> list[tuple[keys.SecretKey, keys.SecretKey]]:
    """Both keys of each transfer: that of chip +1, and that of chip -1.

    Args:
      secret: the owner's scalar a.
      sent: the points B_i.
      context: what the keys are bound to.
    """
    owner = group.times_base(secret)
    twice = group.times(secret, owner)
    found = []
    for number, point in enumerate(split(sent)):
        shared = group.times(secret, point)
        both = shared, group.subtract(shared, twice)
        first, second = (_key(context, number, owner, point, one) for one in both)
        found.append((first, second))
    return found


def customer_keys(choices: Choices, owner: bytes, sent: bytes, context: bytes) -> list[keys.SecretKey]:
    """The one key of each transfer that the customer can compute."""
    pairs = zip(split(choices.scalars), split(sent), strict=True)
    return [_key(context, i, owner, point, group.times(scalar, owner)) for i, (scalar, point) in enumerate(pairs)]


def fits(scalar: bytes, bit: int, owner: bytes, point: bytes) -> bool:
    """Whether (b_i, c_i) opens B_i."""
    if not group.is_scalar(scalar):
        return False
    own = group.times_base(scalar)
    return (group.add(own, owner) if bit else own) == point


def split(joined: bytes) -> Sequence[bytes]:
    """Points or scalars one by one."""
    return [joined[start : start + group.SIZE] for start in range(0, len(joined), group.SIZE)]


def _key(context: bytes, number: int, owner: bytes, point: bytes, shared: bytes) -> keys.SecretKey:
    text = _LABEL + len(context).to_bytes(4, "big") + context + number.to_bytes(4, "big") + owner + point + shared
    return keys.from_bytes(hashlib.sha256(text).digest())
