"""Draws carriers from their keys: from one key, or from the keys of pieces, all or some of them."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from smark_jax import _validate, chacha, keys
from smark_jax._types import AnyArray
from smark_jax.carriers.hadamard import MOST_PIECES, WORD_BITS, Carrier, closed, cut, even
from smark_jax.carriers.selection import Spec

Keys = keys.SecretKey | Mapping[int, keys.SecretKey]
"""What a carrier is drawn from: one key, or the keys of some or all of its pieces by their numbers."""


def draw(key: Keys, spec: Spec, num_chips: int = 304) -> Carrier:
    """The carrier derived from ``key``: the same key, spec and number of chips always give the same one.

    Drawing needs about 16 bytes of memory for each of at most 2^20 weights or one block, plus the carrier (D / 4 bytes
    of signs, 4 n m bytes of positions).

    Args:
      key: the model's carrier key; or the keys of pieces, for a carrier that can be opened in part. Those that are
        missing stay closed; numbers beyond the carrier's pieces are not used.
      spec: the carrying leaves.
      num_chips: m, at most D.

    Returns:
      The carrier.

    Raises:
      SmarkError: when there are more chips than weights, or none; or no key is one of the carrier's pieces.
    """
    _check("draw", spec.num_weights, num_chips)
    return _draw(key, *cut(spec.num_weights, num_chips), num_chips, spec.num_weights, None)


def draw_even(key: Keys, num_coordinates: int, num_chips: int = 304) -> Carrier:
    """A carrier for at most ``num_coordinates`` coordinates of a shape, all of which it covers: it has no tail.

    The coordinates that are left over are fewer than a 64th. Which ones these are is up to the caller.

    Raises:
      SmarkError: as :func:`draw`.
    """
    _check("mark", num_coordinates, num_chips)
    n, length = even(num_coordinates, num_chips)
    return _draw(key, n, length, num_chips, n * length, length)


def _check(who: str, num_weights: int, num_chips: int) -> None:
    _validate.positive(who, "num_chips", num_chips)
    if num_chips > num_weights:
        raise _validate.fail(
            who,
            f"at most as many chips as the {num_weights:,} carrying weights",
            f"{num_chips:,} chips",
            "Select more leaves, or take fewer chips.",
        )


def _draw(key: Keys, n: int, length: int, num_chips: int, num_weights: int, stated: int | None) -> Carrier:
    if isinstance(key, Mapping):
        inner, outer, positions = _in_pieces(key, n, length, num_chips)
    else:
        inner, outer, positions = _blocks(key, n, length, num_chips)
    return Carrier(jnp.asarray(inner), jnp.asarray(outer), jnp.asarray(positions), num_weights, stated)


def _blocks(key: keys.SecretKey, n: int, length: int, num_chips: int) -> tuple[AnyArray, AnyArray, np.ndarray]:
    """Inner signs, outer signs and positions of n blocks from one key."""
    words = -(-length // WORD_BITS)
    zero = np.zeros(3, np.uint32)
    inner, outer = (
        chacha.keystream(keys.derive(key, label).to_words(), zero, n * words).reshape(n, words)
        for label in ("inner signs", "outer signs")
    )
    return inner, outer, _positions(keys.derive(key, "positions"), n, length, num_chips)


def _in_pieces(
    by_piece: Mapping[int, keys.SecretKey], n: int, length: int, num_chips: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same from the keys of pieces: piece p has blocks p, p + P, p + 2 P and so on; others are closed."""
    words = -(-length // WORD_BITS)
    inner, outer = np.zeros((n, words), np.uint32), np.zeros((n, words), np.uint32)
    positions = closed(n, length, num_chips)
    pieces = min(n, MOST_PIECES)
    known = [piece for piece in range(pieces) if piece in by_piece]
    if not known:
        cause = "carriers.piece_keys gives the keys of all pieces."
        raise _validate.fail("mark", f"the key of at least one of the carrier's {pieces} pieces", "none", cause)
    for piece in known:
        blocks = slice(piece, None, pieces)
        drawn = _blocks(by_piece[piece], len(range(n)[blocks]), length, num_chips)
        inner[blocks], outer[blocks], positions[blocks] = (np.asarray(part) for part in drawn)
    return inner, outer, positions


def _positions(key: keys.SecretKey, n: int, length: int, num_chips: int) -> Int32[np.ndarray, "n m"]:
    """The first m entries of a keyed random permutation per block: the indices, sorted by random 64-bit numbers."""
    index_bits = max(1, (length - 1).bit_length())
    index = np.arange(length, dtype=np.uint64)
    nonce = np.zeros(3, np.uint32)
    result = np.empty((n, num_chips), np.int32)
    step = min(n, max(1, (1 << 20) // length))
    for start in range(0, n, step):
        count = min(step, n - start)
        first = start * length * 2 // chacha.BLOCK_WORDS  # if n > 1, a keystream block divides the length
        stream = np.asarray(chacha.keystream(key.to_words(), nonce, 2 * count * length, first))
        # Random high bits, and the index in the low bits: sorting permutes the indices, and there are no ties.
        numbers = stream.view(np.uint64).reshape(count, length) >> index_bits << index_bits | index
        numbers.sort(axis=1)
        result[start : start + count] = numbers[:, :num_chips] & np.uint64((1 << index_bits) - 1)
    return result
