"""Flax's msgpack: a tree of maps and arrays whose leaves are arrays in extension type 1 (scalars: 3).

We parse it ourselves. The msgpack library bounds neither depth nor the number of values, so that it can turn a hostile
file of a few megabytes into gigabytes of Python lists. Here every leaf is a view of the file until it is copied once,
text that is not a key is skipped, and the memory of all other Python objects is budgeted before they are created.

References:
  https://github.com/msgpack/msgpack/blob/master/spec.md; ``flax.serialization`` for the extension types.
"""

import struct
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _places
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._sources import Source

_MAX_DEPTH = 64
_MAX_VALUES = 10 * _limits.MAX_LEAVES
_MAX_TEXT = 4_000  # the most bytes of a text that is decoded: no key is longer, and any other text is not a weight
# Memory budget of a tree's Python objects, besides the file and its leaves; 100,000 leaves need about 140 MiB.
_MAX_MEMORY = 192 * 2**20
# Upper bounds in bytes: a view of the file; a map, a list or an entry of one; a text or a number; a character.
_VIEW, _NODE, _SMALL, _CHAR = 256, 104, 80, 4
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
_CHUNKED = "__msgpack_chunked_array__"
_ADVICE = "The file is damaged or not a Flax checkpoint: ask for it again, as safetensors."
_NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
# Bytes of the length that follows the marker.
_TEXTS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BLOBS = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_LISTS = {0xDC: 2, 0xDD: 4}
_MAPS = {0xDE: 2, 0xDF: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}


class _Extension(NamedTuple):
    kind: int
    data: memoryview


def matches(data: bytes) -> bool:
    """Whether the content begins like a tree: with a non-empty map or array."""
    return data[:1] != b"" and (0x81 <= data[0] <= 0x8F or 0x91 <= data[0] <= 0x9F or data[0] in {*_LISTS, *_MAPS})


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The tree's arrays and numbers by path; text, ``None`` and the like are not weights and are left out."""
    del max_bytes  # each leaf is a piece of the file, and together they are no larger
    leaves = _views(source.data)
    for name, leaf in leaves.items():
        if isinstance(leaf, np.ndarray) and not leaf.flags.writeable:  # a view, which would keep the file in memory
            leaves[name] = leaf.copy()
    return leaves


def places(source: Source) -> _places.Places:
    """Where the arrays lie: those that are views of the file."""
    first = np.frombuffer(source.data, np.uint8).ctypes.data
    return {
        name: _places.Unwritable.PACKED
        if leaf.flags.writeable
        else _places.in_order(leaf.ctypes.data - first, leaf.dtype, leaf.shape)
        for name, leaf in _views(source.data).items()
        if isinstance(leaf, np.ndarray)
    }


def _views(data: bytes) -> dict[str, np.ndarray | Foreign]:
    """The tree's arrays, as read-only views of the file, and its numbers by path."""
    walk = _Walk(memoryview(data))
    tree = walk.value(0)
    if walk.position != len(data):
        raise Unreadable(f"it goes on after its end at byte {walk.position:,}", _ADVICE)
    leaves: dict[str, np.ndarray | Foreign] = {}
    _collect(tree, "", leaves)
    _limits.check_number(len(leaves))
    return leaves


