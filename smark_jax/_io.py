"""Files: written whole or not at all, readable for their owner only where they must be, one process at a time."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that was not there before, flushed to the disk at the end of the block; none when that fails."""
    with path.open("xb") as file, _gone_on_error(path):
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name, and replaces what had it, at the end of the block; nothing changes when that fails.

    Until then it stands beside its place under a name that begins with a dot and ends in ``.part``.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with new_file(part) as file:
        yield file
    with _gone_on_error(part):
        part.replace(path)
    flush_folder(path.absolute().parent)


def write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file whole or not at all, flushed to the disk; a private one only its owner may read."""
    with private_files() if private else contextlib.nullcontext(), whole_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def _gone_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def flush_folder(folder: Path) -> None:
    """Makes new names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Whatever is written meanwhile, by threads and libraries as well, only its owner may read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def locked(path: Path, *, seconds: float = 0) -> Iterator[None]:
    """Holds the lock that is the file ``path``; the operating system frees it when the process ends, however it does.

    Args:
      path: of the lock, an empty file, which stays there.
      seconds: to wait for another process that holds it; below 0, for as long as it takes.

    Raises:
      TimeoutError: when another process still holds it.
    """
    import filelock

    with filelock.FileLock(path).acquire(timeout=seconds):
        yield
