r"""Segments: n disjoint, interleaved sets of a mark's coordinates, each of which carries one chip of the secret word.

Coordinates are those of the mark's kernels, in order; vectors (norms' gains, biases) hold none, since they are no
evidence. Each run of n coordinates in a row has one in each segment, by a public permutation that the request's points
seed. So a customer, who receives its copy segment by segment, learns which coordinates belong together, and
nothing more.

In segment i, the change of coordinate d is :math:`s \, c_i \, \epsilon_d` in units of the coordinate's scale, with
secret signs :math:`\epsilon_d` and c the word. A suspect's segment reads
:math:`z_i = \sum_{d \in S_i} \epsilon_d v_d`, with v the weighted shifts of :func:`smark_jax.extraction.shifts`.

The segments belong to P parts of equal size, again by a public permutation. The signs of a part are the keystream of
the part's own key, which is of one request. A dispute opens one part and leaves the others secret.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from smark_jax import _validate, chacha, keys
from smark_jax.carriers import Mark, shapes

_PASS = 1 << 20
_LARGEST = 1 << 16


class Segments(NamedTuple):
    """Which coordinate belongs to which segment, and which segment to which part. Public.

    Attributes:
      members: the segment of each coordinate, uint16, shape [D].
      parts: the part of each segment, uint8, shape [n].
    """

    members: Int[np.ndarray, " D"]
    parts: Int[np.ndarray, " n"]

    @property
    def number(self) -> int:
        """The number of segments n."""
        return len(self.parts)

    def of_part(self, part: int) -> np.ndarray:
        """The numbers of a part's segments, in increasing order."""
        return np.flatnonzero(self.parts == part)


def draw(seed: bytes, num_coordinates: int, num_segments: int, num_parts: int) -> Segments:
    """The segments that a public seed gives.

    Args:
      seed: 32 bytes that nobody chose alone: the request's digest.
      num_coordinates: D, at least n.
      num_segments: n, a multiple of the number of parts, at most 65,536.
      num_parts: P, at most 256.

    Raises:
      SmarkError: when the numbers do not fit each other.
    """
    check("licence", num_coordinates, num_segments, num_parts)
    places = _permutations(_key(seed, "members"), -(-num_coordinates // num_segments), num_segments)
    order = _permutations(_key(seed, "parts"), 1, num_segments)[0]
    parts = np.empty(num_segments, np.uint8)
    parts[order] = np.arange(num_segments) % num_parts
    return Segments(places.reshape(-1)[:num_coordinates], parts)


def check(who: str, num_coordinates: int, num_segments: int, num_parts: int) -> None:
    """Refuses numbers that :func:`draw` cannot serve.

    Raises:
      SmarkError: in the name of ``who``.
    """
    if not 0 < num_segments <= min(num_coordinates, _LARGEST):
        expected = f"1 to {min(num_coordinates, _LARGEST):,} choices for {num_coordinates:,} coordinates"
        raise _validate.fail(who, expected, f"{num_segments:,}", "A small model bears fewer choices: offer fewer.")
    if not 0 < num_parts <= 256 or num_segments % num_parts:
        cause = "Parts have the same number of choices."
        raise _validate.fail(who, "a number of parts that divides the choices", f"{num_parts}", cause)


def signs(segments: Segments, part: int, key: keys.SecretKey) -> Float[np.ndarray, " k"]:
    """The secret signs of a part's coordinates, in the order of the coordinates."""
    count = int(np.count_nonzero(segments.parts[segments.members] == part))
    stream = chacha.openssl(key.to_words(), np.zeros(3, np.uint32), 0, -(-count // 32))
    bits = np.unpackbits(stream.astype("<u4", copy=False).view(np.uint8), count=count, bitorder="little")
    return 1 - 2 * bits.astype(np.float32)


def all_signs(segments: Segments, part_keys: Sequence[keys.SecretKey]) -> Float[np.ndarray, " D"]:
    """The secret signs of all coordinates, shape [D]."""
    found, of = np.empty(len(segments.members), np.float32), segments.parts[segments.members]
    for part, key in enumerate(part_keys):
        found[of == part] = signs(segments, part, key)
    return found


def part_keys(key: keys.SecretKey, request: str, num_parts: int) -> list[keys.SecretKey]:
    """The keys of all parts.

    They are of one request: a customer with two packages under the same signs could work the signs out of the
    difference, and take its word out of the copy.

    Args:
      key: the owner's, of the offer.
      request: the request's digest.
      num_parts: P.
    """
    return [keys.derive(key, "part", request, str(part)) for part in range(num_parts)]


def readings(
    values: Float[np.ndarray, " D"], segments: Segments, part: int, key: keys.SecretKey
) -> Float[np.ndarray, " k"]:
    """The readings z of a part's segments, float64, in the order of :meth:`Segments.of_part`.

    Args:
      values: the suspect's weighted shifts, see :func:`coordinates`.
      segments: the licence's.
      part: its number.
      key: its key.
    """
    here = segments.parts[segments.members] == part
    weighted = values[here].astype(np.float64) * signs(segments, part, key)
    return np.bincount(segments.members[here], weights=weighted, minlength=segments.number)[segments.of_part(part)]


def slices(mark: Mark) -> list[slice]:
    """Where the coordinates of each carrying leaf are in the mark's vector; empty for vectors."""
    if mark.shape is None:
        counts = [leaf.size for leaf in mark.spec.leaves]
        vectors = [False] * len(counts)
    else:
        counts = shapes.kept(mark.shape, mark.carrier.num_weights)
        vectors = [shapes.is_vector(leaf) for leaf in mark.spec.leaves]
    found, start = [], 0
    for count, vector in zip(counts, vectors, strict=True):
        found.append(slice(start, start if vector else start + count))
        start += count
    return found


def coordinates(vector: Float[np.ndarray, " E"], mark: Mark) -> Float[np.ndarray, " D"]:
    """The coordinates that segments use, of a vector of all the mark's coordinates."""
    return np.concatenate([vector[where] for where in slices(mark)])


def num_coordinates(mark: Mark) -> int:
    """D, the number of coordinates that segments use."""
    return sum(where.stop - where.start for where in slices(mark))


def _key(seed: bytes, label: str) -> keys.SecretKey:
    return keys.from_bytes(hashlib.sha256(b"smark licence segments v1 " + label.encode() + seed).digest())


def _permutations(key: keys.SecretKey, count: int, size: int) -> Int[np.ndarray, "count size"]:
    """Pseudo-random permutations of ``size`` numbers: indices sorted by random 64-bit numbers."""
    bits, index = max(1, (size - 1).bit_length()), np.arange(size, dtype=np.uint64)
    found = np.empty((count, size), np.uint16)
    step = max(1, _PASS // size)
    for start in range(0, count, step):
        rows = min(step, count - start)
        nonce = np.array([start // step, 0, 0], np.uint32)
        stream = chacha.openssl(key.to_words(), nonce, 0, 2 * rows * size)
        numbers = np.ascontiguousarray(stream.astype("<u4", copy=False)).view("<u8").reshape(rows, size)
        numbers = numbers >> np.uint64(bits) << np.uint64(bits) | index
        numbers.sort(axis=1)
        found[start : start + rows] = numbers & np.uint64((1 << bits) - 1)
    return found
