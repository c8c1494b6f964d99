"""Files: atomic writes, owner-only permissions where needed, and locks between processes."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A new file, flushed to the disk at the end of the block; it is removed when the block fails."""
    with path.open("xb") as file, _gone_on_error(path):
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces ``path`` at the end of the block; nothing changes when the block fails.

    Until then it lies in the same folder under a name that begins with a dot and ends in ``.part``.
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
    """Writes a file atomically and flushes it to the disk; only its owner may read a private one."""
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
    """Makes all files written inside the block, also by threads and libraries, readable by their owner only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


@contextlib.contextmanager
def locked(path: Path, *, seconds: float = 0) -> Iterator[None]:
    """Holds the lock file ``path``; the operating system releases it when the process ends, even after a crash.

    Args:
      path: the lock file; it is empty, and stays after the lock is released.
      seconds: how long to wait for another process that holds it; below 0, without limit.

    Raises:
      TimeoutError: when another process still holds it.
    """
    import filelock

    with filelock.FileLock(path).acquire(timeout=seconds):
        yield
