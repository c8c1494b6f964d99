"""The bytes of a file of weights, and of the files beside it that it names."""

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from smark_jax.errors import Unreadable
from smark_jax.files import _limits
from smark_jax.files._limits import shown

_FOLDER = "Orbax checkpoints are not read from others: restore your own with Orbax, and save it as safetensors."
_ADVICE = "Put all files of the model into one folder, under the names that they had."


class Source:
    """What a reader is given: the content of a file, and on request that of the files beside it.

    Attributes:
      data: the content of the file.
      name: its name, empty if it has none.
    """

    def __init__(self, data: bytes, path: Path | None = None, max_bytes: int = _limits.MAX_BYTES) -> None:
        self.data, self.name = data, path.name if path else ""
        self._path, self._left = path, max_bytes - len(data)
        self._beside: dict[str, bytes] = {}

    def beside(self, name: str) -> bytes:
        """The content of a file in the same folder; all files together are no larger than the limit.

        Args:
          name: the bare name of a regular file. It may be a link only to where the main file lies, as in the cache of
            Hugging Face, whose folders are links to files of another folder.

        Raises:
          Unreadable: when there is no such file, or the limit is exceeded.
        """
        if name not in self._beside:
            content = _content(self._resolved(name), self._left, f"its file {shown(name)}")
            self._left -= len(content)
            self._beside[name] = content
        return self._beside[name]

    @property
    def contents(self) -> Mapping[str, bytes]:
        """The files beside it that have been read, by name."""
        return self._beside

    def sha256(self) -> str:
        """The SHA-256 of the file, in hex; see :func:`sha256` for several."""
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in self._beside.items()}
        return joint_sha256(hashlib.sha256(self.data).hexdigest(), digests)

    def _resolved(self, name: str) -> Path:
        bare = name not in ("", ".", "..") and not any(mark in name for mark in "/\\:\0") and name.isprintable()
        if not bare or len(name.encode(errors="replace")) > 255:
            raise Unreadable(f"it names the file {shown(name)}, which is not beside it", _ADVICE)
        if self._path is None:
            raise Unreadable(f"it names the file {shown(name)}, and stands alone", _ADVICE)
        path, main = self._path.parent / name, Path(os.path.realpath(self._path))
        found = Path(os.path.realpath(path))
        if found.parent not in (main.parent, Path(os.path.realpath(path.parent))):
            raise Unreadable(f"its file {shown(name)} is a link to another folder", _ADVICE)
        return found


def joint_sha256(main: str, beside: Mapping[str, str]) -> str:
    """The hash that stands for a model in several files; for a single file it is the file's own.

    It is the SHA-256 of a text of lines: the hash of the main file, then for each file beside it in the order of their
    names its hash, two spaces and its name.

    Args:
      main: the SHA-256 of the main file, in hex.
      beside: those of the files beside it, by name.
    """
    if not beside:
        return main
    lines = [main, *(f"{beside[name]}  {name}" for name in sorted(beside))]
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def opened(path: str | os.PathLike[str], max_bytes: int) -> Source:
    """A file with all its bytes, read once, so that the hash covers exactly what is parsed.

    Raises:
      Unreadable: when there is no such file, it is empty, or larger than ``max_bytes``.
    """
    return Source(_content(path, max_bytes, "it"), Path(path), max_bytes)


def _content(path: str | os.PathLike[str], max_bytes: int, what: str) -> bytes:
    """All bytes of a regular file; ``what`` is what a refusal calls it."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise Unreadable(f"{what} is a folder", _FOLDER)
        if not stat.S_ISREG(mode):
            raise Unreadable(f"{what} is not a regular file", "Name the file of weights itself.")
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except Unreadable:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else "no such name"
        raise Unreadable(f"{what} cannot be opened ({reason})", "Check the path and its permissions.") from None
    with os.fdopen(handle, "rb") as file:
        size = os.fstat(handle).st_size
        data = file.read(size + 1) if size <= max_bytes else None  # Python allocates as much as is requested
    if data is None or len(data) > size:
        raise _limits.too_large(f"{what} is larger than {max_bytes:,} bytes")
    if not data:
        raise Unreadable(f"{what} is empty", "Was it copied to the end?")
    return data
