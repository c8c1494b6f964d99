"""Reads npz, a zip of .npy files: sizes are checked before unpacking, and headers are matched, never evaluated."""

import re
import zipfile

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _zip
from smark_jax.files._limits import Foreign, shown

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


def read(data: bytes, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The arrays by name."""
    archive = _zip.bounded(data, max_bytes)
    infos = {info.filename: info for info in archive.infolist()}
    other = next((name for name in infos if not name.endswith(".npy")), None)
    if other is not None:
        raise Unreadable(f"it is a zip with {shown(other)} in it, neither npz nor PyTorch", "Is it a file of weights?")
    try:
        leaves = {_limits.check_name(name[:-4]): _member(archive, info) for name, info in infos.items()}
    except Unreadable:
        raise
    except _zip.DAMAGE as error:
        raise Unreadable(f"a member of it is damaged ({shown(str(error))})", _zip.ADVICE) from None
    return leaves


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray | Foreign:
    """Reads one array; before memory is allocated, the size in its header is compared with the size in the zip."""
    name = info.filename[:-4]
    with archive.open(info) as stream:
        start = stream.read(8)
        version = start[6:7]
        if start[:6] != b"\x93NUMPY" or version not in (b"\1", b"\2"):
            raise Unreadable(f"leaf {shown(name)} is not a .npy file of version 1 or 2", _zip.ADVICE)
        size = 2 if version == b"\1" else 4
        length = int.from_bytes(stream.read(size), "little")
        match = _HEADER.fullmatch(stream.read(length).decode("latin-1")) if length <= _MAX_HEADER else None
        if match is None:
            return Foreign(
                f"leaf {shown(name)} is not a plain array of numbers", "Objects and records are never loaded."
            )
        order, kind, fortran, sizes = match.groups()
        dtype = _KINDS.get(kind)
        if dtype is None:
            return Foreign(f"leaf {shown(name)} is of dtype {shown(kind)}", "Cast it to float32 or float16.")
        shape = [int(n) for n in sizes.replace(" ", "").split(",") if n]
        whole = _limits.check_shape(name, shape, dtype, info.file_size - 8 - size - length)
        content = _zip.taken(stream, info.file_size - 8 - size - length, f"leaf {shown(name)}")
    if order == ">" and dtype.itemsize > 1:  # in place, since a copy would double the memory
        content.view(f"u{dtype.itemsize}").byteswap(inplace=True)
    array = content.view(dtype).reshape(whole, order="F" if fortran == "True" else "C")
    return np.ascontiguousarray(array).reshape(whole)
