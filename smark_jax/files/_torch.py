"""Reads pickles of weights: PyTorch's files, with zip or without, TorchScript archives, and plain pickles of arrays.

Nothing in them runs, and PyTorch is not needed: :mod:`smark_jax.files._pickle` reads what a pickle describes,
:mod:`smark_jax.files._tensors` finds the tensors in it, and here are the bytes that hold their numbers.

References:
  ``torch/serialization.py``; ``torch/csrc/jit/serialization/export_module.cpp`` for TorchScript.
"""

import codecs
import math
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _pickle, _scaled, _tensors, _zip
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._pickle import Blob, Global, Object, Persistent
from smark_jax.files._places import Place, Unwritable
from smark_jax.files._sources import Source
from smark_jax.files._tensors import Found, Scaled, Tensor

_TREE, _CONSTANTS = "data.pkl", "constants.pkl"
_MAGIC = 0x1950A86A20F9469CFC6C  # the first of five pickles that PyTorch wrote before its version 1.6
_MAGIC_PICKLED = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_CHUNK = 2**20  # bytes
_HEAD_MEMORY, _SMALL_MEMORY = 2**20, 24 * 2**20
_ADVICE = "The file is damaged or forged: ask for it again, as safetensors."
_BIG = Unreadable("it was written on a big-endian machine", "Save it as safetensors there.")
_KINDS: dict[str, tuple[str | None, int]] = {
    **{"Float": ("F32", 4), "Double": ("F64", 8), "Half": ("F16", 2), "BFloat16": ("BF16", 2), "Long": ("I64", 8)},
    **{"Int": ("I32", 4), "Short": ("I16", 2), "Char": ("I8", 1), "Byte": ("U8", 1), "Bool": ("BOOL", 1)},
    **{"QInt8": ("I8", 1), "QUInt8": ("U8", 1), "QInt32": ("I32", 4), "QUInt4x2": (None, 1), "QUInt2x4": (None, 1)},
    **{"ComplexFloat": (None, 8), "ComplexDouble": (None, 16)},
}
# By the class of a storage: the dtype of its numbers, None for what are no real numbers, and the bytes of each.
_STORAGES = {
    f"torch.{name}Storage": (None if kind is None else _limits.DTYPES[kind], size)
    for name, (kind, size) in _KINDS.items()
} | {"torch.storage.UntypedStorage": (_limits.DTYPES["U8"], 1)}


class _Raw(NamedTuple):
    """The bytes of a storage, where they begin in the file unless they are coded, and the dtype of its numbers."""

    content: np.ndarray
    start: int | None
    dtype: np.dtype | None = None


class _Part(NamedTuple):
    """The tensors of one pickle by name, and what finds the bytes of their storages."""

    leaves: dict[str, Found]
    raw: Callable[[Any], _Raw]


class _Budget:
    """How many bytes leaves, and storages that are not in the file as they are, may still take."""

    def __init__(self, max_bytes: int) -> None:
        self._left = self.most = max_bytes

    def take(self, size: int) -> None:
        """Refuses what is beyond the limit, before it is made."""
        self._left -= size
        if self._left < 0:
            raise _limits.too_large(f"its leaves take more than {self.most:,} bytes")

    def copy(self, content: np.ndarray) -> bytes:
        """A copy, within the limit."""
        self.take(len(content))
        return content.tobytes()


