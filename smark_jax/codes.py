"""Codewords: m unbiased chips in {-1, +1} for each customer, from a keyed stream.

The word of serial s is the ChaCha20 keystream of the code key under the nonce (0, s mod 2^32, s div 2^32). So any
customer's word can be computed without the others', nobody without the key can tell words from independent coin flips,
and no word was ever filtered or redrawn. The bound of :mod:`smark_jax.statistics` rests on that (its assumption A1).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8, UInt32

from smark_jax import _validate, chacha, keys
from smark_jax._types import AnyArray


def codebook(
    key: keys.SecretKey, serials: Sequence[int] | Int[AnyArray, " K"], num_chips: int = 304
) -> Int8[Array, "K m"]:
    """The codewords of these customers.

    A longer word begins with the shorter one of the same serial.

    Args:
      key: the model's code key.
      serials: the customers' distinct numbers, 0 to 2^63 - 1, shape [K]; 64-bit NumPy integers or a list.
      num_chips: m.

    Returns:
      Chips of -1 and +1, shape [K, m].

    Raises:
      SmarkError: on duplicate, negative or non-integer serials, or no chips.

    Examples:
      >>> from smark_jax import codes, keys
      >>> codes.codebook(keys.from_bytes(bytes(32)), [0, 7], num_chips=304).shape
      (2, 304)
    """
    _validate.positive("codebook", "num_chips", num_chips)
    numbers = _validate.serials("codebook", serials).astype(np.uint64)
    low = (numbers & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    high = (numbers >> np.uint64(32)).astype(np.uint32)
    return words(key.to_words(), jnp.asarray(low), jnp.asarray(high), num_chips)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """The words of customers 0 to N - 1, computed when needed; the whole codebook is never in memory.

    Attributes:
      key: the model's code key.
      num_customers: N.
      num_chips: m.
    """

    key: keys.SecretKey
    num_customers: int
    num_chips: int = 304

    def __post_init__(self) -> None:
        _validate.positive("Codebook", "num_customers", self.num_customers)
        _validate.positive("Codebook", "num_chips", self.num_chips)
        if self.num_customers > 2**31:
            cause = "Split the registry, or pass the serials in question to codes.codebook."
            raise _validate.fail("Codebook", "at most 2^31 customers", f"{self.num_customers:,}", cause)


@functools.partial(jax.jit, static_argnames="num_chips")
def words(
    key: UInt32[Array, "8"], low: UInt32[Array, " K"], high: UInt32[Array, " K"], num_chips: int
) -> Int8[Array, "K m"]:
    """The codewords of serials ``low + 2^32 high``, under jit: :func:`codebook` without the validation.

    Args:
      key: eight words of the code key.
      low: the serials' low words, shape [K].
      high: their high words, shape [K].
      num_chips: m, static.

    Returns:
      Chips of -1 and +1, shape [K, m].
    """
    packed = packed_words(key, low, high, num_chips)
    return 1 - 2 * chacha.bits(packed.T)[:, :num_chips].astype(jnp.int8)


@functools.partial(jax.jit, static_argnames="num_chips")
def packed_words(
    key: UInt32[Array, "8"], low: UInt32[Array, " K"], high: UInt32[Array, " K"], num_chips: int
) -> UInt32[Array, "words K"]:
    """The same codewords packed into bits, 1 for a chip of -1, shape [ceil(m / 32), K]; bits past m are random.

    Bit i of word w is chip 32 w + i. Customers are the last axis, since scoring takes one word of many customers at a
    time.
    """
    blocks_per_word = -(-num_chips // (32 * chacha.BLOCK_WORDS))
    counters = jnp.arange(blocks_per_word, dtype=jnp.uint32)[:, None]

    def pack(numbers: tuple[Array, Array]) -> Array:
        rows = jnp.stack(
            [jnp.broadcast_to(row, (blocks_per_word, step)) for row in (counters, jnp.uint32(0), *numbers)]
        )
        words = jnp.stack(chacha.word_by_word(key, rows), axis=1)  # [blocks per codeword, 16, K]
        return words.reshape(-1, step)[: -(-num_chips // 32)]

    count = low.shape[0]
    step = min(count, max(1, chacha.BLOCKS_PER_PASS // blocks_per_word))
    if step == count:
        return pack((low, high))
    padded = [jnp.pad(part, (0, -count % step)).reshape(-1, step) for part in (low, high)]
    found = jax.lax.map(pack, tuple(padded))  # [passes, words, K]
    return found.swapaxes(0, 1).reshape(found.shape[1], -1)[:, :count]
