"""The bytes of a file of weights, and of the files beside it that it names."""

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from smark_jax.errors import Unreadable
from smark_jax.files import _limits
from smark_jax.files._limits import shown

# Endings of the main file's name in a folder, in the order in which one is looked for.
_MAIN = (
    ".safetensors.index.json", ".safetensors", ".bin.index.json", ".onnx", ".bin", ".pt2", ".pth", ".pt", ".ckpt",
    ".pkl", ".keras", ".h5", ".hdf5", ".tflite", ".msgpack", ".npz",
)  # fmt: skip
_USUAL = ("model", "pytorch_model")
_NO_MAIN = "Orbax checkpoints are not read from others: restore your own with Orbax, and save it as safetensors."
_ADVICE = "Put all files of the model into one folder, under the names that they had."


class Source:
    """What a reader is given: the content of a file, and on request that of the files beside it.

    Attributes:
      data: the content of the file.
      path: of the file, if it has one.
    """

    def __init__(self, data: bytes, path: Path | None = None, max_bytes: int = _limits.MAX_BYTES) -> None:
        self.data, self.path, self._left = data, path, max_bytes - len(data)
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
        """The SHA-256 of the file, in hex; for several files that of :func:`joint_sha256`."""
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in self._beside.items()}
        return joint_sha256(hashlib.sha256(self.data).hexdigest(), digests)

    def _resolved(self, name: str) -> Path:
        bare = name not in ("", ".", "..") and not any(mark in name for mark in "/\\:\0") and name.isprintable()
        if not bare or len(name.encode(errors="replace")) > 255:
            raise Unreadable(f"it names the file {shown(name)}, which is not beside it", _ADVICE)
        if self.path is None:
            raise Unreadable(f"it names the file {shown(name)}, and stands alone", _ADVICE)
        path, main = self.path.parent / name, Path(os.path.realpath(self.path))
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
    """A file, or the main file of a folder, with all its bytes, read once, so that the hash covers what is parsed.

    Raises:
      Unreadable: when there is no such file, it is empty, or larger than ``max_bytes``, or a folder holds none or
        several that may be meant.
    """
    if os.path.isdir(path):
        found = main_files(Path(path))
        if len(found) != 1:
            several = f"it is a folder with several files of weights ({', '.join(map(shown, sorted(found)[:3]))})"
            raise Unreadable(*((several, "Name one of them.") if found else ("it is a folder", _NO_MAIN)))
        path = Path(path, found[0])
    return Source(_content(path, max_bytes, "it"), Path(path), max_bytes)


def main_files(folder: Path) -> list[str]:
    """The names of the main files that a folder may have, usually one; of a sharded model it is the index."""
    try:
        names = [name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError as error:
        raise Unreadable(f"it cannot be opened ({error.strerror})", "Check its permissions.") from None
    for ending in _MAIN:
        if found := [name for name in names if name.endswith(ending)]:
            usual = [name for name in found if name.removesuffix(ending) in _USUAL]
            return usual or found
    return []


def _content(path: str | os.PathLike[str], max_bytes: int, what: str) -> bytes:
    """All bytes of a regular file; ``what`` is what a refusal calls it."""
    try:
        mode = os.stat(path).st_mode
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
