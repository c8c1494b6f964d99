"""Walks the wire format of protocol buffers without a schema, within limits; each field says where its bytes lie.

A message is a sequence of fields. Each begins with a varint, eight times the field's number plus its wire type: 0 for a
varint, 1 and 5 for eight and four bytes, 2 for a length and as many bytes (text, a message, packed numbers).

References:
  https://protobuf.dev/programming-guides/encoding/
"""

import struct
from collections.abc import Iterator

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits
from smark_jax.files._limits import shown

VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5
ADVICE = "The file is damaged or forged: ask for it again."
_MAX_FIELDS = 2**21  # fields and packed varints together, at most about 100 bytes of memory each
_MAX_TEXT = 2**25  # bytes of all text together: one rare character makes every character of a text take four bytes
_MAX_VARINT = 10  # bytes

Span = tuple[int, int]
"""Where bytes begin and end in the file."""


class Reader:
    """Reads messages in one file; what all of its calls together may create is limited."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self._fields, self._text = _MAX_FIELDS, _MAX_TEXT

    def fields(self, span: Span | None = None) -> Iterator[tuple[int, int, int, Span]]:
        """The fields of the message in ``span`` (all of the file by default).

        Yields:
          The field's number, its wire type, its value if that is a varint (else 0), and where its bytes lie.

        Raises:
          Unreadable: when the bytes are no message, or the file has far more fields than a network.
        """
        position, end = (0, len(self.data)) if span is None else span
        while position < end:
            key, position = self._varint(position, end)
            number, wire = key >> 3, key & 7
            value, start = 0, position
            if wire == VARINT:
                value, position = self._varint(position, end)
            elif wire == BYTES:
                length, start = self._varint(position, end)
                position = start + length
            elif wire in (EIGHT, FOUR):
                position = start + (8 if wire == EIGHT else 4)
            else:
                raise Unreadable(f"it has a field of wire type {wire} at byte {start:,}", ADVICE)
            if position > end or number == 0:
                raise Unreadable(f"its field {number} at byte {start:,} does not fit into its message", ADVICE)
            yield number, wire, value, (start, position)

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        self._count(1)
        value = 0
        for count, byte in enumerate(self.data[position : min(end, position + _MAX_VARINT)]):
            value |= (byte & 0x7F) << (7 * count)
            if byte < 0x80:
                return value & (2**64 - 1), position + count + 1
        raise Unreadable(f"it has no valid number at byte {position:,}", ADVICE)

    def _count(self, fields: int) -> None:
        self._fields -= fields
        if self._fields < 0:
            raise Unreadable(f"it has more than {_MAX_FIELDS:,} fields and small numbers", ADVICE)

    def text(self, span: Span) -> str:
        """A field of text."""
        self._text -= span[1] - span[0]
        if self._text < 0:
            raise Unreadable(f"it has more than {_MAX_TEXT:,} bytes of text", ADVICE)
        try:
            return str(self.data[span[0] : span[1]], "utf-8")
        except UnicodeDecodeError:
            raise Unreadable(f"its text at byte {span[0]:,} is no UTF-8", ADVICE) from None

    def name(self, span: Span) -> str:
        """A field of text that is short and printable; it may be empty."""
        if span[0] == span[1]:
            return ""
        if span[1] - span[0] > 4 * 1000:
            raise Unreadable(f"its name at byte {span[0]:,} is too long", ADVICE)
        return _limits.check_name(self.text(span))

    def integers(self, wire: int, value: int, span: Span) -> list[int]:
        """The signed integers of a field: one varint, or packed ones."""
        if wire == VARINT:
            return [_signed(value)]
        if wire != BYTES:
            raise Unreadable(f"its whole numbers at byte {span[0]:,} are of wire type {wire}", ADVICE)
        found, (position, end) = [], span
        while position < end:
            number, position = self._varint(position, end)
            found.append(_signed(number))
        return found

    def floats(self, wire: int, span: Span) -> np.ndarray:
        """The float32 values of a field: one, or packed ones."""
        if wire not in (FOUR, BYTES) or (span[1] - span[0]) % 4:
            raise Unreadable(f"its float numbers at byte {span[0]:,} are of wire type {wire} or cut", ADVICE)
        return np.frombuffer(self.data[span[0] : span[1]], "<f4")

    def listed_floats(self, wire: int, span: Span) -> list[float]:
        """The same values in a list, which takes the memory of as many fields."""
        found = self.floats(wire, span)
        self._count(len(found))
        return found.tolist()

    def one_float(self, wire: int, span: Span) -> float:
        """A field of a single float32."""
        if wire != FOUR:
            raise Unreadable(f"its float number at byte {span[0]:,} is of wire type {wire}", ADVICE)
        return struct.unpack("<f", self.data[span[0] : span[1]])[0]


def _signed(value: int) -> int:
    return value - 2**64 if value >> 63 else value


def expect(condition: bool, what: str, where: str) -> None:
    """Refuses a file that violates a condition of its format."""
    if not condition:
        raise Unreadable(f"{what} of {shown(where)} is not as its format has it", ADVICE)