class _Walk:
    """One pass over msgpack bytes, with limits on depth, on the number of values, and on the memory they take."""

    def __init__(self, data: memoryview, values: int = _MAX_VALUES) -> None:
        self._data, self.position, self._left, self._memory = data, 0, values, _MAX_MEMORY

    def value(self, depth: int, path: int = 0) -> Any:
        """Reads the next value and moves the position past it; extensions become views of the file.

        Args:
          depth: the value's depth in the tree.
          path: the number of characters in its path, which a leaf's name takes again.
        """
        self._left -= 1
        if depth > _MAX_DEPTH or self._left < 0:
            what = f"is nested more than {_MAX_DEPTH} deep" if depth > _MAX_DEPTH else "has too many values"
            raise Unreadable(f"it {what}", _ADVICE)
        marker = self.take(1)[0]
        if marker < 0x80 or marker >= 0xE0:
            self._take_memory(0, path)
            return marker if marker < 0x80 else marker - 0x100
        if marker <= 0x8F or marker in _MAPS:
            length = self._length(_MAPS[marker]) if marker in _MAPS else marker & 0x0F
            return self._map(length, depth, path)
        if marker <= 0x9F or marker in _LISTS:
            length = self._length(_LISTS[marker]) if marker in _LISTS else marker & 0x0F
            self._take_memory(_NODE)
            return [self.value(depth + 1, path + 8) for _ in range(length)]
        if marker <= 0xBF or marker in _TEXTS:
            return self._text(self._length(_TEXTS[marker]) if marker in _TEXTS else marker & 0x1F)
        if marker in (0xC0, 0xC2, 0xC3):
            self._take_memory(0, path if marker != 0xC0 else 0)
            return {0xC0: None, 0xC2: False, 0xC3: True}[marker]
        self._take_memory(_SMALL if marker in _NUMBERS else _VIEW, path)
        if marker in _BLOBS:
            return self.take(self._length(_BLOBS[marker]))
        if marker in _EXTENSIONS or marker in _FIXED_EXTENSIONS:
            length = _FIXED_EXTENSIONS.get(marker) or self._length(_EXTENSIONS[marker])
            return _Extension(self.take(1)[0], self.take(length))
        if marker in _NUMBERS:
            kind = _NUMBERS[marker]
            return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]
        raise Unreadable(f"it has the marker {marker:#x}, which msgpack does not know", _ADVICE)

    def take(self, length: int) -> memoryview:
        """The next bytes."""
        start, self.position = self.position, self.position + length
        if self.position > len(self._data):
            raise Unreadable("it ends in the middle of a value", _ADVICE)
        return self._data[start : self.position]

    def _length(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def _take_memory(self, size: int, characters: int = 0) -> None:
        self._memory -= size + _CHAR * characters
        if self._memory < 0:
            raise Unreadable("its tree takes far more memory than the file's size", _ADVICE)

    def _text(self, length: int) -> str | None:
        if length > _MAX_TEXT:
            self.take(length)
            return None
        self._take_memory(_SMALL, length)
        try:
            return bytes(self.take(length)).decode()
        except UnicodeDecodeError:
            raise Unreadable("it holds text that is no UTF-8", _ADVICE) from None

    def _map(self, length: int, depth: int, path: int) -> dict[str, Any]:
        self._take_memory(_NODE)
        found: dict[str, Any] = {}
        for _ in range(length):
            self._take_memory(_NODE)
            key = self.value(depth + 1)
            name = str(key) if type(key) is int else key
            if not isinstance(name, str) or name in found:
                wrong = f"the key {shown(key)} twice" if isinstance(name, str) else "a key that is not a short text"
                raise Unreadable(f"a map in it has {wrong}", _ADVICE)
            found[name] = self.value(depth + 1, path + len(name) + 1)
        return found


def _collect(value: Any, path: str, leaves: dict[str, np.ndarray | Foreign]) -> None:
    """Adds the leaves of a tree to ``leaves`` by path."""
    if isinstance(value, dict | list):
        if isinstance(value, dict) and _CHUNKED in value:
            return _add(path, _chunks(path, value), leaves)
        steps = value.items() if isinstance(value, dict) else enumerate(value)
        for step, part in steps:
            _collect(part, f"{path}/{step}" if path else str(step), leaves)
    elif isinstance(value, _Extension):
        _add(path, _array(path, value), leaves)
    elif isinstance(value, bool | int | float):
        _add(path, np.asarray(value), leaves)
    return None


def _add(path: str, leaf: np.ndarray | Foreign, leaves: dict[str, np.ndarray | Foreign]) -> None:
    _limits.check_name(path)
    if path in leaves:
        raise Unreadable(f"the leaf {shown(path)} occurs twice", _ADVICE)
    leaves[path] = leaf
    _limits.check_number(len(leaves))


def _array(path: str, value: _Extension) -> np.ndarray | Foreign:
    """Decodes the array in an extension, which holds a shape, a dtype's name, and bytes in C order."""
    if value.kind not in (_ARRAY, _SCALAR):
        what = "a complex number" if value.kind == _COMPLEX else f"an extension of type {value.kind}"
        return Foreign(f"leaf {shown(path)} is {what}", "Weights are real arrays: leave it out.")
    walk = _Walk(value.data, values=64)
    parts = walk.value(_MAX_DEPTH - 3)
    if not isinstance(parts, list) or len(parts) != 3 or walk.position != len(value.data):
        raise Unreadable(f"leaf {shown(path)} is not an array as Flax writes them", _ADVICE)
    shape, kind, content = parts
    name = bytes(kind).decode(errors="replace") if isinstance(kind, memoryview) else kind
    dtype = _limits.BY_NAME.get(name) if isinstance(name, str) else None
    if dtype is None:
        return Foreign(f"leaf {shown(path)} is of dtype {shown(name)}", "Cast it to float32, float16 or bfloat16.")
    if not isinstance(content, memoryview):
        raise Unreadable(f"leaf {shown(path)} has no bytes", _ADVICE)
    whole = _limits.check_shape(path, shape, dtype, len(content))
    return np.frombuffer(content, dtype).reshape(whole)


def _chunks(path: str, value: dict[str, Any]) -> np.ndarray | Foreign:
    """Joins an array of more than 1 GiB, which Flax cuts into pieces."""
    shape, pieces = value.get("shape"), value.get("chunks")
    if not isinstance(shape, dict) or not isinstance(pieces, dict) or not pieces:
        raise Unreadable(f"leaf {shown(path)} is not an array in pieces as Flax writes them", _ADVICE)
    read = [_array(path, piece) for piece in pieces.values() if isinstance(piece, _Extension)]
    foreign = [array for array in read if isinstance(array, Foreign)]
    if foreign:
        return foreign[0]
    arrays = [array for array in read if not isinstance(array, Foreign)]
    if len(arrays) < len(pieces) or len({array.dtype for array in arrays}) > 1 or any(a.ndim != 1 for a in arrays):
        raise Unreadable(f"leaf {shown(path)} has pieces that do not fit together", _ADVICE)
    joined = np.concatenate(arrays)
    return joined.reshape(_limits.check_shape(path, list(shape.values()), joined.dtype, joined.nbytes))
