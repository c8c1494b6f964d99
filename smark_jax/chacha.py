"""The ChaCha20 keystream (RFC 8439): by OpenSSL on CPUs, by XLA on accelerators, the same bits from both.

Codewords, carrier signs and masks come from it, not from ``jax.random``: the 64-bit key of threefry is too short for a
secret. XLA compiles the cipher slowly for CPUs and runs it at a tenth of OpenSSL's speed there. Under jit OpenSSL is
called back, with NumPy arrays alone: a callback that waits for JAX can wait forever.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

from smark_jax import _validate
from smark_jax._types import AnyArray

BLOCK_WORDS = 16
"""Words of one ChaCha20 block: 64 bytes."""

_CONSTANTS = np.frombuffer(b"expand 32-byte k", "<u4")
# The state of this many blocks (16 words each, 128 KiB, and as much again during a round) stays in a core's own cache
# for all 20 rounds; with fewer blocks, the overhead of calling many small kernels becomes noticeable.
BLOCKS_PER_PASS = 2048
# Encrypted zeros are the keystream; this many bytes at a time.
_ZEROS = memoryview(bytes(1 << 19))


def keystream(
    key: UInt32[AnyArray, "8"], nonce: UInt32[AnyArray, "3"], num_words: int, start_block: int | AnyArray = 0
) -> UInt32[Array, " num_words"]:
    """``num_words`` words of the ChaCha20 keystream (RFC 8439, section 2.4); runs under jit, vmap, pmap and shard_map.

    Args:
      key: eight words, see :meth:`smark_jax.keys.SecretKey.to_words`.
      nonce: three words. A pair of key and nonce must never serve two purposes.
      num_words: how many 32-bit words; static under jit.
      start_block: block counter of the first word; a block has 16 words. The caller keeps a traced value in range.

    Returns:
      uint32 words in stream order, shape [num_words].

    Raises:
      SmarkError: when key or nonce have another shape or dtype, or the stream would pass its 2^32 blocks and repeat.
    """
    key, nonce = jnp.asarray(key), jnp.asarray(nonce)
    for name, value, length in (("key", key, 8), ("nonce", nonce, 3)):
        if value.shape != (length,) or value.dtype != jnp.uint32:
            got = f"{value.dtype}{list(value.shape)}"
            raise _validate.fail("keystream", f"{name} to be uint32[{length}]", got, "Use SecretKey.to_words().")
    _validate.positive("keystream", "num_words", num_words)
    num_blocks = -(-num_words // BLOCK_WORDS)
    if not _validate.is_traced(start_block) and not 0 <= int(start_block) <= 2**32 - num_blocks:
        got = f"{num_blocks} blocks from block {int(start_block)}"
        raise _validate.fail("keystream", "at most 2^32 blocks", got, "Take another nonce before the stream repeats.")
    if jax.default_backend() == "cpu" and not any(_validate.is_traced(x) for x in (key, nonce, start_block)):
        return jnp.asarray(openssl(np.asarray(key), np.asarray(nonce), np.asarray(start_block), num_words))
    return _keystream(key, nonce, num_words, jnp.asarray(start_block, jnp.uint32))


@functools.partial(jax.jit, static_argnames="num_words")
def _keystream(key: Array, nonce: Array, num_words: int, start_block: Array) -> Array:
    num_blocks = -(-num_words // BLOCK_WORDS)

    def drawn(key: Array, nonce: Array, start_block: Array) -> Array:
        counters = start_block + jnp.arange(num_blocks, dtype=jnp.uint32)
        return blocks(key, counters, jnp.broadcast_to(nonce[:, None], (3, num_blocks))).reshape(-1)[:num_words]

    return by_platform(functools.partial(openssl, num_words=num_words), drawn, num_words, key, nonce, start_block)


def by_platform(
    on_host: Callable[..., np.ndarray], on_device: Callable[..., Array], num_words: int, *args: Any
) -> UInt32[Array, " num_words"]:
    """The words that two functions agree on: called back on CPUs, compiled for accelerators.

    Args:
      on_host: of NumPy arrays, without JAX.
      on_device: of JAX arrays.
      num_words: of the result, static.
      *args: arguments of both.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and len(mesh.manual_axes) < len(mesh.axis_names):
        return on_device(*args)  # JAX calls nothing back where shard_map leaves some of the mesh's axes to the compiler
    shape = jax.ShapeDtypeStruct((num_words,), jnp.uint32)

    def called(*args: Array) -> Array:
        words = jax.pure_callback(on_host, shape, *args, vmap_method="sequential")
        # Under shard_map what is called back differs between devices if an argument does; with these zeros JAX knows.
        return words ^ functools.reduce(jnp.bitwise_xor, [arg.reshape(-1)[0].astype(jnp.uint32) & 0 for arg in args])

    return jax.lax.platform_dependent(*args, cpu=called, default=on_device)


