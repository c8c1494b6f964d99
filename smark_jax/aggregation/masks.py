r"""Pairwise masks: words that look uniform alone and cancel in the sum.

Each pair of parties {u, v} shares a 256-bit key k_uv. In a round, party u adds

.. math:: \sum_{v > u} PRG(k_{uv}) - \sum_{v < u} PRG(k_{uv}) \pmod{2^{32}}

to its words, where PRG is the ChaCha20 keystream under a nonce that contains the round. Each key enters once with each
sign, so the masks sum to zero. (Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine
learning", section 4. Its self-masks, which let parties drop out, are needed between organisations, not in one program.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from smark_jax import _validate, chacha
from smark_jax._types import AnyArray
from smark_jax.aggregation.exchange import MASK

# At least this many blocks of each stream are made at a time, however many partners there are.
_FEWEST_BLOCKS = 64
# Words of OpenSSL's streams at a time: more leave the core's cache, fewer make parties' threads wait for each other.
_WORDS_PER_CALL = 1 << 17


def pairwise_mask(
    pair_keys: UInt32[AnyArray, "P 8"], party: int | Array, round: int | Array, num_words: int
) -> UInt32[Array, " num_words"]:
    """The words that a party adds to its message in a round; their sum over all parties is zero modulo 2^32.

    Runs under jit, vmap, pmap and shard_map, where ``party`` may be ``jax.lax.axis_index``.

    Args:
      pair_keys: the party's own row of pair keys, shape [P, 8].
      party: its number, 0 to P - 1.
      round: the round's number, below 2^32, never used twice with the same keys.
      num_words: how many words to mask; static.

    Returns:
      uint32, shape [num_words]; zeros for a single party.

    Raises:
      SmarkError: when the keys have another shape, or (outside jit) the party's number is out of their range.
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
    if row.shape[0] == 1:
        return jnp.zeros(num_words, jnp.uint32)
    on_host, on_device = (
        functools.partial(_called, num_words=num_words),
        functools.partial(_drawn, num_words=num_words),
    )
    return chacha.by_platform(on_host, on_device, num_words, row, party, round)


def _called(row: AnyArray, party: int | AnyArray, round: int | AnyArray, num_words: int) -> np.ndarray:
    """The mask by OpenSSL."""
    nonce, party = np.array([round, 0, MASK], np.uint32), int(party)
    streams = [
        (np.add if partner > party else np.subtract, chacha.stream(key, nonce))
        for partner, key in enumerate(np.asarray(row))
        if partner != party
    ]
    total, words = np.zeros(num_words, np.uint32), np.empty(_WORDS_PER_CALL, "<u4")
    for start in range(0, num_words, _WORDS_PER_CALL):
        part = total[start : start + _WORDS_PER_CALL]
        for combine, fill in streams:
            fill(words[: part.size])
            combine(part, words[: part.size], out=part)
    return total


def _drawn(row: Array, party: Array, round: Array, num_words: int) -> Array:
    """The mask by XLA."""
    num_parties = row.shape[0]
    partners = (party + jnp.arange(1, num_parties)) % num_parties
    keys = row[partners].T[:, :, None]  # [8, P - 1, 1]
    signs = jnp.where(partners > party, jnp.uint32(1), jnp.uint32(2**32 - 1))
    # All partners' streams are made side by side, a few blocks at a time: memory never holds a whole stream.
    width = max(_FEWEST_BLOCKS, chacha.BLOCKS_PER_PASS // (num_parties - 1))
    width = min(width, -(-num_words // chacha.BLOCK_WORDS))
    nonce = (round, jnp.uint32(0), jnp.uint32(MASK))

    def sums(first: Array) -> Array:
        counters = first + jnp.arange(width, dtype=jnp.uint32)
        rows = jnp.stack([counters, *(jnp.broadcast_to(word, width) for word in nonce)])
        rows = jnp.broadcast_to(rows[:, None], (4, num_parties - 1, width))
        words = chacha.word_by_word(keys, rows)
        return jnp.stack([jnp.sum(signs[:, None] * word, axis=0, dtype=jnp.uint32) for word in words], axis=-1)

    starts = jnp.arange(0, -(-num_words // chacha.BLOCK_WORDS), width, dtype=jnp.uint32)
    return jax.lax.map(sums, starts).reshape(-1)[:num_words]


def rounding_key(pair_keys: UInt32[AnyArray, "P 8"], party: int | Array, round: int | Array) -> Array:
    """The ``jax.random`` key for a party's rounding in a round, derived from the entry of its row that it alone has."""
    # Rounding needs no secret, so 64 bits of the entry do, and no cipher is called for them.
    own = jax.random.wrap_key_data(jnp.asarray(pair_keys)[party][:2], impl="threefry2x32")
    # The party's number is folded in, so that parties with equal keys (in tests) still round independently.
    return jax.random.fold_in(jax.random.fold_in(own, round), party)
