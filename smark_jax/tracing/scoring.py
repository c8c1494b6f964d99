"""Correlations of vectors with every customer's codeword, and the customers who deserve a closer look.

Codewords are made from the key (or taken from a held codebook) some thousand at a time, scored, and forgotten. With R
vectors at once the working memory is about ``8192 * 4 * (m + R)`` bytes besides the N * R scores themselves.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.progress
from jaxtyping import Float, Int8, UInt32

from smark_jax import _validate, codes, keys
from smark_jax._types import AnyArray

Book = AnyArray | codes.Codebook

# Codewords of one step inside jit, and of one call of it: between calls a progress bar may move.
_ROWS_A_STEP = 8192
_ROWS_A_CALL = 1 << 20
# Joint decoding considers the customers whose words correlate best with the read-out: as many as have this many chips
# together (40 MB packed), which is all of a million at 304 chips.
_SHORTLIST_CHIPS = 320_000_000
_SECONDS_BEFORE_A_BAR = 2.0


def size(book: Book) -> tuple[int, int]:
    """Customers and chips of a codebook, or a ValueError when it is no codebook."""
    if isinstance(book, codes.Codebook):
        return book.num_customers, book.num_chips
    shape = np.shape(book)
    if len(shape) != 2 or shape[0] == 0:
        cause = "Pass the words of all customers, from codes.codebook or codes.Codebook."
        raise _validate.fail("trace", "a codebook of shape [K, m] with K >= 1", f"shape {shape}", cause)
    if not bool(_all_signs(jnp.asarray(book))):
        cause = "Bits 0 and 1 become chips by 1 - 2 * bits."
        raise _validate.fail("trace", "codewords of -1 and +1", "other entries", cause)
    return shape[0], shape[1]


@jax.jit
def _all_signs(book: jax.Array) -> jax.Array:
    return jnp.all(jnp.abs(book) == 1)


def rows(book: Book, index: np.ndarray) -> Int8[np.ndarray, "k m"]:
    """The codewords of these customers on the host."""
    if index.size == 0:
        return np.empty((0, size(book)[1]), np.int8)
    if isinstance(book, codes.Codebook):
        return np.asarray(codes.codebook(book.key, index, book.num_chips))
    return np.asarray(book)[index]


class Scores(NamedTuple):
    """What one pass over the codebook leaves.

    Attributes:
      all: correlation of each vector with each customer's word, float32, shape [R, N]; None when not kept.
      best: for each vector the customers with the largest absolute correlations, in their order, shape [R, L].
      best_scores: their correlations, float32, shape [R, L].
    """

    all: Float[np.ndarray, "R N"] | None
    best: np.ndarray
    best_scores: Float[np.ndarray, "R L"]


def score(vectors: Float[np.ndarray, "R m"], book: Book, keep: bool) -> Scores:
    """One pass over all N customers, with a progress bar on a terminal once it has taken two seconds.

    Args:
      vectors: R vectors of m chips.
      book: the codebook.
      keep: whether to keep all N correlations, which takes ``4 N R`` bytes.

    Returns:
      The correlations, and for each vector the shortlist of at most ``320e6 / m`` customers.
    """
    num_customers, num_chips = size(book)
    device_vectors = jnp.asarray(vectors, jnp.float32)
    everything = np.empty((len(vectors), num_customers), np.float32) if keep else None
    best = [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in vectors]
    for start in _with_bar(range(0, num_customers, _ROWS_A_CALL), num_customers):
        count = min(_ROWS_A_CALL, num_customers - start)
        found = np.asarray(_score_call(device_vectors, book, start, count))
        if everything is not None:
            everything[:, start : start + count] = found
        for r, row in enumerate(found):
            best[r] = _merge(*best[r], np.arange(start, start + count), row, _SHORTLIST_CHIPS // num_chips)
    order = [np.argsort(customers) for customers, _ in best]
    return Scores(
        everything,
        np.stack([customers[o] for (customers, _), o in zip(best, order, strict=True)]),
        np.stack([value[o] for (_, value), o in zip(best, order, strict=True)]),
    )


def _merge(
    index: np.ndarray, value: np.ndarray, more: np.ndarray, scores: np.ndarray, limit: int
) -> tuple[np.ndarray, np.ndarray]:
    index, value = np.concatenate([index, more]), np.concatenate([value, scores])
    if index.size > limit:
        top = np.argpartition(np.abs(value), index.size - limit)[index.size - limit :]
        index, value = index[top], value[top]
    return index, value


def _with_bar(starts: range, num_customers: int) -> Iterator[int]:
    began, bar, task = time.monotonic(), None, None
    try:
        for start in starts:
            if bar is None and start and time.monotonic() - began > _SECONDS_BEFORE_A_BAR:
                bar = rich.progress.Progress(transient=True)
                task = bar.add_task("scoring customers", total=num_customers)
                bar.start()
            if bar is not None and task is not None:
                bar.update(task, completed=start)
            yield start
    finally:
        if bar is not None:
            bar.stop()


def _score_call(vectors: jax.Array, book: Book, start: int, count: int) -> jax.Array:
    if isinstance(book, codes.Codebook):
        return _score_streamed(vectors, jnp.asarray(book.key.to_words()), jnp.uint32(start), count)
    return _score_held(vectors, jnp.asarray(book[start : start + count], jnp.int8))


@functools.partial(jax.jit, static_argnames="count")
def _score_streamed(vectors: jax.Array, key: jax.Array, start: jax.Array, count: int) -> jax.Array:
    step = min(count, _ROWS_A_STEP)

    def one_step(first: jax.Array) -> jax.Array:
        serials = first + jnp.arange(step, dtype=jnp.uint32)
        return _dot(vectors, codes.words(key, serials, jnp.zeros_like(serials), vectors.shape[1]))

    scores = jax.lax.map(one_step, start + jnp.arange(0, count, step, dtype=jnp.uint32))  # [steps, R, rows]
    return scores.swapaxes(0, 1).reshape(vectors.shape[0], -1)[:, :count]


@jax.jit
def _score_held(vectors: jax.Array, book: jax.Array) -> jax.Array:
    return _in_steps(lambda words: _dot(vectors, words), book)


def _dot(vectors: jax.Array, words: jax.Array) -> jax.Array:
    """[R, rows] products; accelerators would round the float32 matmul to fewer bits by default."""
    return jnp.einsum("rm,km->rk", vectors, words.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


class Shortlist(NamedTuple):
    """The words of a few customers, packed: ``L m / 8`` bytes.

    Attributes:
      customers: their places in the codebook, ascending, shape [L].
      bits: bit i of a word is 1 where its chip i is -1, shape [L, ceil(m / 32)].
    """

    customers: np.ndarray
    bits: UInt32[jax.Array, "L words"]


def shortlist(book: Book, customers: np.ndarray) -> Shortlist:
    """Packs the words of these customers."""
    if isinstance(book, codes.Codebook):
        low = jnp.asarray(customers.astype(np.uint32))
        return Shortlist(
            customers, codes.packed_words(jnp.asarray(book.key.to_words()), low, jnp.zeros_like(low), book.num_chips)
        )
    return Shortlist(customers, _pack(jnp.asarray(np.asarray(book)[customers], jnp.int8)))


@jax.jit
def _pack(words: jax.Array) -> jax.Array:
    bits = jnp.pad((words < 0).astype(jnp.uint32), ((0, 0), (0, -words.shape[1] % 32)))
    shifts = jnp.arange(32, dtype=jnp.uint32)[None, None]
    return jnp.sum(bits.reshape(words.shape[0], -1, 32) << shifts, axis=2, dtype=jnp.uint32)


def correlate(vectors: Float[np.ndarray, "R m"], chosen: Shortlist) -> Float[np.ndarray, "R L"]:
    """Correlations of R vectors with the words of the shortlist, float32, shape [R, L]."""
    return np.asarray(_correlate(jnp.asarray(vectors, jnp.float32), chosen.bits))


@jax.jit
def _correlate(vectors: jax.Array, packed: jax.Array) -> jax.Array:
    num_chips = vectors.shape[1]
    return _in_steps(lambda bits: _dot(vectors, 1 - 2 * keys.bits(bits)[:, :num_chips].astype(jnp.int8)), packed)


def _in_steps(function: Callable[[jax.Array], jax.Array], array: jax.Array) -> jax.Array:
    """``function([rows, ...]) -> [R, rows]`` over all rows, some thousand at a time."""
    count = array.shape[0]
    step = min(count, _ROWS_A_STEP)
    padded = jnp.pad(array, ((0, -count % step), (0, 0))).reshape(-1, step, array.shape[1])
    scores = jax.lax.map(function, padded)  # [steps, R, rows]
    return scores.swapaxes(0, 1).reshape(scores.shape[1], -1)[:, :count]