def openssl(
    key: AnyArray, nonce: AnyArray, start_block: int | AnyArray, num_words: int
) -> UInt32[np.ndarray, " num_words"]:
    """:func:`keystream` on the host, unchecked."""
    # From addresses of whole cache lines, JAX takes an array without copying it.
    buffer = np.empty(num_words + BLOCK_WORDS, "<u4")
    found = buffer[-buffer.ctypes.data % 64 // 4 :][:num_words]
    stream(key, nonce, start_block)(found)
    return found.astype(np.uint32, copy=False)


def stream(key: AnyArray, nonce: AnyArray, start_block: int | AnyArray = 0) -> Callable[[np.ndarray], None]:
    """A function that fills one array of little-endian words after the other with OpenSSL's keystream, unchecked."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    key, nonce = (np.asarray(x, "<u4") for x in (key, nonce))
    counter = np.asarray(start_block, "<u4").reshape(1)
    cipher = Cipher(algorithms.ChaCha20(key.tobytes(), np.concatenate([counter, nonce]).tobytes()), mode=None)
    encryptor = cipher.encryptor()

    def fill(words: np.ndarray) -> None:
        data = memoryview(words.view(np.uint8))  # pyright: ignore[reportArgumentType]  # an array is a buffer
        for start in range(0, len(data), len(_ZEROS)):
            part = data[start : start + len(_ZEROS)]
            encryptor.update_into(_ZEROS[: len(part)], part)

    return fill


def blocks(
    key: UInt32[Array, "8"], counters: UInt32[Array, " n"], nonces: UInt32[Array, "3 n"]
) -> UInt32[Array, "n 16"]:
    """ChaCha20 blocks (RFC 8439, section 2.3), one for each pair of counter and nonce; call it under jit.

    Args:
      key: eight words.
      counters: block counters, shape [n].
      nonces: their nonces, shape [3, n].

    Returns:
      uint32 words, shape [n, 16].
    """
    n = counters.shape[0]
    rows = jnp.concatenate([counters[None], nonces])  # [4, n]
    one_pass = lambda some: jnp.stack(word_by_word(key, some), axis=-1)  # noqa: E731
    if n <= BLOCKS_PER_PASS:
        return one_pass(rows)
    passes = -(-n // BLOCKS_PER_PASS)
    rows = jnp.pad(rows, ((0, 0), (0, passes * BLOCKS_PER_PASS - n)))
    rows = rows.reshape(4, passes, BLOCKS_PER_PASS).swapaxes(0, 1)
    return jax.lax.map(one_pass, rows).reshape(-1, BLOCK_WORDS)[:n]


def bits(words: UInt32[Array, "*batch w"]) -> UInt32[Array, "*batch 32*w"]:
    """The bits of words, 0 or 1: bit i of word w is entry 32 w + i, shape [..., 32 w]."""
    shifts = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * words.ndim + (32,))
    return ((words[..., None] >> shifts) & 1).reshape(*words.shape[:-1], -1)


def word_by_word(key: UInt32[Array, "8 *keys"], rows: UInt32[Array, "4 *n"]) -> tuple[UInt32[Array, "*n"], ...]:
    """ChaCha20 blocks as 16 arrays: word i of every block. Call it under jit, on inputs that fit a core's cache.

    Args:
      key: eight words, or eight arrays of words that broadcast to the shape of a row: a key for each block.
      rows: the block counters and the three words of their nonces.

    Returns:
      16 arrays of the shape of a row.
    """
    # Under shard_map key and rows may differ between devices while the constants do not. With these zeros, which are
    # computed from both, all words of the loop's carry have the same type.
    zeros = (key[0] ^ rows[0]) & 0
    start = tuple(zeros | word for word in (*_CONSTANTS, *key, *rows))
    end = jax.lax.fori_loop(0, 10, lambda _, state: _double_round(state), start)
    return tuple(a + b for a, b in zip(start, end, strict=True))


def _double_round(state: tuple[Array, ...]) -> tuple[Array, ...]:
    x = list(state)
    columns = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    diagonals = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
    for a, b, c, d in columns + diagonals:
        x[a] += x[b]
        x[d] = _rotate(x[d] ^ x[a], 16)
        x[c] += x[d]
        x[b] = _rotate(x[b] ^ x[c], 12)
        x[a] += x[b]
        x[d] = _rotate(x[d] ^ x[a], 8)
        x[c] += x[d]
        x[b] = _rotate(x[b] ^ x[c], 7)
    return tuple(x)


def _rotate(word: Array, bits: int) -> Array:
    return (word << bits) | (word >> (32 - bits))
