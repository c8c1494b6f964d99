r"""Pairwise masks: words that look uniform alone and cancel in the sum.

Each pair of parties {u, v} shares a 256-bit key k_uv. In a round, party u adds

.. math:: \sum_{v > u} PRG(k_{uv}) - \sum_{v < u} PRG(k_{uv}) \pmod{2^{32}}

to its words, PRG being the ChaCha20 keystream under a nonce that contains the round. Each key enters once with each
sign, so the masks sum to zero. (Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine
learning", section 4; its self-masks, with which parties may drop out, are for organisations, not for one program.)
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from jaxtyping import Array, UInt32

from smark_jax import _validate, keys
from smark_jax._types import AnyArray

# The nonce is (round, 0, purpose): a key never makes the same stream for two purposes or two rounds.
_MASK, _ROUNDING = 1, 2


def public_key(secret: keys.SecretKey) -> bytes:
    """The X25519 public key (RFC 7748, 32 bytes) that a party publishes so that others can agree a key with it."""
    return x25519.X25519PrivateKey.from_private_bytes(secret.to_bytes()).public_key().public_bytes_raw()


def agree(secret: keys.SecretKey, party: int, public_keys: Sequence[bytes]) -> UInt32[np.ndarray, "P 8"]:
    """The row of pair keys that one party holds, from its own secret and everybody's public keys.

    Entry v is the key that it shares with party v: HKDF of the X25519 shared secret, bound to the roster of all public
    keys. Its own entry is derived from its secret and shared with nobody.

    Args:
      secret: the party's X25519 private key.
      party: its number, 0 to P - 1.
      public_keys: the public keys of all P parties, in order of party.

    Returns:
      uint32, shape [P, 8].

    Raises:
      ValueError: when ``public_keys[party]`` does not belong to ``secret``, or a public key is malformed or repeated.
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
    """The rows of all parties, for a program that plays them all: row u is what :func:`agree` gives to party u.

    Args:
      secrets: the X25519 private key of each party.

    Returns:
      uint32, shape [P, P, 8], symmetric in its first two axes.

    Raises:
      ValueError: with zero parties, or two with the same secret.
    """
    if not secrets:
        raise _validate.fail("pair_keys", "secrets of at least one party", "zero parties", "Who takes part?")
    public_keys = [public_key(secret) for secret in secrets]
    return np.stack([agree(secret, party, public_keys) for party, secret in enumerate(secrets)])


def pairwise_mask(
    pair_keys: UInt32[AnyArray, "P 8"], party: int | Array, round: int | Array, num_words: int
) -> UInt32[Array, " num_words"]:
    """The words that a party adds to its message in a round; over all parties they sum to zero modulo 2^32.

    Runs under jit, vmap, pmap and shard_map, where ``party`` may be ``jax.lax.axis_index``.

    Args:
      pair_keys: the party's own row of pair keys, shape [P, 8].
      party: its number, 0 to P - 1.
      round: the round's number, below 2^32, never used twice with the same keys.
      num_words: how many words to mask; static.

    Returns:
      uint32, shape [num_words]; zeros for a single party.

    Raises:
      ValueError: when the keys have another shape, or (outside jit) the party is not one of theirs.
    """
    row = jnp.asarray(pair_keys)
    if row.ndim != 2 or row.shape[1] != 8 or row.dtype != jnp.uint32 or row.shape[0] == 0:
        got = f"{row.dtype}{list(row.shape)}"
        cause = "Pass the party's own row, pair_keys[party]."
        raise _validate.fail("pairwise_mask", "pair_keys of uint32[P, 8] with P >= 1", got, cause)
    num_parties = row.shape[0]
    if not _validate.is_traced(party) and not 0 <= int(party) < num_parties:
        cause = "Were keys agreed with all parties?"
        raise _validate.fail("pairwise_mask", f"a party from 0 to {num_parties - 1}", str(party), cause)
    return _pairwise_mask(row, jnp.asarray(party, jnp.int32), jnp.asarray(round, jnp.uint32), num_words)


@functools.partial(jax.jit, static_argnames="num_words")
def _pairwise_mask(row: Array, party: Array, round: Array, num_words: int) -> Array:
    num_parties = row.shape[0]
    nonce = _nonce(round, _MASK)

    def signed_stream(step: int | Array) -> Array:
        partner = (party + step) % num_parties
        stream = keys.keystream(row[partner], nonce, num_words)
        return jnp.where(partner > party, stream, -stream)

    if num_parties == 1:
        return jnp.zeros(num_words, jnp.uint32)
    mask = signed_stream(1)
    return jax.lax.fori_loop(2, num_parties, lambda step, total: total + signed_stream(step), mask)


def stream(key: keys.SecretKey, round: int, num_words: int) -> UInt32[np.ndarray, " num_words"]:
    """The mask that a key gives in a round, on the host: what :func:`pairwise_mask` adds for a pair with this key."""
    nonce = np.array([0, round, 0, _MASK], "<u4").tobytes()  # block counter, then the nonce (RFC 8439, section 2.3)
    encryptor = Cipher(algorithms.ChaCha20(key.to_bytes(), nonce), None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * num_words)), "<u4").astype(np.uint32)


def rounding_key(pair_keys: UInt32[AnyArray, "P 8"], party: int | Array, round: int | Array) -> Array:
    """The ``jax.random`` key with which a party rounds in a round, from the entry of its row that nobody shares."""
    words = keys.keystream(jnp.asarray(pair_keys)[party], _nonce(round, _ROUNDING), 2)
    # Parties that were given equal keys for testing still round independently.
    return jax.random.fold_in(jax.random.wrap_key_data(words, impl="threefry2x32"), party)


def _nonce(round: int | Array, purpose: int) -> Array:
    return jnp.stack([jnp.asarray(round, jnp.uint32), jnp.uint32(0), jnp.uint32(purpose)])
