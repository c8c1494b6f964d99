"""Reads npz, a zip of .npy files: sizes are checked before unpacking, and headers are matched, never evaluated."""

import math
import re
import zipfile
from collections.abc import Callable
from typing import IO, NamedTuple, TypeVar

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _places, _zip
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._sources import Source

T = TypeVar("T")

_MAX_HEADER = 4096
_HEADER = re.compile(
    r"\{\s*'descr':\s*'([<>|=]?)([a-zA-NP-Z]\d+)',\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(([\d, ]{0,600})\),?\s*\}\s*"
)
# NumPy's code for each dtype; for bfloat16 it writes only two bytes without a meaning.
_KINDS = {dtype.str[1:]: dtype for name, dtype in _limits.DTYPES.items() if not name.startswith("F8")}


def matches(data: bytes) -> bool:
    """Whether the content begins like a zip; PyTorch's files do too, but that format is tried first."""
    return _zip.matches(data)


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The arrays by name."""
    return _members(_zip.bounded(source.data, max_bytes), _array)


def places(source: Source) -> _places.Places:
    """Where the arrays lie: those of members that are stored as they are."""
    spans = _zip.spans(source.data)

    def place(stream: IO[bytes], header: _Header) -> _places.Place | _places.Unwritable:
        if header.member not in spans:
            return _places.Unwritable.PACKED
        dtype = header.dtype.newbyteorder(">") if header.swapped else header.dtype
        shape = header.shape[::-1] if header.fortran else header.shape
        found = _places.in_order(spans[header.member][0] + header.length, dtype, shape)
        return found._replace(shape=header.shape, strides=found.strides[::-1]) if header.fortran else found

    found = _members(_zip.opened(source.data), place)
    return {name: place for name, place in found.items() if not isinstance(place, Foreign)}


class _Header(NamedTuple):
    """The header of a .npy file, checked against its member's size; ``length`` is its own in bytes."""

    member: str
    length: int
    dtype: np.dtype
    swapped: bool
    fortran: bool
    shape: tuple[int, ...]


def _members(archive: zipfile.ZipFile, of: Callable[[IO[bytes], _Header], T]) -> dict[str, T | Foreign]:
    """What ``of`` makes of each array, by the array's name; it gets the member at the end of its header."""
    infos = {info.filename: info for info in archive.infolist()}
    other = next((name for name in infos if not name.endswith(".npy")), None)
    if other is not None:
        raise Unreadable(f"it is a zip with {shown(other)} in it, neither npz nor PyTorch", "Is it a file of weights?")
    found: dict[str, T | Foreign] = {}
    try:
        for name, info in infos.items():
            with archive.open(info) as stream:
                header = _header(stream, info)
                found[_limits.check_name(name[:-4])] = header if isinstance(header, Foreign) else of(stream, header)
    except Unreadable:
        raise
    except _zip.DAMAGE as error:
        raise Unreadable(f"a member of it is damaged ({shown(str(error))})", _zip.ADVICE) from None
    return found


def _header(stream: IO[bytes], info: zipfile.ZipInfo) -> _Header | Foreign:
    """Reads the header of an array; before memory is allocated, the size in it is compared with that in the zip."""
    name = info.filename[:-4]
    start = stream.read(8)
    version = start[6:7]
    if start[:6] != b"\x93NUMPY" or version not in (b"\1", b"\2"):
        raise Unreadable(f"leaf {shown(name)} is not a .npy file of version 1 or 2", _zip.ADVICE)
    size = 2 if version == b"\1" else 4
    length = int.from_bytes(stream.read(size), "little")
    match = _HEADER.fullmatch(stream.read(length).decode("latin-1")) if length <= _MAX_HEADER else None
    if match is None:
        return Foreign(f"leaf {shown(name)} is not a plain array of numbers", "Objects and records are never loaded.")
    order, kind, fortran, sizes = match.groups()
    dtype = _KINDS.get(kind)
    if dtype is None:
        return Foreign(f"leaf {shown(name)} is of dtype {shown(kind)}", "Cast it to float32 or float16.")
    length += 8 + size
    shape = [int(n) for n in sizes.replace(" ", "").split(",") if n]
    whole = _limits.check_shape(name, shape, dtype, info.file_size - length)
    return _Header(info.filename, length, dtype, order == ">" and dtype.itemsize > 1, fortran == "True", whole)


def _array(stream: IO[bytes], header: _Header) -> np.ndarray:
    """The array whose numbers follow in the member."""
    dtype, shape = header.dtype, header.shape
    content = _zip.taken(stream, math.prod(shape) * dtype.itemsize, f"leaf {shown(header.member[:-4])}")
    if header.swapped:  # in place, since a copy would double the memory
        content.view(f"u{dtype.itemsize}").byteswap(inplace=True)
    array = content.view(dtype).reshape(shape, order="F" if header.fortran else "C")
    return np.ascontiguousarray(array).reshape(shape)
