r"""Correlations of vectors with every customer's codeword, and the shortlist of the best-correlated customers.

Codewords are made from the key (or taken from a codebook in memory) a few thousand at a time, scored, and discarded.
With R vectors at once the working memory is about ``2048 * 4 * (m + R)`` bytes besides the N * R scores themselves.

Streamed words stay packed. With bits b, :math:`\langle y, 1 - 2b \rangle = \sum y - 2 \langle y, b \rangle`. For a few
vectors y is rounded to :math:`l + s q` with integers q of 22 bits, as exact as float32, and
:math:`\langle q, b \rangle` is a sum over q's bit planes of :math:`2^p` times a count of bits. For many vectors the
bits become a matrix. Two codewords that differ in d chips have the product m - 2 d, and d is a count of bits.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8, UInt32

from smark_jax import _processes, _validate, chacha, codes
from smark_jax._types import AnyArray
from smark_jax.tracing import best as best_customers

Book = AnyArray | codes.Codebook

# Codewords per step inside jit, and per call, fewer where they are long; progress is reported between calls.
_ROWS_PER_STEP = 2048
_ROWS_PER_CALL = 1 << 16
# Joint decoding considers the customers whose words correlate best with the read-out: this many, and no more than have
# this many chips in total. Of a million innocents, so many have |T| above 1.5; whom a coalition dilutes further is out
# of reach of any decoder (experiments/collusion).
_MOST_SHORTLISTED = 1 << 17
_SHORTLIST_CHIPS = 320_000_000
# More vectors than this are scored faster by a matmul than by bit planes; with more chips, too few planes would remain.
_MOST_BY_PLANES = 4
_MOST_CHIPS_BY_PLANES = 1 << 14
# The precision of scores that are kept; and of those that only choose whom an exact test looks at: of a vector of unit
# length, whose entries span at most sqrt 2, they are off by at most 0.7 for 2^14 chips, and by 0.013 for 304.
_PLANES, _PLANES_TO_CHOOSE = 22, 14
# Scores of all processes that are exchanged at a time.
_GATHERED = 1 << 22


def size(book: Book) -> tuple[int, int]:
    """Customers and chips of a codebook."""
    if isinstance(book, codes.Codebook):
        return book.num_customers, book.num_chips
    customers, chips = np.shape(book)
    return customers, chips


def check(book: Book) -> None:
    """Refuses anything that is not a codebook."""
    if isinstance(book, codes.Codebook):
        return
    shape = np.shape(book)
    if len(shape) != 2 or shape[0] == 0:
        cause = "Pass the words of all customers, from codes.codebook or codes.Codebook."
        raise _validate.fail("trace", "a codebook of shape [K, m] with K >= 1", f"shape {shape}", cause)
    if not bool(_all_signs(jnp.asarray(book))):
        cause = "Bits 0 and 1 become chips by 1 - 2 * bits."
        raise _validate.fail("trace", "codewords of -1 and +1", "other entries", cause)


@jax.jit
def _all_signs(book: jax.Array) -> jax.Array:
    return jnp.all(jnp.abs(book) == 1)


def rows(book: Book, index: np.ndarray) -> Int8[np.ndarray, "k m"]:
    """The codewords of these customers on the host."""
    if index.size == 0:
        return np.empty((0, size(book)[1]), np.int8)
    if isinstance(book, codes.Codebook):
        return np.asarray(book.words(index))
    return np.asarray(book)[index]


class Scores(NamedTuple):
    """The result of one pass over the codebook.

    Attributes:
      all: correlation of each vector with each customer's word, float32, shape [R, N]; None when not kept.
      best: for each vector the customers with the largest absolute correlations, in codebook order, R arrays of shape
        [L].
      best_scores: their correlations, float32, R arrays of shape [L].
    """

    all: Float[np.ndarray, "R N"] | None
    best: tuple[np.ndarray, ...]
    best_scores: tuple[Float[np.ndarray, " L"], ...]


def score(
    vectors: Float[np.ndarray, "R m"],
    book: Book,
    floors: Float[np.ndarray, " R"],
    keep: bool,
    on_scored: Callable[[int], None] = lambda count: None,
    *,
    collective: bool = False,
) -> Scores:
    """One pass over all N customers.

    Args:
      vectors: R vectors of m chips.
      book: the codebook.
      floors: for each vector the absolute correlation below which nobody is shortlisted.
      keep: whether to keep all N correlations, which takes ``4 N R`` bytes.
      on_scored: called repeatedly with the number of customers scored since the last call.
      collective: whether all processes of ``jax.distributed`` make this call. Each scores its share, and all get the
        whole result; progress supposes that they are equally fast.

    Returns:
      The correlations, and for each vector the shortlist of at most 131,072 customers.
    """
    num_customers, num_chips = size(book)
    limit = max(1, min(_MOST_SHORTLISTED, _SHORTLIST_CHIPS // num_chips))
    everything = np.zeros((len(vectors), num_customers), np.float32) if keep else None
    best = [best_customers.Best(limit, floor) for floor in floors.tolist()]
    planes, done = _PLANES if keep else _PLANES_TO_CHOOSE, 0
    share = slice(jax.process_index(), None, jax.process_count()) if collective else slice(None)
    for start, found in _calls(jnp.asarray(vectors, jnp.float32), book, planes, share):
        if everything is not None:
            everything[:, start : start + found.shape[1]] = found
        for keeper, row in zip(best, found, strict=True):
            keeper.add(start, row)
        on_scored(start + found.shape[1] - done)
        done = start + found.shape[1]
    if collective:
        for keeper in best:
            keeper.gather()
        for row in [] if everything is None else everything:
            for start in range(0, num_customers, _GATHERED):
                row[start : start + _GATHERED] = sum(_processes.gathered(row[start : start + _GATHERED]))
        on_scored(num_customers - done)
    return Scores(everything, *zip(*(keeper.result() for keeper in best), strict=True))


def _calls(vectors: jax.Array, book: Book, planes: int, share: slice) -> Iterator[tuple[int, np.ndarray]]:
    """The first customer of each call of a share, and its scores [R, customers]; all devices compute meanwhile."""
    num_customers, num_chips = size(book)
    most = max(1, _ROWS_PER_CALL * 512 // max(512, num_chips))
    rows = min(most, 1 << (num_customers - 1).bit_length())
    devices = _devices()
    placed = [jax.device_put(vectors, device) for device in devices]
    running: collections.deque[tuple[int, jax.Array]] = collections.deque()
    for number, start in enumerate(range(0, num_customers, rows)[share]):
        one = number % len(devices)
        with jax.default_device(devices[one]):
            running.append((start, _score_call(placed[one], book, start, rows, planes)))
        if len(running) > len(devices):
            yield _read(*running.popleft(), num_customers)
    while running:
        yield _read(*running.popleft(), num_customers)


def _devices() -> list[Any]:
    """All accelerators of this process; a single device of a CPU, whose cores it uses all."""
    return jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None]


def _read(start: int, scores: jax.Array, num_customers: int) -> tuple[int, np.ndarray]:
    return start, np.asarray(scores)[:, : num_customers - start]


def _score_call(vectors: jax.Array, book: Book, start: int, rows: int, planes: int) -> jax.Array:
    if isinstance(book, codes.Codebook):
        return _score_packed(vectors, book.packed(range(start, start + rows)), planes)
    return _score_held(vectors, jnp.asarray(book[start : start + rows], jnp.int8))


@functools.partial(jax.jit, static_argnames="planes")
def _score_packed(vectors: jax.Array, packed: jax.Array, planes: int) -> jax.Array:
    """[R, rows] products of vectors and packed words."""
    (num_vectors, num_chips), count = vectors.shape, len(packed)
    # Bits past the last chip are random, so they get weight zero.
    padded = jnp.pad(vectors, ((0, 0), (0, -num_chips % 32))).reshape(num_vectors, -1, 32)
    if num_vectors <= _MOST_BY_PLANES and num_chips <= _MOST_CHIPS_BY_PLANES:
        found = jnp.stack([_by_planes(vector, packed, num_chips, planes) for vector in padded])
    else:
        score = functools.partial(_by_matmul, padded.swapaxes(0, 1))
        found = jax.lax.map(score, _in_steps(packed, num_chips))  # [steps, R, rows]
        found = found.swapaxes(0, 1).reshape(num_vectors, -1)[:, :count]
    return vectors.sum(axis=1)[:, None] - 2 * found


def _in_steps(packed: jax.Array, num_chips: int) -> UInt32[jax.Array, "steps words rows"]:
    """Packed words with customers as the last axis, since one word of many customers is taken at a time."""
    count, step = len(packed), _step(len(packed), num_chips)
    flat = packed.reshape(count, -1)[:, : codes.words_of(num_chips)]
    return jnp.pad(flat, ((0, -count % step), (0, 0))).reshape(-1, step, flat.shape[1]).swapaxes(1, 2)


def _step(count: int, num_chips: int) -> int:
    """How many codewords to process at a time: their bits as floats take at most a few MB."""
    return min(count, max(1, _ROWS_PER_STEP * 512 // max(512, num_chips)))


def _by_planes(vector: jax.Array, packed: jax.Array, num_chips: int, planes: int) -> jax.Array:
    """[rows] sums of the entries of ``vector`` [words, 32] where ``packed`` [rows, blocks, 16] has a 1, of m chips."""
    blocks = packed.shape[1]
    used = np.arange(vector.size).reshape(vector.shape) < num_chips
    low, high = jnp.min(vector, where=used, initial=jnp.inf), jnp.max(vector, where=used, initial=-jnp.inf)
    planes = min(planes, 32 - num_chips.bit_length())  # so that sums stay below 2^32
    size = jnp.maximum((high - low) / (2**planes - 1), jnp.finfo(jnp.float32).tiny)
    whole = jnp.where(used, jnp.rint((vector - low) / size), 0).astype(jnp.uint32)
    bits = jnp.stack([*(whole >> plane & 1 for plane in range(planes)), jnp.asarray(used, jnp.uint32)], axis=1)
    places = jnp.arange(32, dtype=jnp.uint32)[None, None]
    masks = jnp.sum(bits << places, axis=2, dtype=jnp.uint32)  # [words, planes + 1]

    def add(sums: tuple[jax.Array, jax.Array], words: jax.Array, masks: jax.Array) -> tuple[jax.Array, jax.Array]:
        total, ones = sums
        for word, of_word in zip(words.T, masks, strict=True):
            for plane in range(planes):
                total += jax.lax.population_count(word & of_word[plane]) << plane
            ones += jax.lax.population_count(word & of_word[planes])
        return total, ones

    none = jnp.zeros(len(packed), jnp.uint32)
    sums = none, none
    if blocks == 1:
        sums = add(sums, packed[:, 0, : len(masks)], masks)
    else:  # a loop, since a long program takes long to compile
        masks = jnp.pad(masks, ((0, blocks * chacha.BLOCK_WORDS - len(masks)), (0, 0)))
        masks = masks.reshape(blocks, chacha.BLOCK_WORDS, -1)
        sums = jax.lax.fori_loop(0, blocks, lambda block, sums: add(sums, packed[:, block], masks[block]), sums)
    total, ones = (x.astype(jnp.float32) for x in sums)
    return low * ones + size * total


def _by_matmul(vectors: jax.Array, packed: jax.Array) -> jax.Array:
    """[R, rows] sums of the entries of ``vectors`` [words, R, 32] where ``packed`` [words, rows] has a 1."""
    bits = (packed[:, None] >> jnp.arange(32, dtype=jnp.uint32)[None, :, None]) & 1  # [words, 32, rows]
    flat = vectors.swapaxes(0, 1).reshape(vectors.shape[1], -1)
    return jnp.dot(flat, bits.astype(jnp.float32).reshape(flat.shape[1], -1), precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _score_held(vectors: jax.Array, book: jax.Array) -> jax.Array:
    """[R, rows] products of vectors and words, a few thousand words at a time."""
    count, num_chips = book.shape
    step = min(count, _ROWS_PER_STEP)

    def one_step(words: jax.Array) -> jax.Array:
        # By default, accelerators would round the float32 matmul to fewer bits.
        return jnp.einsum("rm,km->rk", vectors, words.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

    padded = jnp.pad(book, ((0, -count % step), (0, 0))).reshape(-1, step, num_chips)
    scores = jax.lax.map(one_step, padded)  # [steps, R, rows]
    return scores.swapaxes(0, 1).reshape(len(vectors), -1)[:, :count]


class Shortlist(NamedTuple):
    """The words of a few customers, packed: ``L m / 8`` bytes.

    Attributes:
      customers: their places in the codebook, ascending, shape [L].
      bits: bit i of word w is 1 where chip 32 w + i is -1, shape [steps, ceil(m / 32), rows per step]. Rows past L and
        bits past m mean nothing.
      num_chips: m.
    """

    customers: np.ndarray
    bits: UInt32[jax.Array, "steps words rows"]
    num_chips: int


def shortlist(book: Book, customers: np.ndarray) -> Shortlist:
    """Packs the words of these customers."""
    num_chips = size(book)[1]
    step = _step(max(1, customers.size), num_chips)
    if isinstance(book, codes.Codebook):
        return Shortlist(customers, _arranged(book.packed(customers), num_chips), num_chips)
    words = jnp.asarray(np.asarray(book)[customers], jnp.int8)
    return Shortlist(customers, _pack(words, step), num_chips)


_arranged = jax.jit(_in_steps, static_argnames="num_chips")


@functools.partial(jax.jit, static_argnames="step")
def _pack(words: jax.Array, step: int) -> jax.Array:
    count, num_chips = words.shape
    words = jnp.pad(words, ((0, -count % step), (0, -num_chips % 32))).reshape(-1, step, -(-num_chips // 32), 32)

    def pack(some: jax.Array) -> jax.Array:
        shifts = jnp.arange(32, dtype=jnp.uint32)[None, None]
        return jnp.sum((some < 0).astype(jnp.uint32) << shifts, axis=2, dtype=jnp.uint32).T

    return jax.lax.map(pack, words)


def correlate(places: Sequence[int], chosen: Shortlist) -> Float[np.ndarray, "R L"]:
    """Products of the words at these places of the shortlist with all of its words, float32 and exact, shape [R, L]."""
    found = _correlate(jnp.asarray(places, jnp.int32), chosen.bits, chosen.num_chips)
    return np.asarray(found).swapaxes(0, 1).reshape(len(places), -1)[:, : chosen.customers.size]


@functools.partial(jax.jit, static_argnames="num_chips")
def _correlate(places: jax.Array, packed: jax.Array, num_chips: int) -> jax.Array:
    """[steps, R, rows] products."""
    step = packed.shape[2]
    mine = packed[places // step, :, places % step].T  # [words, R]
    used = np.full(packed.shape[1], 2**32 - 1, np.uint32)
    used[-1] >>= -num_chips % 32

    def one_step(others: jax.Array) -> jax.Array:
        def add(differ: jax.Array, word: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            some, other, mask = word
            return differ + jax.lax.population_count((some[:, None] ^ other[None]) & mask).astype(jnp.int32), None

        differ, _ = jax.lax.scan(add, jnp.zeros((mine.shape[1], step), jnp.int32), (mine, others, jnp.asarray(used)))
        return (num_chips - 2 * differ).astype(jnp.float32)

    return jax.lax.map(one_step, packed)