def matches(data: bytes) -> bool:
    """Whether the content is a file of ``torch.save`` or ``torch.jit.save``.

    Raises:
      Unreadable: when it is a zip that is not safe to open.
    """
    if _zip.matches(data):
        return any(name.endswith(_TREE) for name in _zip.opened(data).namelist())
    return _pickle.matches(data) and _MAGIC_PICKLED in data[:32]


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The tensors by name; quantised ones as float32."""
    budget = _Budget(max_bytes)
    leaves: dict[str, np.ndarray | Foreign] = {}
    for part in _parts(source.data, budget):
        for name, found in part.leaves.items():
            leaves[name] = _leaf(name, found, part, budget)
    _limits.check_number(len(leaves))
    return leaves


def places(source: Source) -> dict[str, Place | Unwritable]:
    """Where the numbers of tensors lie."""
    found: dict[str, Place | Unwritable] = {}
    for part in _parts(source.data, _Budget(1 << 62)):
        for name, leaf in part.leaves.items():
            if isinstance(leaf, Tensor):
                raw = part.raw(leaf.storage)
                view = _view(name, leaf, raw)
                if isinstance(view, Foreign):
                    continue
                start = None if raw.start is None else raw.start + leaf.offset * view.itemsize
                found[name] = (
                    Unwritable.PACKED if start is None else Place("", start, view.dtype, view.shape, view.strides)
                )
            elif isinstance(leaf, Scaled):
                found[name] = Unwritable.QUANTISED
    return found


# --- what the file is made of


def _parts(data: bytes, budget: _Budget) -> Iterator[_Part]:
    """The pickles in a file that describe tensors."""
    if _zip.matches(data):
        yield from _zipped(data, budget)
    elif _MAGIC_PICKLED in data[:32]:
        tree, storages = _legacy(data, 0, len(data), _pickle.MAX_MEMORY)
        yield _Part(_tensors.find(tree), _Numbers(data, storages, budget).raw)
    else:
        yield _Part(_tensors.find(_pickle.load(data).value), _Numbers(data, _no_storage, budget).raw)


def _zipped(data: bytes, budget: _Budget) -> Iterator[_Part]:
    archive = _zip.bounded(data, budget.most)
    names = archive.namelist()
    trees = [name for name in names if name.endswith(_TREE) and name.count("/") <= 1]
    if len(trees) != 1:
        raise Unreadable(f"it has {len(trees)} members {_TREE}, where PyTorch writes one", _ADVICE)
    root = trees[0].removesuffix(_TREE)
    members = _Members(data, archive, budget)
    if f"{root}byteorder" in names and members.raw(f"{root}byteorder").content.tobytes() == b"big":
        raise _BIG
    yield _member(data, members, trees[0], f"{root}data/", "", budget)
    if f"{root}{_CONSTANTS}" in names:  # where a frozen TorchScript keeps its weights
        yield _member(data, members, f"{root}{_CONSTANTS}", f"{root}constants/", "constants", budget)


def _member(data: bytes, members: "_Members", name: str, folder: str, prefix: str, budget: _Budget) -> _Part:
    """A member that is a pickle, whose storages are members in a folder."""
    pickled = members.raw(name)
    whole = pickled.start is not None
    content, first = (budget.copy(pickled.content), 0) if pickled.start is None else (data, pickled.start)
    memory = _SMALL_MEMORY if prefix else _pickle.MAX_MEMORY
    tree = _pickle.load(content, first, first + len(pickled.content), memory).value

    def storage(reference: Any) -> _Raw:
        dtype, _, key = _described(reference)
        return members.raw(folder + key)._replace(dtype=dtype)

    return _Part(_tensors.find(tree, prefix), _Numbers(content, storage, budget, whole=whole).raw)


class _Members:
    """The members of a zip; what is compressed is unpacked once."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, budget: _Budget) -> None:
        self._data, self._archive, self._budget = data, archive, budget
        self._spans = _zip.spans(data)
        self._known: dict[str, _Raw] = {}

    def raw(self, name: str) -> _Raw:
        """A member's bytes."""
        try:
            if name not in self._known:
                self._known[name] = self._read(self._archive.getinfo(name))
        except Unreadable:
            raise
        except KeyError:
            raise Unreadable(f"it has no member {shown(name)}", _ADVICE) from None
        except _zip.DAMAGE as error:
            raise Unreadable(f"its member {shown(name)} is damaged ({shown(str(error))})", _ADVICE) from None
        return self._known[name]

    def _read(self, info: zipfile.ZipInfo) -> _Raw:
        span = self._spans.get(info.filename)
        if span is not None:
            return _Raw(_bytes(self._data, *span), span[0])
        self._budget.take(info.file_size)
        with self._archive.open(info) as stream:
            return _Raw(_zip.taken(stream, info.file_size, f"its member {shown(info.filename)}"), None)


