"""Where the numbers of leaves lie in a file, and the file with other numbers there."""

import enum
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax import _validate
from smark_jax.files import trees
from smark_jax.files._limits import shown


class Place(NamedTuple):
    """Where the numbers of a leaf lie.

    Attributes:
      file: the bare name of the file beside the main one; empty for the main file.
      start: the byte at which the leaf's first number begins.
      dtype: as the numbers are stored, little-endian unless it says otherwise.
      shape: of the leaf as it is read.
      strides: the steps of its axes in bytes. A leaf that is stored transposed has a place too.
    """

    file: str
    start: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Unwritable(enum.StrEnum):
    """Why a leaf has no place.

    PACKED: its numbers are compressed, or coded one by one; what is read are its very numbers.
    QUANTISED: what is read are numbers that its own stand for; another number would be rounded.
    """

    PACKED = "compressed, or coded number by number"
    QUANTISED = "quantised"


Places = Mapping[str, Place | Unwritable]
"""The place of each leaf of a file by its name as it is read, or why it has none."""


class Piece(NamedTuple):
    """Bytes that replace as many in a file, from the byte ``start`` on."""

    start: int
    content: bytes | bytearray | memoryview

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.start + len(self.content)


class Checksum(NamedTuple):
    """The CRC-32 of the bytes from ``start`` to ``end`` of a file, written little-endian at each of ``places``."""

    start: int
    end: int
    places: tuple[int, ...]


def in_order(start: int, dtype: np.dtype, shape: Sequence[int], file: str = "") -> Place:
    """The place of a leaf whose numbers lie side by side in C order."""
    sizes = [max(size, 1) for size in shape]
    strides = [dtype.itemsize * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    return Place(file, start, dtype, tuple(shape), tuple(strides))


def pieces(data: bytes | memoryview, leaves: Mapping[str, np.ndarray], places: Mapping[str, Place]) -> list[Piece]:
    """The bytes that put these leaves at their places in a file, in order; none overlap.

    Args:
      data: the content of the file. Bytes between the numbers of a leaf stay.
      leaves: by name, of the shapes of their places.
      places: of the same names, all in this file.

    Raises:
      SmarkError: when leaves share bytes, and would need different ones.
    """
    return [_piece(data, start, end, {name: (leaves[name], places[name]) for name in names})
            for start, end, names in _runs(places)]  # fmt: skip


def covered(places: Mapping[str, Place]) -> int:
    """How many bytes of a file the leaves at these places cover, gaps between the numbers of one leaf among them."""
    return sum(end - start for start, end, _ in _runs(places))


def _runs(places: Mapping[str, Place]) -> list[tuple[int, int, list[str]]]:
    """The runs of bytes of a file that leaves cover, in order, with the names of leaves that overlap in each."""
    placed = sorted((_span(place), name) for name, place in places.items() if math.prod(place.shape))
    runs: list[tuple[int, int, list[str]]] = []
    for (start, end), name in placed:
        if runs and start < runs[-1][1]:
            first, last, names = runs.pop()
            runs.append((first, max(last, end), [*names, name]))
        else:
            runs.append((start, end, [name]))
    return runs


def _span(place: Place) -> tuple[int, int]:
    """The first byte of a leaf, and the one after its last."""
    steps = [(size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True)]
    low = place.start + sum(step for step in steps if step < 0)
    return low, place.start + sum(step for step in steps if step > 0) + place.dtype.itemsize


def _piece(data: bytes | memoryview, start: int, end: int, leaves: Mapping[str, tuple[np.ndarray, Place]]) -> Piece:
    """The bytes of leaves that overlap: of one alone, as nearly always, without a copy where it is stored in order."""
    ((leaf, place), *others) = leaves.values()
    if not others and place == in_order(start, leaf.dtype, leaf.shape, place.file):
        return Piece(start, trees.raw(leaf))
    block = bytearray(data[start:end])
    views = [
        (name, leaf, np.ndarray(place.shape, place.dtype, block, place.start - start, place.strides))
        for name, (leaf, place) in leaves.items()
    ]
    for _, leaf, view in views:
        view[...] = leaf
    for name, leaf, view in views:
        if trees.raw(view.astype(leaf.dtype)) != trees.raw(leaf):
            got = f"other ones in {shown(name)} than in {', '.join(shown(other) for other in leaves if other != name)}"
            cause = "Change tied leaves alike."
            raise _validate.fail("write", "the same numbers in leaves that share bytes in the file", got, cause)
    return Piece(start, block)


def spliced(
    data: bytes | memoryview, pieces: Sequence[Piece], start: int = 0, end: int | None = None
) -> Iterator[memoryview]:
    """The bytes of a file from ``start`` to ``end`` with these pieces, which are in order, in their places."""
    view, position, end = memoryview(data), start, len(data) if end is None else end
    for piece in pieces:
        if piece.end <= position or piece.start >= end:
            continue
        if position < piece.start:
            yield view[position : piece.start]
            position = piece.start
        yield memoryview(piece.content)[position - piece.start : end - piece.start]
        position = min(piece.end, end)
    if position < end:
        yield view[position:end]


def mended(data: bytes | memoryview, pieces: Sequence[Piece], checksums: Sequence[Checksum]) -> list[Piece]:
    """The pieces, with those that write the checksums anew of what they change; in order."""
    found = list(pieces)
    for start, end, places in checksums:
        if any(piece.start < end and start < piece.end for piece in pieces):
            crc = 0
            for part in spliced(data, pieces, start, end):
                crc = zlib.crc32(part, crc)
            found += [Piece(place, crc.to_bytes(4, "little")) for place in places]
    return sorted(found, key=lambda piece: piece.start)
