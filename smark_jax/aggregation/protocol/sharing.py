"""Shamir's secret sharing of 32-byte keys. Since pycryptodome shares 16 bytes, each half is shared by itself."""

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

from smark_jax import keys

SHARE_BYTES = 32


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
    halves = [Shamir.split(threshold, num_shares, whole[start : start + 16], False) for start in (0, 16)]
    return [first + second for (_, first), (_, second) in zip(*halves, strict=True)]


def combine(shares: Mapping[int, bytes], threshold: int) -> keys.SecretKey:
    """The secret from at least ``threshold`` shares by place in the list that :func:`split` returned.

    Wrong shares give a wrong secret without notice: compare with a commitment.
    """
    chosen = sorted(shares.items())[:threshold]
    halves = [Shamir.combine([(i + 1, share[start : start + 16]) for i, share in chosen], False) for start in (0, 16)]
    return keys.from_bytes(halves[0] + halves[1])
