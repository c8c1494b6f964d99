"""Writes safetensors files atomically: a file under its final name is always complete."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smark_jax import _io, _validate
from smark_jax.files import formats, trees


def write(path: str | os.PathLike[str], params: Any, *, like: str | os.PathLike[str] | None = None) -> str:
    """Writes a model as safetensors and returns the SHA-256 of the file, in hex.

    The file appears complete or not at all: it is written in the same folder under a name that begins with a dot and
    ends in ``.part``, flushed to disk, and renamed. An existing file is replaced. The leaves are written one after
    another, without a second copy of the model, and keep their dtypes. The same leaves give the same bytes.

    Args:
      path: the file to write; its folder must exist.
      params: a parameter tree, or a dict of leaves by name.
      like: a safetensors file of a model with the same names, dtypes and shapes, such as the base of a copy. The new
        file gets its metadata and leaf order, so that only values differ.

    Raises:
      SmarkError: when there are no leaves, when they do not match those in ``like``, or as for :func:`flatten`.
      OSError: when the disk is full, or the folder is missing or not writable; nothing is left behind then.

    Examples:
      >>> import tempfile, numpy as np
      >>> from smark_jax import files
      >>> path = tempfile.mkdtemp() + "/copy.safetensors"
      >>> digest = files.write(path, {"dense": {"kernel": np.ones((2, 3), np.float32)}})
      >>> files.read(path).sha256 == digest
      True
    """
    leaves = _named("write", params)
    with _io.whole_file(Path(path)) as file:
        return formats.writer("safetensors")(file, leaves, None if like is None else Path(like))


def dump(file: BinaryIO, params: Any, *, like: str | os.PathLike[str] | None = None) -> str:
    """Writes the bytes of :func:`write` into an open file, and returns their SHA-256 in hex.

    Use this to write many files and name them together; the caller must flush the file to disk and name it.

    Args:
      file: open for writing in binary.
      params: a parameter tree, or a dict of leaves by name.
      like: as for :func:`write`.

    Raises:
      SmarkError: as for :func:`write`.

    Examples:
      >>> import hashlib, io, numpy as np
      >>> from smark_jax import files
      >>> file = io.BytesIO()
      >>> digest = files.dump(file, {"dense": {"kernel": np.ones((2, 3), np.float32)}})
      >>> hashlib.sha256(file.getvalue()).hexdigest() == digest
      True
    """
    return formats.writer("safetensors")(file, _named("dump", params), None if like is None else Path(like))


def _named(who: str, params: Any) -> dict[str, np.ndarray]:
    leaves = trees.flatten(params)
    if not leaves:
        raise _validate.fail(who, "at least one leaf", "none", "Is the model empty?")
    return leaves
