"""Writes files of weights atomically: a file under its final name is always complete."""

import functools
import hashlib
import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smark_jax import _io, _roles, _validate
from smark_jax.files import _limits, _places, _safetensors, _sources, _zip, formats, reading, trees
from smark_jax.files._places import Place

_NOTES = (".json", ".txt", ".md")
_MAX_NOTE = 2**20


def write(path: str | os.PathLike[str], params: Any, *, like: str | os.PathLike[str] | None = None) -> str:
    """Writes a model, as safetensors or in the form of another file, and returns the SHA-256 of the file, in hex.

    The file appears complete or not at all: it is written in the same folder under a name that begins with a dot and
    ends in ``.part``, flushed to disk, and renamed. An existing file is replaced. The leaves are written one after
    another, without a second copy of the model, and keep their dtypes. The same leaves give the same bytes.

    Args:
      path: the file to write; its folder must exist.
      params: a parameter tree, or a dict of leaves by name.
      like: a file of a model with the same names, dtypes and shapes, such as the base of a copy, in any format that can
        be written in place. The new file is that file byte for byte, but for the numbers of the leaves. Leaves that do
        not carry by their names, such as running statistics, may be left out of ``params``, and stay.

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
    """The form of a model's file: makes other files that differ from it in the numbers of leaves alone.

    A model in several files, or in a folder, makes folders. The files are mapped, not held in memory; nobody may change
    them meanwhile.

    Args:
      path: the file or folder, which only its owner can write to.

    Attributes:
      format: the format's name.
      suffix: what the names of its files end with; empty where it makes folders.
      places: where each leaf lies, or why it cannot be written.
      sha256: of the file, as :func:`smark_jax.files.read` states it.

    Raises:
      Unreadable: when it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        with reading.naming(path):
            source = _sources.opened(path, _limits.ANY_SIZE)
            format = formats.of(source.data)
            self.format, self.places, self.sha256 = format.name, format.places(source), source.sha256()
            assert source.path is not None
            main, beside = source.path.name, sorted(source.contents)
            contents = {"": source.data, **source.contents}
            self._checksums = {
                name: _zip.checksums(data) if _zip.matches(data) else [] for name, data in contents.items()
            }
            self._notes = _notes(self._path, {main, *beside}) if self._path.is_dir() else []
        suffix = next((suffix for suffix in format.suffixes if main.endswith(suffix)), "")
        folder = bool(beside) or self._path.is_dir()
        self.suffix = "" if folder else suffix or format.suffixes[0]
        names = {"": main, **{name: name for name in [*beside, *self._notes]}}
        self._data = {key: _mapped(source.path.parent / name) for key, name in names.items()}
        # By its ending the main file is found in a folder.
        self._names = {**names, "": main if suffix else main + format.suffixes[0]}

    @functools.cached_property
    def leaves(self) -> Mapping[str, np.ndarray]:
        """The leaves of the model itself."""
        return reading.read(self._path, max_bytes=_limits.ANY_SIZE).leaves

    @property
    def other_bytes(self) -> int:
        """How many bytes of its files hold no leaf's numbers: its copies have them too. 0 where a leaf has no place."""
        places = {name: place for name, place in self.places.items() if isinstance(place, Place)}
        if len(places) < len(self.places):
            return 0
        sizes = {file: len(data) for file, data in self._data.items() if file not in self._notes}
        of = {file: {name: place for name, place in places.items() if place.file == file} for file in sizes}
        return sum(size - _places.covered(of[file]) for file, size in sizes.items())

    @property
    def num_bytes(self) -> int:
        """Of all its files together."""
        return sum(map(len, self._data.values()))

    def write(self, path: str | os.PathLike[str], leaves: Mapping[str, np.ndarray] | None = None) -> str:
        """Writes a file or folder atomically, as :func:`write` does, and returns its SHA-256 in hex.

        Args:
          path: what to write.
          leaves: all leaves by name; by default the model's own.

        Raises:
          SmarkError: when ``leaves`` are not the model's, or differ where they cannot be written.
          OSError: as for :func:`write`, and when there is a folder of this name that holds anything.
        """
        with _io.renamed(Path(path)) as part:
            return self.make(part, leaves)

    def make(self, path: Path, leaves: Mapping[str, np.ndarray] | None = None) -> str:
        """Writes what :meth:`write` does under a new name, which the caller changes; it is flushed to the disk.

        Use this to make many files and name them together.
        """
        if leaves is not None:
            self._check(leaves)
        if self.suffix:
            return self._dump(path, "", leaves or {})
        with _io.new_folder(path):
            digests = {key: self._dump(path / name, key, leaves or {}) for key, name in self._names.items()}
        return self._joint(digests)

    def sha256_of(self, path: Path) -> str | None:
        """The SHA-256, in hex, of a file or folder that was made in this form; None where a file of it is missing."""
        if not self.suffix and path.is_dir():
            names = {key: path / name for key, name in self._names.items()}
        else:
            names = {"": path}
        if not all(name.is_file() for name in names.values()):
            return None
        digests = {}
        for key, name in names.items():
            with name.open("rb") as file:
                digests[key] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._joint(digests)

    def _joint(self, digests: Mapping[str, str]) -> str:
        beside = {name: digest for name, digest in digests.items() if name and name not in self._notes}
        return _sources.joint_sha256(digests[""], beside)

    def _dump(self, path: Path, key: str, leaves: Mapping[str, np.ndarray]) -> str:
        """Writes one of the files, and returns its SHA-256 in hex."""
        placed = {
            name: place
            for name, place in self.places.items()
            if isinstance(place, Place) and place.file == key and name in leaves
        }
        data = self._data[key]
        pieces = _places.mended(data, _places.pieces(data, leaves, placed), self._checksums.get(key, ()))
        with _io.new_file(path) as file:
            return _written(file, _places.spliced(data, pieces))

    def _check(self, leaves: Mapping[str, np.ndarray]) -> None:
        """Refuses leaves that are not the model's, or that differ where they cannot be written."""
        fixed = {name for name, place in self.places.items() if not isinstance(place, Place)}
        like = {name: place if isinstance(place, Place) else self.leaves[name] for name, place in self.places.items()}
        theirs, ours = ({name: _kind(leaf) for name, leaf in some.items()} for some in (like, leaves))
        theirs = {name: kind for name, kind in theirs.items() if name in ours or not _may_be_left_out(name)}
        if ours != theirs:
            name = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
            got = f"{ours.get(name, 'none')} for {_limits.shown(name)}, where it has {theirs.get(name, 'none')}"
            raise _validate.fail("write", f"leaves as in {self._path}", got, "Is it the file of the model's base?")
        for name in sorted(fixed & leaves.keys()):
            if trees.raw(leaves[name]) != trees.raw(self.leaves[name]):
                got = f"other numbers in leaf {_limits.shown(name)}, which is {self.places[name]} there"
                cause = "Take the model that it was made from, or leave like out and write safetensors."
                raise _validate.fail("write", f"numbers that {self._path} has room for", got, cause)


def _may_be_left_out(name: str) -> bool:
    """Whether a leaf says by its name that it does not carry; :func:`files.network` gives only those that it takes."""
    role = _roles.of_name(name)
    return name.startswith("buffers/") or (role is not None and not role.carries)


def _kind(leaf: Place | np.ndarray) -> str:
    return f"{leaf.dtype.name} {list(leaf.shape)}"


def _notes(folder: Path, weights: set[str]) -> list[str]:
    """The names of texts in a model's folder, such as its configuration, which belong to its copies.

    No other file does: a second file of weights would hand out the base.
    """
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in weights
        and path.suffix in _NOTES
        and path.is_file()
        and not path.name.startswith(".")
        and 0 < path.stat().st_size <= _MAX_NOTE
    )


def _mapped(path: Path) -> memoryview:
    """The bytes of a file, read from the disk when they are looked at."""
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _written(file: BinaryIO, parts: Iterable[memoryview]) -> str:
    """Writes the parts of a file, and returns their SHA-256 in hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        file.write(part)
    return digest.hexdigest()
