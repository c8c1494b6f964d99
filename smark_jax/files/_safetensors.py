"""Reads and writes safetensors: eight bytes of length, a JSON header, then the bytes of all leaves."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _places
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._places import Place, Unwritable
from smark_jax.files._sources import Source

_KINDS = {dtype: kind for kind, dtype in _limits.DTYPES.items()}
_MAX_HEADER = 8 * 2**20  # JSON grows about twenty-fold when parsed
_ADVICE = "The file is damaged or forged: ask for it again."


class Entry(NamedTuple):
    """A leaf in the header, and where its bytes begin and end."""

    name: str
    dtype: np.dtype | Foreign
    start: int
    end: int
    shape: tuple[int, ...]


def matches(data: bytes) -> bool:
    """Whether the content begins like a safetensors file."""
    return len(data) >= 9 and data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 2**32


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The leaves: we check the header entry by entry, and then the library reads the file again."""
    del max_bytes  # the leaves are part of the file, so they are no larger
    data = source.data
    entries = _check(data, len(data))
    first = 8 + int.from_bytes(data[:8], "little")
    dtypes = {name: dtype for name, dtype, *_ in entries if not isinstance(dtype, Foreign)}
    if len(dtypes) < len(entries):  # the library may not know them
        return {
            name: dtype
            if isinstance(dtype, Foreign)
            else np.frombuffer(data[first + a : first + b], dtype).reshape(shape)
            for name, dtype, a, b, shape in entries
        }
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:  # our checks are stricter; the library's remain as a second opinion
        raise Unreadable(f"safetensors refuses it: {shown(str(error))}", _ADVICE) from None
    return {name: np.frombuffer(leaf["data"], dtypes[name]).reshape(leaf["shape"]) for name, leaf in found}


def places(source: Source) -> dict[str, Place | Unwritable]:
    """Where the leaves lie."""
    first = 8 + int.from_bytes(source.data[:8], "little")
    entries = _check(source.data, len(source.data))
    return {
        entry.name: _places.in_order(first + entry.start, entry.dtype, entry.shape)
        for entry in entries
        if not isinstance(entry.dtype, Foreign)
    }


def laid_out(leaves: Mapping[str, np.ndarray]) -> tuple[bytes, list[str]]:
    """The bytes before the leaves of a new file, and the leaves' names in the order of their bytes.

    Those bytes are the length of the JSON header, and the header, padded with spaces to a multiple of eight bytes.
    """
    # Widest first, so that every leaf begins at a multiple of its width.
    names = sorted(leaves, key=lambda name: (-leaves[name].dtype.itemsize, name))
    entries, end = {}, 0
    for name in names:
        leaf = leaves[name]
        start, end = end, end + leaf.nbytes
        kind = _KINDS[leaf.dtype.newbyteorder("=")]
        entries[name] = {"dtype": kind, "shape": list(leaf.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, names


def _check(data: bytes, size: int) -> list[Entry]:
    """Parses the header at the start of ``data``, and checks that its entries fill a file of ``size`` bytes."""
    length = int.from_bytes(data[:8], "little")
    if length > min(size - 8, _MAX_HEADER):
        cut = length > size - 8
        why = f"of a file of {size:,}" if cut else f"where {_MAX_HEADER:,} are allowed"
        raise Unreadable(f"its header claims {length:,} bytes {why}", _ADVICE)
    header = _limits.json_object(data[8 : 8 + length], "its header", _ADVICE)
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        raise Unreadable("its metadata is more than text", _ADVICE)
    _limits.check_number(len(header))
    entries = sorted((_entry(name, entry) for name, entry in header.items()), key=lambda entry: entry[2:4])
    end = 0
    for name, _, start, stop, _ in entries:
        if start != end:
            raise Unreadable(f"leaf {shown(name)} begins at byte {start:,}, where byte {end:,} is next", _ADVICE)
        end = stop
    if end != size - 8 - length:
        raise Unreadable(f"its leaves end at byte {end:,} of {size - 8 - length:,}", _ADVICE)
    return entries


def _entry(name: str, entry: Any) -> Entry:
    _limits.check_name(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise Unreadable(f"leaf {shown(name)} is described by {shown(entry)}", _ADVICE)
    kind, offsets = entry["dtype"], entry["data_offsets"]
    dtype = _limits.DTYPES.get(kind) if isinstance(kind, str) else None
    good = isinstance(offsets, list) and len(offsets) == 2 and all(type(byte) is int for byte in offsets)
    if not good or not 0 <= offsets[0] <= offsets[1] < 2**48:
        raise Unreadable(f"leaf {shown(name)} lies at bytes {shown(offsets)}", _ADVICE)
    if dtype is None:
        what = Foreign(f"leaf {shown(name)} is of dtype {shown(kind)}", "Cast it to F32, F16 or BF16.")
        return Entry(name, what, offsets[0], offsets[1], ())
    shape = _limits.check_shape(name, entry["shape"], dtype, offsets[1] - offsets[0])
    return Entry(name, dtype, offsets[0], offsets[1], shape)
