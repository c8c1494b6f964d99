"""What the messages in the headers of HDF5 say: shapes, types of numbers, layouts and filters.

References:
  https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html (section IV.A.2, the messages).
"""

import zlib
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files._limits import shown

ADVICE = "The file is damaged, or of a rare form: load it in Keras and save it again."
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DEFLATE, SHUFFLE, FLETCHER = 1, 2, 3
"""The filters that are undone; the last is a checksum of four bytes at the end."""

# By size in bytes and bits of the exponent.
_FLOATS = {(2, 5): np.dtype("f2"), (4, 8): np.dtype("f4"), (8, 11): np.dtype("f8")}


def expect(condition: bool, problem: str) -> None:
    """Refuses a file that violates a condition of its format."""
    if not condition:
        raise Unreadable(problem, ADVICE)


def dimensions(message: memoryview) -> tuple[int, ...] | None:
    """The shape that a message gives, or None if it has none."""
    expect(message[0] in (1, 2), "a shape in it is damaged")
    version, rank, start = message[0], message[1], 8 if message[0] == 1 else 4
    if version == 2 and message[3] == 2:
        return None
    expect(len(message) >= start + 8 * rank, "a shape in it is cut")
    return tuple(np.frombuffer(message[start : start + 8 * rank], "<u8").tolist())


def dtype(message: memoryview) -> np.dtype | None:
    """The dtype that a message gives, or None for text, records and odd numbers."""
    kind, bits, size = message[0] & 15, message[1], int.from_bytes(message[4:8], "little")
    if kind == 8 and len(message) >= 20 and message[8] & 15 == 0:  # names for whole numbers, such as False and True
        return dtype(message[8:])
    if kind == 0 and len(message) >= 12:
        whole = size in (1, 2, 4, 8) and bytes(message[8:12]) == bytes((0, 0, 8 * size, 0))
        return np.dtype(f"{'>' if bits & 1 else '<'}{'i' if bits & 8 else 'u'}{size}") if whole else None
    if kind == 1 and len(message) >= 20 and not bits & 64:
        if (size, message[13], bits & 1) == (2, 8, 0):
            return BFLOAT16
        found = _FLOATS.get((size, message[13]))
        return found and found.newbyteorder(">" if bits & 1 else "<")
    return None


def layout(message: memoryview) -> int:
    """How numbers lie: 0 in the message itself, 1 in one piece, 2 in chunks."""
    version, kind = message[0], message[1]
    known = version == 3 and kind <= 2 and len(message) >= (4, 18, 11 + 4 * message[2])[kind]
    expect(known, "it keeps numbers in a form that is not supported")
    return kind


def filters(message: memoryview) -> Iterator[int]:
    """The filters through which chunks went, by number, in that order."""
    version, number, at = message[0], message[1], 8 if message[0] == 1 else 2
    for _ in range(number):
        kind, length = (int.from_bytes(message[place : place + 2], "little") for place in (at, at + 2))
        named = version == 1 or kind >= 256
        at += 4 if named else 2
        values = int.from_bytes(message[at + 2 : at + 4], "little")
        at += 4 + (-(-length // 8) * 8 if named else 0) + 4 * (values + (values & 1 if version == 1 else 0))
        yield kind


def unpacked(stored: memoryview, filters: list[int], size: int, dtype: np.dtype) -> bytes | memoryview:
    """The bytes of a chunk, whose filters are undone."""
    content: bytes | memoryview = stored
    for kind in reversed(filters):
        if kind == FLETCHER:
            content = content[:-4]
        elif kind == DEFLATE:
            unpacking = zlib.decompressobj()
            try:
                content = unpacking.decompress(content, size + 4)
            except zlib.error as error:
                raise Unreadable(f"a chunk of it is damaged ({shown(str(error))})", ADVICE) from None
        else:
            planes = np.frombuffer(content, np.uint8)
            expect(len(planes) == size, "a chunk of it is cut")
            content = planes.reshape(dtype.itemsize, -1).T.tobytes()
    expect(len(content) == size, "a chunk of it is cut")
    return content
