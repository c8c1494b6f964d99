"""Keys that only two parties share, and the keystream of such a key on the host."""

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from jaxtyping import UInt32

from smark_jax import _validate, keys

MASK = 1
"""The nonce of a mask's keystream is (round, 0, MASK), so that no stream repeats between purposes or rounds."""


def public_key(secret: keys.SecretKey) -> bytes:
    """The X25519 public key (RFC 7748, 32 bytes) that a party publishes so that others can agree a key with it."""
    return x25519.X25519PrivateKey.from_private_bytes(secret.to_bytes()).public_key().public_bytes_raw()


def agree(secret: keys.SecretKey, party: int, public_keys: Sequence[bytes]) -> UInt32[np.ndarray, "P 8"]:
    """The row of pair keys that one party holds, from its own secret and all public keys.

    Entry v is the key that it shares with party v: HKDF of the X25519 shared secret, bound to the roster of all public
    keys. The party's own entry is derived from its secret, and nobody else has it.

    Args:
      secret: the party's X25519 private key.
      party: its number, 0 to P - 1.
      public_keys: the public keys of all P parties, in order of party.

    Returns:
      uint32, shape [P, 8].

    Raises:
      SmarkError: when ``public_keys[party]`` does not belong to ``secret``, or a public key is malformed or repeated.
    """
    if len(set(public_keys)) < len(public_keys):
        cause = "Each party draws its own secret with keys.new()."
        raise _validate.fail("agree", "a public key of its own from each party", "the same one twice", cause)
    if not 0 <= party < len(public_keys) or public_keys[party] != public_key(secret):
        cause = "Is the roster in order of party?"
        raise _validate.fail("agree", f"this party's own public key at place {party}", "another key", cause)
    own = x25519.X25519PrivateKey.from_private_bytes(secret.to_bytes())
    roster = b"".join(public_keys).hex()
    row = []
    for v, other in enumerate(public_keys):
        shared = secret.to_bytes() if v == party else own.exchange(x25519.X25519PublicKey.from_public_bytes(other))
        purpose = "own" if v == party else "pair"
        row.append(keys.derive(keys.from_bytes(shared), purpose, roster).to_words())
    return np.stack(row)


def pair_keys(secrets: Sequence[keys.SecretKey]) -> UInt32[np.ndarray, "P P 8"]:
    """The rows of all parties, for a program that runs all of them: row u is what :func:`agree` gives to party u.

    Args:
      secrets: the X25519 private key of each party.

    Returns:
      uint32, shape [P, P, 8], symmetric in its first two axes.

    Raises:
      SmarkError: with zero parties, or two with the same secret.
    """
    if not secrets:
        raise _validate.fail("pair_keys", "secrets of at least one party", "zero parties", "Who takes part?")
    public_keys = [public_key(secret) for secret in secrets]
    return np.stack([agree(secret, party, public_keys) for party, secret in enumerate(secrets)])


def stream(key: keys.SecretKey, round: int, num_words: int) -> UInt32[np.ndarray, " num_words"]:
    """The mask of a key in a round, computed on the host: ``pairwise_mask`` adds it for a pair with this key."""
    # Not by chacha.openssl, since that module loads JAX, and parties of the protocol do without.
    nonce = np.array([0, round, 0, MASK], "<u4").tobytes()  # block counter, then the nonce (RFC 8439, section 2.3)
    encryptor = Cipher(algorithms.ChaCha20(key.to_bytes(), nonce), None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * num_words)), "<u4").astype(np.uint32)
