"""Codewords: m unbiased chips in {-1, +1} for each customer, from a keyed stream.

Chips 512 k to 512 k + 511 of serial s are block s mod 2^32 of the ChaCha20 keystream of the code key under the nonce
(k, s div 2^32, 2^31). So any customer's word can be computed without the others', the words of many serials in a row
are one piece of a stream, nobody without the key can tell words from independent coin flips, and no word was ever
filtered or redrawn. The bound of :mod:`smark_jax.statistics` rests on that (its assumption A1).

Version 1 had a stream for each serial: nonce (0, s mod 2^32, s div 2^32), blocks 0, 1, ... It reads old vaults. The two
never share a block, since serials are below 2^63.

An owner may have to show that nobody chose the words. Then each is the XOR of the owner's own word, from the code key,
and of the public word of the same serial, from the key of a public value that came after the own words were committed
to (:mod:`smark_jax.vault.drafts`). Whatever the own words are, the XOR is as random as the public stream.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int8, UInt32

from smark_jax import _validate, chacha, keys
from smark_jax._types import AnyArray

VERSION = 2
"""How new codes draw their words."""
_VERSION_2 = np.uint32(1 << 31)
# OpenSSL is called for each run of serials; if there are more runs, compiled code is faster.
_MOST_CALLS = 4096


def codebook(
    key: keys.SecretKey,
    serials: Sequence[int] | Int[AnyArray, " K"],
    num_chips: int = 304,
    version: int = VERSION,
    public: keys.SecretKey | None = None,
) -> Int8[Array, "K m"]:
    """The codewords of these customers.

    A longer word begins with the shorter one of the same serial.

    Args:
      key: the model's code key.
      serials: the customers' distinct numbers, 0 to 2^63 - 1, shape [K]; 64-bit NumPy integers or a list.
      num_chips: m.
      version: 1 for codes that were made before version 2.
      public: the key of the public words that the own ones are multiplied by (bits: XOR); None for own words alone.

    Returns:
      Chips of -1 and +1, shape [K, m].

    Raises:
      SmarkError: on duplicate, negative or non-integer serials, no chips, or an unknown version.

    Examples:
      >>> from smark_jax import codes, keys
      >>> codes.codebook(keys.from_bytes(bytes(32)), [0, 7], num_chips=304).shape
      (2, 304)
    """
    _validate.positive("codebook", "num_chips", num_chips)
    _check("codebook", version)
    numbers = _validate.serials("codebook", serials).astype(np.uint64)
    return jnp.asarray(_chips(packed_words(key, numbers, num_chips, version, public), num_chips))


@dataclasses.dataclass(frozen=True)
class Codebook:
    """The words of customers 0 to N - 1, computed when needed; the whole codebook is never in memory.

    Attributes:
      key: the model's code key.
      num_customers: N.
      num_chips: m.
      version: as for :func:`codebook`.
      public: as for :func:`codebook`.
    """

    key: keys.SecretKey
    num_customers: int
    num_chips: int = 304
    version: int = VERSION
    public: keys.SecretKey | None = None

    def __post_init__(self) -> None:
        _validate.positive("Codebook", "num_customers", self.num_customers)
        _validate.positive("Codebook", "num_chips", self.num_chips)
        _check("Codebook", self.version)
        if self.num_customers > 2**31:
            cause = "Split the registry, or pass the serials in question to codes.codebook."
            raise _validate.fail("Codebook", "at most 2^31 customers", f"{self.num_customers:,}", cause)

    def words(self, serials: Sequence[int] | Int[AnyArray, " K"]) -> Int8[Array, "K m"]:
        """The codewords of these customers, by :func:`codebook`."""
        return codebook(self.key, serials, self.num_chips, self.version, self.public)

    def packed(self, serials: range | np.ndarray) -> UInt32[AnyArray, "K blocks 16"]:
        """The codewords of these customers, by :func:`packed_words`."""
        return packed_words(self.key, serials, self.num_chips, self.version, self.public)


def _check(who: str, version: int) -> None:
    if version not in (1, VERSION):
        raise _validate.fail(who, f"version 1 or {VERSION}", str(version), "Is this smark-jax older than the vault?")


def words_of(num_chips: int) -> int:
    """How many 32-bit words hold the chips of a codeword."""
    return -(-num_chips // 32)


def packed_words(
    key: keys.SecretKey,
    serials: range | np.ndarray,
    num_chips: int,
    version: int = VERSION,
    public: keys.SecretKey | None = None,
) -> UInt32[AnyArray, "K blocks 16"]:
    """Codewords packed into bits, 1 for a chip of -1, unchecked. All words that anybody uses come from here.

    Args:
      key: the code key.
      serials: of which many in a row are fastest; K of them.
      num_chips: m.
      version: as for :func:`codebook`.
      public: as for :func:`codebook`.

    Returns:
      Bit i of word w of block k is chip 512 k + 32 w + i; bits past m are random. Shape [K, ceil(m / 512), 16].
    """
    own = _packed(key, serials, num_chips, version)
    if public is not None:
        own ^= _packed(public, serials, num_chips, version)  # in place where the host drew it
    return own


def _packed(
    key: keys.SecretKey, serials: range | np.ndarray, num_chips: int, version: int
) -> UInt32[AnyArray, "K blocks 16"]:
    """The words of one key."""
    number = -(-words_of(num_chips) // chacha.BLOCK_WORDS)
    runs = _runs(serials, version)
    if jax.default_backend() == "cpu" and len(runs) * number <= _MOST_CALLS:
        parts = [_run(key, first, count, number, version) for first, count in runs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    numbers = np.zeros(1 << (len(serials) - 1).bit_length(), np.uint64)  # so that this is compiled for few sizes
    numbers[: len(serials)] = np.arange(serials.start, serials.stop) if isinstance(serials, range) else serials
    low, high = (jnp.asarray(numbers >> np.uint64(shift) & np.uint64(2**32 - 1), jnp.uint32) for shift in (0, 32))
    return _drawn(key.to_words(), low, high, number, version)[: len(serials)]


def _runs(serials: range | np.ndarray, version: int) -> list[tuple[int, int]]:
    """The first and the number of serials that follow each other in one keystream."""
    if version == VERSION and isinstance(serials, range):
        return [(serials.start, len(serials))]  # of a codebook: below 2^31
    if version == 1:
        return [(int(serial), 1) for serial in serials[: _MOST_CALLS + 1]]
    numbers = np.asarray(serials, np.uint64)
    breaks = (np.diff(numbers) != 1) | (numbers[1:] & np.uint64(2**32 - 1) == 0)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(numbers)]])[: _MOST_CALLS + 2]
    return [(int(numbers[one]), int(end - one)) for one, end in itertools.pairwise(starts)]


def _run(key: keys.SecretKey, first: int, count: int, number: int, version: int) -> UInt32[np.ndarray, "count k 16"]:
    low, high = first & (2**32 - 1), first >> 32
    stream = functools.partial(chacha.openssl, key.to_words())
    if version == 1:
        words = stream(np.array([0, low, high], np.uint32), 0, number * chacha.BLOCK_WORDS)
        return words.reshape(1, number, -1)
    blocks = [
        stream(np.array([block, high, _VERSION_2], np.uint32), low, count * chacha.BLOCK_WORDS).reshape(count, 1, -1)
        for block in range(number)
    ]
    return blocks[0] if number == 1 else np.concatenate(blocks, axis=1)


@functools.partial(jax.jit, static_argnames=("number", "version"))
def _drawn(key: Array, low: Array, high: Array, number: int, version: int) -> Array:
    shape = low.shape[0], number
    block = jnp.broadcast_to(jnp.arange(number, dtype=jnp.uint32), shape)
    low, high = (jnp.broadcast_to(x[:, None], shape) for x in (low, high))
    fixed = jnp.zeros(shape, jnp.uint32)
    counters, *nonces = (block, fixed, low, high) if version == 1 else (low, block, high, fixed | _VERSION_2)
    found = chacha.blocks(key, counters.reshape(-1), jnp.stack([nonce.reshape(-1) for nonce in nonces]))
    return found.reshape(*shape, chacha.BLOCK_WORDS)


def _chips(packed: AnyArray, num_chips: int) -> Int8[np.ndarray, "K m"]:
    """Chips of -1 and +1 from packed words."""
    flat = np.ascontiguousarray(np.asarray(packed).reshape(len(packed), -1).astype("<u4", copy=False))
    return 1 - 2 * np.unpackbits(flat.view(np.uint8), axis=1, count=num_chips, bitorder="little").astype(np.int8)
