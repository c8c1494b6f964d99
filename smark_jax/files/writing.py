"""Writes files of weights atomically: a file under its final name is always complete."""

import functools
import hashlib
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smark_jax import _io, _validate
from smark_jax.files import _limits, _places, _safetensors, _sources, _zip, formats, reading, trees
from smark_jax.files._places import Place


def write(path: str | os.PathLike[str], params: Any, *, like: str | os.PathLike[str] | None = None) -> str:
    """Writes a model, as safetensors or in the form of another file, and returns the SHA-256 of the file, in hex.

    The file appears complete or not at all: it is written in the same folder under a name that begins with a dot and
    ends in ``.part``, flushed to disk, and renamed. An existing file is replaced. The leaves are written one after
    another, without a second copy of the model, and keep their dtypes. The same leaves give the same bytes.

    Args:
      path: the file to write; its folder must exist.
      params: a parameter tree, or a dict of leaves by name.
      like: a file of a model with the same names, dtypes and shapes, such as the base of a copy, in any format that can
        be written in place. The new file is that file byte for byte, but for the numbers of the leaves.

    Raises:
      SmarkError: when there are no leaves, when they do not match those in ``like``, when one of them differs that
        cannot be written in place, or as for :func:`flatten`.
      Unreadable: when ``like`` cannot be read.
      OSError: when the disk is full, or the folder is missing or not writable; nothing is left behind then.

    Examples:
      >>> import tempfile, numpy as np
      >>> from smark_jax import files
      >>> path = tempfile.mkdtemp() + "/copy.safetensors"
      >>> digest = files.write(path, {"dense": {"kernel": np.ones((2, 3), np.float32)}})
      >>> files.read(path).sha256 == digest
      True
    """
    leaves = trees.flatten(params)
    if not leaves:
        raise _validate.fail("write", "at least one leaf", "none", "Is the model empty?")
    if like is not None:
        return Form(like).write(path, leaves)
    header, names = _safetensors.laid_out(leaves)
    with _io.whole_file(Path(path)) as file:
        return _written(file, [memoryview(header), *(trees.raw(leaves[name]) for name in names)])


class Form:
    """The form of a file: what makes other files that differ from it in the numbers of leaves alone.

    It holds the file mapped, not read; nobody may change it meanwhile.

    Args:
      path: the file, which only its owner can write to.

    Raises:
      Unreadable: when it cannot be read.
      SmarkError: when its format cannot be written in place.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        with reading.naming(path):
            source = _sources.opened(path, _limits.ANY_SIZE)
            format = formats.of(source.data)
            if format.places is None:
                cause = "Leave like out, and write safetensors."
                raise _validate.fail("write", f"{self.path} to be written in place", f"a file of {format.name}", cause)
            self.places = format.places(source)
            self._checksums = _zip.checksums(source.data) if _zip.matches(source.data) else []
        with self.path.open("rb") as file:
            self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    @functools.cached_property
    def leaves(self) -> Mapping[str, np.ndarray]:
        """The leaves of the file itself."""
        return reading.read(self.path, max_bytes=_limits.ANY_SIZE).leaves

    def write(self, path: str | os.PathLike[str], leaves: Mapping[str, np.ndarray]) -> str:
        """Writes a file atomically, as :func:`write` does, and returns its SHA-256 in hex."""
        with _io.whole_file(Path(path)) as file:
            return self.dump(file, leaves)

    def dump(self, file: BinaryIO, leaves: Mapping[str, np.ndarray]) -> str:
        """Writes the bytes of :meth:`write` into an open file, and returns their SHA-256 in hex."""
        self._check(leaves)
        placed = {name: place for name, place in self.places.items() if isinstance(place, Place)}
        pieces = _places.pieces(self._data, leaves, placed)
        pieces = _places.mended(self._data, pieces, self._checksums)
        return _written(file, _places.spliced(self._data, pieces))

    def _check(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Refuses leaves that are not the file's, or that differ where they cannot be written."""
        fixed = {name for name, place in self.places.items() if not isinstance(place, Place)}
        theirs = {
            name: (place.dtype.newbyteorder("="), place.shape)
            for name, place in self.places.items()
            if isinstance(place, Place)
        } | {name: (self.leaves[name].dtype, self.leaves[name].shape) for name in fixed}
        ours = {name: (leaf.dtype.newbyteorder("="), leaf.shape) for name, leaf in leaves.items()}
        if ours != theirs:
            name = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            got = f"{ours.get(name, 'none')} for {name!r}, where it has {theirs.get(name, 'none')}"
            raise _validate.fail("write", f"leaves as in {self.path}", got, "Is it the file of the model's base?")
        for name in sorted(fixed):
            if trees.raw(leaves[name]) != trees.raw(self.leaves[name]):
                got = f"other numbers in leaf {_limits.shown(name)}, which is {self.places[name]} there"
                cause = "Take the model that it was made from, or save it uncompressed."
                raise _validate.fail("write", f"leaves that can be written as in {self.path}", got, cause)


def _written(file: BinaryIO, parts: Iterable[memoryview]) -> str:
    """Writes the parts of a file, and returns their SHA-256 in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        file.write(part)
    return digest.hexdigest()
