"""Reading a file of weights that may be hostile, its format detected from its content."""

import hashlib
import os
import stat
from typing import NamedTuple

import numpy as np

from smark_jax import _validate
from smark_jax.errors import Unreadable
from smark_jax.files import _limits, formats
from smark_jax.files._limits import shown

_FOLDER = "Orbax checkpoints are not read from others: restore your own with Orbax, and save it as safetensors."


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
      leaves: by name, the steps of a leaf's path joined by ``/`` (PyTorch's names are as PyTorch has them).
      format: its name in :data:`smark_jax.files.formats.FORMATS`, such as ``"safetensors"``.
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
      path: of the file. Its name says nothing: the format is detected from the content.
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
        format = formats.of(data)
        found = format.read(data, max_bytes)
        leaves = {name: leaf for name, leaf in sorted(found.items()) if not isinstance(leaf, _limits.Foreign)}
        foreign = {name: leaf for name, leaf in sorted(found.items()) if isinstance(leaf, _limits.Foreign)}
        if foreign and (strict or not leaves):
            raise Unreadable(*next(iter(foreign.values())))
    except Unreadable as error:
        where = f"cannot read {shown(os.fspath(path))}: "
        raise Unreadable(f"{where}{error}", desk=f"{where}{error.desk}") from None
    return Weights(leaves, format.name, hashlib.sha256(data).hexdigest(), tuple(foreign))


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
