"""Reads HDF5, the container of Keras' weights: its groups, its attributes of text and its datasets of numbers.

We parse it ourselves, since the HDF5 library is not safe on hostile files. An object (a group or a dataset) has a
header, which is a list of messages: the entries of a group, or the shape, type and place of a dataset's numbers, and
attributes of either.
Covered is what h5py writes unless it is told otherwise; the newer forms (``libver="latest"``) are refused, and virtual
datasets, records, text and links to other files are left out by name.

References:
  https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html (the file format, version 3).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _hdf5_messages as messages
from smark_jax.files import _limits
from smark_jax.files._hdf5_messages import expect
from smark_jax.files._limits import Foreign, shown

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_NOWHERE = 2**64 - 1
_MAX_STEPS = 2**19  # messages of headers, entries of groups and chunks together
_MAX_PATHS = 2**24  # characters of all paths together
_MAX_DEPTH = 32
_MAX_TEXT = 2**24  # bytes of all texts that are read together, of which several may be the same
_MAX_CHUNK = 2**26  # bytes of a chunk once unpacked
# Types of messages.
_SPACE, _TYPE, _OUTSIDE, _LAYOUT, _FILTERS, _ATTRIBUTE, _CONTINUATION, _TABLE = 1, 3, 7, 8, 11, 12, 16, 17
_SHORTEST = {_SPACE: 4, _TYPE: 8, _OUTSIDE: 0, _LAYOUT: 8, _FILTERS: 8, _ATTRIBUTE: 8, _CONTINUATION: 16, _TABLE: 16}
_NEWER = (2, 6)  # messages of groups that have no table

Item = dict[int, list[memoryview]]
"""A group or a dataset: the messages of its header by type."""


class Dataset(NamedTuple):
    """What a dataset's header says of its numbers.

    Attributes:
      dtype: in the file's byte order.
      shape: of the array.
      start: of its bytes in the file, where they lie there in C order; else None.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int | None


def is_dataset(item: Item | None) -> bool:
    """Whether an object holds numbers."""
    return item is not None and _LAYOUT in item


