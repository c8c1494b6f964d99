"""Reads the binary format of FlatBuffers without a schema, within limits; each vector says where its bytes lie.

A file begins with the position of its root table. A table begins with the distance back to its list of fields, which
says for each field of the schema how far into the table its value lies, or 0 if it is absent. Numbers stand in the
table itself; texts, vectors and other tables stand elsewhere, and the table holds the distance to them.

References:
  https://flatbuffers.dev/internals/
"""

import struct
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits

ADVICE = "The file is damaged or forged: ask for it again."
_MAX_READS = (
    2**22
)  # fields, entries and numbers together; tables may share parts, so that the file's size bounds nothing
_LISTED = 8  # reads for which a number counts that is put into a list, and so takes memory
_MAX_TEXT = 2**25  # bytes of all text together


class Span(NamedTuple):
    """Where bytes begin and end in the file."""

    start: int
    end: int


class Reader:
    """Reads tables in one file; what all of its calls together may create is limited."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._reads, self._text = _MAX_READS, _MAX_TEXT

    def root(self) -> "Table":
        """The file's root table."""
        return Table(self, self.number(0, "<I"))

    def number(self, position: int, kind: str) -> Any:
        """The number at a position, of a kind of the module ``struct``."""
        self.count(1)
        end = position + struct.calcsize(kind)
        if position < 0 or end > len(self.data):
            raise Unreadable(f"it points to byte {position:,} of {len(self.data):,}", ADVICE)
        return struct.unpack_from(kind, self.data, position)[0]

    def count(self, reads: int) -> None:
        """Counts what is about to be read.

        Raises:
          Unreadable: when that is far more than a network has.
        """
        self._reads -= reads
        if self._reads < 0:
            raise Unreadable(f"it has more than {_MAX_READS:,} fields and small numbers", ADVICE)

    def text(self, span: Span) -> str:
        """The text in a span."""
        self._text -= span.end - span.start
        if self._text < 0:
            raise Unreadable(f"it has more than {_MAX_TEXT:,} bytes of text", ADVICE)
        return self.data[span.start : span.end].decode(errors="replace")


class Table(NamedTuple):
    """A table of the file. Fields go by their places in the schema, from 0 on."""

    reader: Reader
    position: int

    def _field(self, field: int) -> int | None:
        """Where the value of a field lies, if the table has it."""
        places = self.position - self.reader.number(self.position, "<i")
        if 4 + 2 * field >= self.reader.number(places, "<H"):
            return None
        return self.position + step if (step := self.reader.number(places + 4 + 2 * field, "<H")) else None

    def _target(self, field: int) -> int | None:
        """Where the text, vector or table of a field begins, if the table has it."""
        position = self._field(field)
        return None if position is None else position + self.reader.number(position, "<I")

    def number(self, field: int, kind: str, absent: Any = 0) -> Any:
        """The number of a field, of a kind of the module ``struct``."""
        position = self._field(field)
        return absent if position is None else self.reader.number(position, kind)

    def table(self, field: int) -> "Table | None":
        """The table of a field, if there is one."""
        position = self._target(field)
        return None if position is None else Table(self.reader, position)

    def tables(self, field: int, most: int = _limits.MAX_LEAVES) -> list["Table"]:
        """The tables in a field's vector.

        Raises:
          Unreadable: when there are more than ``most``.
        """
        start, end = self.span(field, 4)
        number = (end - start) // 4
        if number > most:
            raise Unreadable(f"it has a list of {number:,} entries, more than {most:,}", ADVICE)
        steps = [(place, self.reader.number(place, "<I")) for place in range(start, end, 4)]
        return [Table(self.reader, place + step) for place, step in steps]

    def span(self, field: int, size: int = 1) -> Span:
        """Where the entries of a field's vector lie, of ``size`` bytes each; an empty span if there is none."""
        start = self._target(field)
        if start is None:
            return Span(0, 0)
        end = start + 4 + size * self.reader.number(start, "<I")
        if end > len(self.reader.data):
            raise Unreadable(f"its vector at byte {start:,} does not fit into the file", ADVICE)
        return Span(start + 4, end)

    def vector(self, field: int, dtype: str) -> np.ndarray:
        """The numbers in a field's vector, as a view of the file."""
        size = np.dtype(dtype).itemsize
        start, end = self.span(field, size)
        return np.frombuffer(self.reader.data, dtype, (end - start) // size, start)

    def integers(self, field: int) -> list[int]:
        """The int32 numbers in a field's vector."""
        found = self.vector(field, "<i4")
        self.reader.count(_LISTED * len(found))
        return found.tolist()

    def text(self, field: int) -> str:
        """The text of a field, empty if there is none."""
        return self.reader.text(self.span(field))
