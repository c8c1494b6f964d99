"""Reads GGUF: notes, a list of tensors, then their numbers, each aligned; blocks of small numbers have scales.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; ``ggml/src/ggml-common.h`` for the blocks.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _places
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._places import Place, Unwritable
from smark_jax.files._sources import Source

_ADVICE = "The file is damaged or forged: ask for it again, as safetensors."
_VERSIONS = (2, 3)
_MAX_NOTES, _MAX_LIST, _MAX_TEXT, _MAX_AXES = 1_000, 1_000_000, 4_000, 8
_BLOCK = 32
# By their numbers in the file: the bytes of notes, and the dtypes of tensors.
_NOTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_WHOLE, _TEXT, _LIST = 4, 8, 9
_PLAIN = {
    number: _limits.DTYPES[name]
    for number, name in {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}.items()
}
# Blocks of 32 numbers: two of four bits in a byte, or one of eight.
_BLOCKS = {
    2: np.dtype([("scale", "<f2"), ("codes", "u1", 16)]),
    3: np.dtype([("scale", "<f2"), ("least", "<f2"), ("codes", "u1", 16)]),
    8: np.dtype([("scale", "<f2"), ("codes", "i1", 32)]),
}


class _Tensor(NamedTuple):
    """A tensor in the list: its shape, the number of its type, and where its numbers begin."""

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int


def matches(data: bytes) -> bool:
    """Whether the content begins like a GGUF file."""
    return data.startswith(b"GGUF")


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The tensors by name; those in blocks of 4 or 8 bits as float32."""
    leaves: dict[str, np.ndarray | Foreign] = {}
    left = max_bytes
    for tensor in _tensors(source.data):
        left -= math.prod(tensor.shape) * (_PLAIN[tensor.kind].itemsize if tensor.kind in _PLAIN else 4)
        if left < 0:
            raise _limits.too_large(f"its leaves take more than {max_bytes:,} bytes")
        if tensor.kind in _BLOCKS:
            leaves[tensor.name] = _dequantised(source.data, tensor)
        elif tensor.kind in _PLAIN:
            dtype = _PLAIN[tensor.kind]
            found = _numbers(source.data, tensor, dtype, math.prod(tensor.shape))
            leaves[tensor.name] = found.reshape(tensor.shape).copy()
        else:
            what = f"leaf {shown(tensor.name)} is of the type {tensor.kind} of ggml"
            leaves[tensor.name] = Foreign(what, "Ask for it in F32, F16, BF16 or Q8_0.")
    return leaves


def places(source: Source) -> dict[str, Place | Unwritable]:
    """Where the tensors lie."""
    return {
        tensor.name: _places.in_order(tensor.start, _PLAIN[tensor.kind], tensor.shape)
        if tensor.kind in _PLAIN
        else Unwritable.QUANTISED
        for tensor in _tensors(source.data)
        if tensor.kind in _PLAIN or tensor.kind in _BLOCKS
    }


class _Walk:
    """One pass over the notes and the list of tensors."""

    def __init__(self, data: bytes) -> None:
        self._data, self.position = data, 4

    def take(self, length: int) -> bytes:
        """The next bytes."""
        start = self.skip(length)
        return self._data[start : self.position]

    def skip(self, length: int) -> int:
        """Moves past the next bytes, and returns where they begin."""
        start, self.position = self.position, self.position + length
        if self.position > len(self._data):
            raise Unreadable("it ends in the middle of a value", _ADVICE)
        return start

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def text(self) -> str:
        """A name."""
        length = self.number(8)
        if length > _MAX_TEXT:
            raise Unreadable(f"a name in it has {length:,} bytes", _ADVICE)
        return self.take(length).decode(errors="replace")

    def note(self, kind: int) -> int | None:
        """Moves past a note; returns it if it is a number of four bytes."""
        if kind == _TEXT:
            self.skip(self.number(8))
        elif kind == _LIST:
            inner, count = self.number(4), self.number(8)
            if inner in _NOTES:
                self.skip(count * _NOTES[inner])
            elif inner == _TEXT and count <= _MAX_LIST:
                for _ in range(count):
                    self.skip(self.number(8))
            else:
                raise Unreadable(f"a note in it is a list of {count:,} values of the kind {inner}", _ADVICE)
        elif kind in _NOTES:
            found = self.number(_NOTES[kind])
            return found if kind == _WHOLE else None
        else:
            raise Unreadable(f"a note in it is of the kind {kind}", _ADVICE)
        return None


def _tensors(data: bytes) -> Iterator[_Tensor]:
    """The list of tensors, checked."""
    walk, alignment = _Walk(data), 32
    version, tensors, notes = walk.number(4), walk.number(8), walk.number(8)
    if version not in _VERSIONS:
        raise Unreadable(f"it is GGUF of version {version}, which is not known", "Convert it to safetensors.")
    _limits.check_number(tensors)
    if notes > _MAX_NOTES:
        raise Unreadable(f"it has {notes:,} notes, more than {_MAX_NOTES:,}", _ADVICE)
    for _ in range(notes):
        name = walk.text()
        found = walk.note(walk.number(4))
        alignment = found if name == "general.alignment" and found else alignment
    listed = []
    for _ in range(tensors):
        name, axes = _limits.check_name(walk.text()), walk.number(4)
        if axes > _MAX_AXES:
            raise Unreadable(f"leaf {shown(name)} has {axes:,} axes", _ADVICE)
        shape = tuple(walk.number(8) for _ in range(axes))[::-1]  # the file has the last axis first
        listed.append(_Tensor(name, shape, walk.number(4), walk.number(8)))
    _limits.check_names([tensor.name for tensor in listed])
    first = math.ceil(walk.position / alignment) * alignment
    for tensor in listed:
        _limits.check_shape(tensor.name, tensor.shape, np.dtype(np.uint8), math.prod(tensor.shape))
        yield tensor._replace(start=first + tensor.start)


def _numbers(data: bytes, tensor: _Tensor, dtype: np.dtype, count: int) -> np.ndarray:
    """So many numbers or blocks of a tensor."""
    if tensor.start + count * dtype.itemsize > len(data):
        raise Unreadable(f"leaf {shown(tensor.name)} goes on after the end of the file", _ADVICE)
    return np.frombuffer(data, dtype, count, tensor.start) if count else np.empty(0, dtype)


def _dequantised(data: bytes, tensor: _Tensor) -> np.ndarray:
    """Blocks as float32: codes times a scale; those of four bits are 8 too large, or have a least number to add."""
    if not tensor.shape or tensor.shape[-1] % _BLOCK:
        raise Unreadable(f"leaf {shown(tensor.name)} of shape {shown(tensor.shape)} is not in blocks of 32", _ADVICE)
    dtype = _BLOCKS[tensor.kind]
    blocks = _numbers(data, tensor, dtype, math.prod(tensor.shape) // _BLOCK)
    result = np.empty((len(blocks), _BLOCK), np.float32)
    if dtype["codes"].shape == (_BLOCK,):
        result[:] = blocks["codes"]
    else:  # the second half of a block is in the upper bits
        result[:, : _BLOCK // 2], result[:, _BLOCK // 2 :] = blocks["codes"] & 15, blocks["codes"] >> 4
    with np.errstate(all="ignore"):
        if tensor.kind == 2:
            result -= 8
        result *= blocks["scale"][:, None].astype(np.float32)
        if "least" in (dtype.names or ()):
            result += blocks["least"][:, None].astype(np.float32)
    return result.reshape(tensor.shape)
