"""Reading a file of weights that may be hostile, its format told by its content."""

import hashlib
import os
import stat
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smark_jax import _validate
from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _msgpack, _npz, _safetensors, _torch
from smark_jax.files._limits import shown

# What a file that is not read begins with, what it is, and what to do.
_OTHERS = (
    (b"\x89HDF", "an HDF5 file", "Load it in Keras and save the weights with safetensors.numpy.save_file."),
    (b"\x93NUMPY", "a single .npy array", "Save all leaves together, by name, with numpy.savez or safetensors."),
    (b"\x1f\x8b", "compressed with gzip", "Unpack it first (gunzip)."),
    (b"GGUF", "a GGUF file", "Convert it to safetensors."),
    (b"version https://git-lfs", "a pointer to a file in Git LFS", "Fetch the file itself (git lfs pull)."),
    (b"<", "text", "Was a web page saved in place of the file?"),
)
_FOLDER = "Orbax checkpoints are not read from others: restore your own with Orbax, and save it as safetensors."
_PICKLE = "Pickle can run code and is never loaded: save the state dict with safetensors.torch.save_file."


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
      leaves: by name, the steps of a leaf's path joined by ``/`` (PyTorch's names are as PyTorch has them).
      format: ``"safetensors"``, ``"msgpack"``, ``"npz"`` or ``"torch"``.
      sha256: of the file, in hex.
      foreign: names of leaves that are no arrays of real numbers (complex numbers, text) and were left out.
    """

    leaves: dict[str, np.ndarray]
    format: str
    sha256: str
    foreign: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], *, max_bytes: int = _limits.MAX_BYTES, strict: bool = True) -> Weights:
    """The weights in a file of any supported format; safe on hostile files.

    Args:
      path: of the file. Its name says nothing: the format is told by the content.
      max_bytes: largest file, and largest sum of its leaves, that is read. Twice as much memory may be used.
      strict: whether to refuse a file with a leaf that is no array of real numbers. A suspect is read without it: one
        such leaf must not hide the others.

    Returns:
      The leaves with the dtypes and the names of the file, its format and its hash.

    Raises:
      Unreadable: when there is no file, or none that can be read safely.
      SmarkError: when ``max_bytes`` is no count.
    """
    _validate.positive("read", "max_bytes", max_bytes)
    try:
        data = _content(path, max_bytes)
        kind, found = _leaves(data, max_bytes)
        leaves = {name: leaf for name, leaf in sorted(found.items()) if not isinstance(leaf, _limits.Foreign)}
        foreign = {name: leaf for name, leaf in sorted(found.items()) if isinstance(leaf, _limits.Foreign)}
        if foreign and (strict or not leaves):
            raise Unreadable(*next(iter(foreign.values())))
    except Unreadable as error:
        where = f"cannot read {shown(os.fspath(path))}: "
        raise Unreadable(f"{where}{error}", desk=f"{where}{error.desk}") from None
    return Weights(leaves, kind, hashlib.sha256(data).hexdigest(), tuple(foreign))


def _content(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """All bytes of a regular file, read once, so that what is hashed is what is read."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise Unreadable("it is a folder", _FOLDER)
        if not stat.S_ISREG(mode):
            raise Unreadable("it is no regular file", "Name the file of weights itself.")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except Unreadable:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else "no such name"
        raise Unreadable(f"it cannot be opened ({reason})", "Check the path and its permissions.") from None
    with os.fdopen(handle, "rb") as file:
        size = os.fstat(handle).st_size
        data = file.read(size + 1) if size <= max_bytes else None  # room is made for as much as is asked for
    if data is None or len(data) > size:
        raise _limits.too_large(f"it is larger than {max_bytes:,} bytes")
    if not data:
        raise Unreadable("it is empty", "Was it copied to the end?")
    return data


def _leaves(data: bytes, max_bytes: int) -> tuple[str, Mapping[str, np.ndarray | _limits.Foreign]]:
    """The format of a file's content, and its leaves."""
    if _npz.looks_like(data):
        archive, infos = _npz.members(data, max_bytes)
        if any(name.endswith("data.pkl") for name in infos):
            return "torch", _torch.read(data, max_bytes)
        return "npz", _npz.read(archive, infos)
    if _safetensors.looks_like(data):
        return "safetensors", _safetensors.read(data)
    if data[0] == 0x80 and data[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise Unreadable("it is a pickle", _PICKLE)
    for start, what, advice in _OTHERS:
        if data.startswith(start):
            raise Unreadable(f"it is {what}", advice)
    if _msgpack.looks_like(data):
        return "msgpack", _msgpack.read(data)
    raise Unreadable("it is neither safetensors, Flax msgpack, npz nor PyTorch", "Convert it to safetensors.")
