"""Writing safetensors so that a file under its name is whole, whatever happens."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smark_jax import _io, _validate
from smark_jax.files import formats, trees


def write(path: str | os.PathLike[str], params: Any, *, like: str | os.PathLike[str] | None = None) -> str:
    """Writes a model as safetensors and returns the SHA-256 of the file, in hex.

    The file appears whole or not at all: it is written beside its place under a name that begins with a dot and ends
    in ``.part``, flushed to the disk, and renamed. One that is there already is replaced. The leaves are written one
    after the other, without a second copy of the model, and keep their dtypes. The same leaves give the same bytes.

    Args:
      path: where; its folder exists.
      params: a parameter tree, or a dict of leaves by name.
      like: a safetensors file of a model with the same names, dtypes and shapes, such as the base of a copy. Its
        metadata and the order of its leaves are taken over: only values differ.

    Raises:
      SmarkError: when there are no leaves, or others than in ``like``, or as :func:`flatten`.
      OSError: when the disk is full, or the folder missing or not writable; nothing is left behind then.

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

    For who writes many files and names them together: flushing to the disk and a name are the caller's.

    Args:
      file: open for writing in binary.
      params: a parameter tree, or a dict of leaves by name.
      like: as for :func:`write`.

    Raises:
      SmarkError: as :func:`write`.

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
