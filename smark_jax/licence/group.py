"""The group of the transfers: the prime-order subgroup of edwards25519 (RFC 8032), by libsodium through PyNaCl.

Points and scalars are their 32-byte encodings. Scalars are taken modulo the group's order L = 2^252 + ...
"""

import functools
import os
from types import ModuleType

from smark_jax import _validate

SIZE = 32
"""Bytes of an encoded point or scalar."""


@functools.cache
def _sodium() -> ModuleType:
    with _validate.needs("licence", "licence"):
        import nacl.bindings

    return nacl.bindings


def random_scalar() -> bytes:
    """A scalar that is uniform modulo L, up to 2^-259, from the operating system's entropy."""
    return scalar(os.urandom(64))


def scalar(wide: bytes) -> bytes:
    """64 bytes as a number modulo L."""
    return _sodium().crypto_core_ed25519_scalar_reduce(wide)


def times_base(number: bytes) -> bytes:
    """The point ``number`` G, with the standard base point G."""
    return _sodium().crypto_scalarmult_ed25519_base_noclamp(number)


def times(number: bytes, point: bytes) -> bytes:
    """The point ``number`` P."""
    return _sodium().crypto_scalarmult_ed25519_noclamp(number, point)


def add(one: bytes, other: bytes) -> bytes:
    """The sum of two points."""
    return _sodium().crypto_core_ed25519_add(one, other)


def subtract(one: bytes, other: bytes) -> bytes:
    """The difference of two points."""
    return _sodium().crypto_core_ed25519_sub(one, other)


def is_point(encoded: bytes) -> bool:
    """Whether this is the canonical encoding of a point of order L: not the identity, and none of small order."""
    return len(encoded) == SIZE and bool(_sodium().crypto_core_ed25519_is_valid_point(encoded))


def is_scalar(encoded: bytes) -> bool:
    """Whether this is the canonical encoding of a nonzero scalar."""
    return len(encoded) == SIZE and encoded != bytes(SIZE) and scalar(encoded + bytes(SIZE)) == encoded