class File:
    """A file, whose objects are read within limits.

    Args:
      data: its content.
      max_bytes: limit on the size of all arrays together.

    Raises:
      Unreadable: by every method, when the file is damaged, of a rare form or beyond a limit.
    """

    def __init__(self, data: bytes | memoryview, max_bytes: int) -> None:
        self._data = memoryview(data)
        self._steps, self._paths, self._texts = _MAX_STEPS, _MAX_PATHS, _MAX_TEXT
        self._left, self._unpacked = max_bytes, 4 * max_bytes
        version = self._at(0, 24)[8]
        expect(version < 2, "it is written in a newer form (libver='latest')")
        expect(bytes(self._at(13, 2)) == b"\x08\x08", "its addresses do not have eight bytes")
        self._root = self._number(64 + 4 * version, 8)

    def items(self) -> dict[str, Item | None]:
        """All groups and datasets by path, the root as ``""``; None for a link to a path or to another file."""
        found: dict[str, Item | None] = {}
        waiting: list[tuple[str, int | None, int]] = [("", self._root, 0)]
        while waiting:
            path, address, depth = waiting.pop()
            self._paths -= len(path)
            expect(self._paths >= 0 and depth <= _MAX_DEPTH, "its groups are too deep or too many")
            expect(path not in found, f"the name {shown(path)} occurs twice")
            item = found[path] = None if address is None else self._item(address)
            for name, there in self._entries(item or {}):
                whole = _limits.check_name(f"{path}/{name}" if path else name)
                waiting.append((whole, there, depth + 1))
        return found

    def text(self, item: Item | None, name: str) -> str | None:
        """An object's attribute of text, or None if it has none of this name, or it is no single text."""
        for message in (item or {}).get(_ATTRIBUTE, []):
            version, rounded = message[0], 8 if message[0] == 1 else 1
            lengths = [int.from_bytes(message[place : place + 2], "little") for place in (2, 4, 6)]
            start = 9 if version == 3 else 8
            parts = []
            for length in lengths:
                parts.append(message[start : start + length])
                start += -(-length // rounded) * rounded
            if bytes(parts[0]).rstrip(b"\0") == name.encode():
                expect(len(parts[1]) >= 8 and len(parts[2]) >= 4, f"the attribute {shown(name)} is cut")
                return self._text(parts[1], message[start:]) if messages.dimensions(parts[2]) == () else None
        return None

    def dataset(self, item: Item, name: str) -> Dataset | Foreign:
        """The type, shape and place of a dataset's numbers, or why they are none."""
        dtype = messages.dtype(_one(item, _TYPE))
        if dtype is None and self.text(item, "dtype") == "bfloat16":
            dtype = messages.BFLOAT16
        shape, layout = messages.dimensions(_one(item, _SPACE)), _one(item, _LAYOUT)
        if dtype is None or shape is None or _OUTSIDE in item:
            return Foreign(f"dataset {shown(name)} is no plain array of real numbers", "Cast it to float32.")
        size = math.prod(shape) * dtype.itemsize
        _limits.check_shape(name, shape, dtype, size)
        start = None
        if messages.layout(layout) == 1 and size:
            address, length = (int.from_bytes(layout[place : place + 8], "little") for place in (2, 10))
            if address == _NOWHERE:
                return Foreign(f"dataset {shown(name)} was never written", messages.ADVICE)
            expect(length == size, f"dataset {shown(name)} of {size:,} bytes has {length:,}")
            self._at(start := address, size)
        return Dataset(dtype, shape, start)

    def array(self, item: Item, name: str) -> np.ndarray | Foreign:
        """A dataset's numbers in a new array, or why it has none."""
        found = self.dataset(item, name)
        if isinstance(found, Foreign):
            return found
        size = math.prod(found.shape) * found.dtype.itemsize
        self.take(size)
        layout = _one(item, _LAYOUT)
        if found.start is not None:
            content = np.frombuffer(self._at(found.start, size), found.dtype).reshape(found.shape)
        elif size == 0:
            content = np.zeros(found.shape, found.dtype)
        elif messages.layout(layout) == 0:
            expect(len(layout) >= 4 + size, f"dataset {shown(name)} is cut")
            content = np.frombuffer(layout[4 : 4 + size], found.dtype).reshape(found.shape)
        else:
            content = self._chunked(found, item, name)
            if content is None:
                problem = f"dataset {shown(name)} has chunks that are missing or packed in a rare way"
                return Foreign(problem, messages.ADVICE)
        return content.astype(found.dtype.newbyteorder("="), copy=content.base is not None)  # a view is one of the file

    def take(self, size: int) -> None:
        """Counts the bytes of an array that is about to be made."""
        self._left -= size
        if self._left < 0:
            raise _limits.too_large("its arrays are larger than is allowed")

    def _chunked(self, found: Dataset, item: Item, name: str) -> np.ndarray | None:
        """The array whose chunks a tree lists, or None if one is missing or goes through an unknown filter."""
        filters = [kind for message in item.get(_FILTERS, []) for kind in messages.filters(message)]
        layout = _one(item, _LAYOUT)
        rank = layout[2] - 1
        lengths = tuple(int.from_bytes(layout[at : at + 4], "little") for at in range(11, 11 + 4 * rank, 4))
        expect(rank == len(found.shape) and all(lengths), f"dataset {shown(name)} has chunks of shape {lengths}")
        size = math.prod(lengths) * found.dtype.itemsize
        known = {messages.DEFLATE, messages.SHUFFLE, messages.FLETCHER}
        if not set(filters) <= known or len(filters) > len(set(filters)) or size > _MAX_CHUNK:
            return None
        content, there = np.empty(found.shape, found.dtype.newbyteorder("=")), set()
        for stored, skipped, corner in self._chunks(int.from_bytes(layout[3:11], "little"), rank):
            self._unpacked -= size
            inside = all(a < n and a % step == 0 for a, n, step in zip(corner, found.shape, lengths, strict=True))
            expect(inside and skipped == 0 and self._unpacked >= 0, f"dataset {shown(name)} has a chunk at {corner}")
            numbers = np.frombuffer(messages.unpacked(stored, filters, size, found.dtype), found.dtype).reshape(lengths)
            into = content[tuple(slice(a, a + step) for a, step in zip(corner, lengths, strict=True))]
            into[...] = numbers[tuple(map(slice, into.shape))]
            there.add(corner)
        number = math.prod(-(-n // step) for n, step in zip(found.shape, lengths, strict=True))
        return content if len(there) == number else None

    def _chunks(self, address: int, rank: int) -> Iterator[tuple[memoryview, int, tuple[int, ...]]]:
        """The bytes of each chunk, the filters that it skips, and its first index."""
        for key, child in self._tree(address, 1, 16 + 8 * rank):
            size, skipped = (int.from_bytes(key[at : at + 4], "little") for at in (0, 4))
            yield self._at(child, size), skipped, tuple(np.frombuffer(key[8 : 8 + 8 * rank], "<u8").tolist())

    def _tree(self, address: int, kind: int, width: int) -> Iterator[tuple[memoryview, int]]:
        """The keys of ``width`` bytes and the addresses in the leaves of a tree (version 1)."""
        waiting = [] if address == _NOWHERE else [(address, 256)]
        while waiting:
            address, above = waiting.pop()
            head = self._at(address, 24)
            level, used = head[5], int.from_bytes(head[6:8], "little")
            expect(bytes(head[:4]) == b"TREE" and head[4] == kind and level < above, "a tree of it is damaged")
            content = self._at(address + 24, used * (width + 8))
            self._spend(1 + used)
            for at in range(0, len(content), width + 8):
                child = int.from_bytes(content[at + width : at + width + 8], "little")
                if level:
                    waiting.append((child, level))
                else:
                    yield content[at : at + width], child

    def _entries(self, item: Item) -> Iterator[tuple[str, int | None]]:
        """The names in a group, and the addresses of what they name; None for links to elsewhere."""
        for message in item.get(_TABLE, []):
            tree, heap = (int.from_bytes(message[at : at + 8], "little") for at in (0, 8))
            names = self._number(heap + 24, 8)
            expect(bytes(self._at(heap, 4)) == b"HEAP", "the names in a group are damaged")
            for _, node in self._tree(tree, 0, 8):
                expect(bytes(self._at(node, 4)) == b"SNOD", "a group of it is damaged")
                for at in range(node + 8, node + 8 + 40 * self._number(node + 6, 2), 40):
                    self._spend(1)
                    start, there, cache = (self._number(at + step, size) for step, size in ((0, 8), (8, 8), (16, 4)))
                    text = bytes(self._data[names + start : names + start + 4096]).partition(b"\0")[0]
                    yield _name(text), None if cache == 2 else there

    def _item(self, address: int) -> Item:
        """The messages of an object's header."""
        expect(self._at(address, 16)[0] == 1, f"the object at byte {address:,} is damaged, or of a newer form")
        blocks = [(address + 16, self._number(address + 8, 4))]
        found: Item = {}
        for start, length in blocks:  # which grow
            block = self._at(start, length)
            while len(block) >= 8:
                kind, size = (int.from_bytes(block[at : at + 2], "little") for at in (0, 2))
                shared, content, block = block[4] & 2, block[8 : 8 + size], block[8 + size :]
                self._spend(1)
                expect(kind not in _NEWER, "it keeps a group in a newer form, or links to other files")
                if kind in _SHORTEST:
                    whole = len(content) == size >= _SHORTEST[kind]
                    expect(whole and not shared, f"the object at byte {address:,} is cut, or shares a type")
                    found.setdefault(kind, []).append(content)
                if kind == _CONTINUATION:
                    there, more = (int.from_bytes(content[at : at + 8], "little") for at in (0, 8))
                    blocks.append((there, more))
        return found

    def _text(self, kind: memoryview, content: memoryview) -> str | None:
        """A single text: of a fixed length, or an entry of the heap."""
        size = int.from_bytes(kind[4:8], "little")
        if kind[0] & 15 == 9 and kind[1] & 15 == 1:
            address, index = int.from_bytes(content[4:12], "little"), int.from_bytes(content[12:16], "little")
            content, size = self._heap_entry(address, index), int.from_bytes(content[:4], "little")
        elif kind[0] & 15 != 3:
            return None
        self._texts -= size
        expect(size <= len(content) and self._texts >= 0, "an attribute of it is cut, or its texts are too long")
        try:
            return str(content[:size], "utf-8").rstrip("\0")
        except UnicodeDecodeError:
            raise Unreadable("an attribute of it is no UTF-8", messages.ADVICE) from None

    def _heap_entry(self, address: int, index: int) -> memoryview:
        expect(bytes(self._at(address, 4)) == b"GCOL", "its texts are damaged")
        block = self._at(address, self._number(address + 8, 8))[16:]
        while len(block) >= 16:
            self._spend(1)
            number, size = int.from_bytes(block[:2], "little"), int.from_bytes(block[8:16], "little")
            if number == index:
                return block[16 : 16 + size]
            expect(number > 0, "a text of it is missing")
            block = block[16 + -(-size // 8) * 8 :]
        raise Unreadable("a text of it is missing", messages.ADVICE)

    def _at(self, start: int, length: int) -> memoryview:
        expect(start + length <= len(self._data), f"it ends before byte {start + length:,}")
        return self._data[start : start + length]

    def _number(self, start: int, length: int) -> int:
        return int.from_bytes(self._at(start, length), "little")

    def _spend(self, steps: int) -> None:
        self._steps -= steps
        expect(self._steps >= 0, f"it has more than {_MAX_STEPS:,} entries")


def _one(item: Item, kind: int) -> memoryview:
    """The content of the only message of a type."""
    found = item.get(kind, [])
    expect(len(found) == 1, f"an object has {len(found)} messages of type {kind}")
    return found[0]


def _name(text: bytes | memoryview) -> str:
    name = str(text, "utf-8", "replace")
    expect("/" not in name, f"its name {shown(name)} has a slash")
    return _limits.check_name(name)