def _legacy(data: bytes, start: int, end: int, memory: int) -> tuple[Any, Callable[[Any], _Raw]]:
    """What PyTorch before 1.6 wrote: five pickles, then the storages, each after the number of its elements."""
    magic = _pickle.load(data, start, end, _HEAD_MEMORY)
    version = _pickle.load(data, magic.end, end, _HEAD_MEMORY)
    system = _pickle.load(data, version.end, end, _HEAD_MEMORY)
    if magic.value != _MAGIC:
        raise Unreadable("it does not begin as PyTorch's files do", _ADVICE)
    if isinstance(system.value, dict) and system.value.get("little_endian") is False:
        raise _BIG
    tree = _pickle.load(data, system.end, end, memory)
    keys = _pickle.load(data, tree.end, end, _SMALL_MEMORY)
    kinds = {key: (dtype, size) for dtype, size, key in map(_described, tree.references)}
    storages: dict[str, _Raw] = {}
    position = keys.end
    for key in keys.value if isinstance(keys.value, list) else ():
        if not isinstance(key, str) or key not in kinds:
            raise Unreadable(f"it has the storage {shown(key)}, which no tensor takes", _ADVICE)
        dtype, size = kinds[key]
        first = position + 8
        position = first + size * int.from_bytes(data[position:first], "little")
        if position > end:
            raise Unreadable(f"its storage {shown(key)} goes on after the end of the file", _ADVICE)
        storages[key] = _Raw(_bytes(data, first, position), first, dtype)

    def storage(reference: Any) -> _Raw:
        key = _described(reference)[2]
        if key not in storages:
            raise Unreadable(f"it has no storage {shown(key)}", _ADVICE)
        return storages[key]

    return tree.value, storage


def _no_storage(reference: Any) -> _Raw:
    raise Unreadable(f"its pickle refers to the storage {_described(reference)[2]}, which it does not hold", _ADVICE)


def _described(reference: Any) -> tuple[np.dtype | None, int, str]:
    """The dtype of a storage's numbers, the bytes of each, and the storage's key; by the reference in a pickle."""
    match reference.reference if isinstance(reference, Persistent) else reference:
        case ("storage", Global(name), str() as key, _, _) | ("storage", Global(name), str() as key, _, _, None):
            if name in _STORAGES:
                dtype, size = _STORAGES[name]
                return dtype, size, key
            raise Unreadable(f"its storage {shown(key)} is of the class {shown(name)}, which is not known", _ADVICE)
    raise Unreadable("its pickle refers to what is no storage of PyTorch's", _ADVICE)


# --- the numbers of a tensor


class _Numbers:
    """Finds the bytes of tensors' storages."""

    def __init__(self, content: bytes, storage: Callable[[Any], _Raw], budget: _Budget, *, whole: bool = True) -> None:
        self._content, self._storage, self._budget, self._whole = content, storage, budget, whole
        self._nested: dict[int, _Raw] = {}

    def raw(self, where: Any) -> _Raw:
        """The bytes."""
        match where:
            case Persistent():
                return self._storage(where)
            case Object(name="torch.storage._load_from_bytes", arguments=(inner,)):
                if id(inner) not in self._nested:
                    self._nested[id(inner)] = self._file(self._pickled(inner))
                return self._nested[id(inner)]
        return self._pickled(where)

    def _pickled(self, where: Any) -> _Raw:
        """The bytes that stand in the pickle itself."""
        match where:
            case Blob(start, end, False):
                return _Raw(_bytes(self._content, start, end), start if self._whole else None)
            case (str() as text) | Object(name="_codecs.encode", arguments=(str() as text, *_)):
                return _Raw(_recoded(text.encode()), None)
            case Object(name="_codecs.encode", arguments=(Blob(start, end, True), *_)):
                self._budget.take(end - start)
                return _Raw(_recoded(memoryview(self._content)[start:end]), None)
        raise Unreadable("the numbers of a tensor are not where they should be", _ADVICE)

    def _file(self, inner: _Raw) -> _Raw:
        """The storage in a file that lies in the pickle: so a storage is written where it is pickled by itself."""
        if inner.start is not None:
            tree, storage = _legacy(self._content, inner.start, inner.start + len(inner.content), _HEAD_MEMORY)
            return storage(tree)
        tree, storage = _legacy(self._budget.copy(inner.content), 0, len(inner.content), _HEAD_MEMORY)
        return storage(tree)._replace(start=None)


