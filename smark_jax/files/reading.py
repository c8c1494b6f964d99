"""Reads possibly hostile weights, in a file or in several; the format is detected from the content."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from smark_jax import _validate
from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _sources, formats
from smark_jax.files._limits import shown


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
      leaves: arrays by name; a name is the leaf's path with its steps joined by ``/`` (PyTorch's names stay unchanged).
      format: the format's name in :data:`smark_jax.files.formats.FORMATS`, such as ``"safetensors"``.
      sha256: of the file, in hex. For a model in several files it is that of a text: the hash of the main file, such as
        the index of shards, in a line, then a line for each other file, as ``sha256sum`` prints it, in the order of
        their names.
      foreign: names of leaves that were left out because they are not real arrays (complex numbers, text).
    """

    leaves: dict[str, np.ndarray]
    format: str
    sha256: str
    foreign: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], *, max_bytes: int = _limits.MAX_BYTES, strict: bool = True) -> Weights:
    """Reads the weights in a file of any supported format, or in several; safe on hostile files.

    Args:
      path: of the file, or of a folder with one model, such as Hugging Face's. The format is detected from the content,
        not from the name. The file may name others beside it, such as the shards of an index.
      max_bytes: limit on the size of all files together, and on that of all leaves. Memory use can be twice this.
      strict: whether to refuse a file with a leaf that is not an array of real numbers. Suspects are read with
        ``strict=False``, so that one such leaf cannot hide the others.

    Returns:
      The leaves with the dtypes and the names of the file, its format and its hash.

    Raises:
      Unreadable: when there is no file, or none that can be read safely.
      SmarkError: when ``max_bytes`` is not a positive whole number.
    """
    _validate.positive("read", "max_bytes", max_bytes)
    with naming(path):
        source = _sources.opened(path, max_bytes)
        format = formats.of(source.data)
        found = format.read(source, max_bytes)
        leaves = {name: leaf for name, leaf in sorted(found.items()) if not isinstance(leaf, _limits.Foreign)}
        foreign = {name: leaf for name, leaf in sorted(found.items()) if isinstance(leaf, _limits.Foreign)}
        if foreign and (strict or not leaves):
            raise Unreadable(*next(iter(foreign.values())))
    return Weights(leaves, format.name, source.sha256(), tuple(foreign))


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Refusals name the file."""
    try:
        yield
    except Unreadable as error:
        where = f"cannot read {shown(os.fspath(path))}: "
        raise Unreadable(f"{where}{error}", desk=f"{where}{error.desk}") from None