def _bytes(data: bytes, start: int, end: int) -> np.ndarray:
    return np.frombuffer(data, np.uint8, end - start, start)


def _recoded(text: bytes | memoryview) -> np.ndarray:
    """The bytes that protocol 2 wrote as characters in UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    content, size = np.empty(len(text), np.uint8), 0
    try:
        for start in range(0, len(text), _CHUNK):
            piece = decoder.decode(text[start : start + _CHUNK]).encode("latin-1")
            content[size : size + len(piece)] = np.frombuffer(piece, np.uint8)
            size += len(piece)
    except UnicodeError:
        raise Unreadable("the bytes of an array in its pickle are no bytes", _ADVICE) from None
    return content[:size]


def _leaf(name: str, found: Found, part: _Part, budget: _Budget) -> np.ndarray | Foreign:
    """A leaf in memory of its own."""
    if isinstance(found, Scaled):
        return _dequantised(name, found, part, budget)
    view = found if isinstance(found, Foreign) else _view(name, found, part.raw(found.storage))
    if isinstance(view, Foreign):
        return view
    budget.take(view.nbytes)
    return np.array(view, view.dtype.newbyteorder("="), order="C")


def _view(name: str, tensor: Tensor, raw: _Raw) -> np.ndarray | Foreign:
    """A tensor as a view of its storage."""
    dtype = tensor.dtype or raw.dtype
    if dtype is None:
        return Foreign(f"leaf {shown(name)} is not of real numbers", _tensors.CAST)
    size = math.prod(tensor.shape)
    _limits.check_shape(name, tensor.shape, dtype, size * dtype.itemsize)
    if size == 0:
        return np.zeros(tensor.shape, dtype)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if last >= len(raw.content) // dtype.itemsize:
        raise Unreadable(f"leaf {shown(name)} has more numbers than its storage", _ADVICE)
    steps = [step * dtype.itemsize if n > 1 else 0 for n, step in zip(tensor.shape, tensor.strides, strict=True)]
    return np.ndarray(tensor.shape, dtype, raw.content, tensor.offset * dtype.itemsize, steps)


def _dequantised(name: str, found: Scaled, part: _Part, budget: _Budget) -> np.ndarray | Foreign:
    """A quantised tensor in float32."""
    parts = (found.numbers, found.scale, found.zero)
    budget.take(4 * sum(math.prod(part.shape) for part in parts if isinstance(part, Tensor)))
    numbers = _view(name, found.numbers, part.raw(found.numbers.storage))
    scale, zero = (
        _view(name, value, part.raw(value.storage)) if isinstance(value, Tensor) else np.float32(value)
        for value in (found.scale, found.zero)
    )
    if isinstance(numbers, Foreign) or isinstance(scale, Foreign) or isinstance(zero, Foreign):
        return Foreign(f"leaf {shown(name)} is quantised in a rare way", _tensors.CAST)
    if found.axis is not None:
        if not scale.shape == zero.shape == numbers.shape[found.axis : found.axis + 1]:
            raise Unreadable(f"leaf {shown(name)} has not one scale for each index of axis {found.axis}", _ADVICE)
        along = [-1 if axis == found.axis else 1 for axis in range(numbers.ndim)]
        scale, zero = scale.reshape(along), zero.reshape(along)
    result = _scaled.apply(numbers, scale, zero)
    if result is None:
        raise Unreadable(f"leaf {shown(name)} has scales that do not fit its shape", _ADVICE)
    return result
