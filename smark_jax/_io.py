"""Files: atomic writes, owner-only permissions where needed, and locks between processes."""

import contextlib
import errno
import os
import secrets
import shutil
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
def new_folder(path: Path) -> Iterator[None]:
    """A new folder, whose names are flushed to the disk at the end of the block; it is removed when the block fails."""
    path.mkdir()
    with _gone_on_error(path):
        yield
        flush_folder(path)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces ``path`` at the end of the block; nothing changes when the block fails."""
    with renamed(path) as part, new_file(part) as file:
        yield file


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A path for a new file or folder, which replaces ``path`` at the end of the block, and is removed if that fails.

    It lies in the same folder under a name that begins with a dot and ends in ``.part``. A folder replaces none that
    holds anything.
    """
    if not path.name:
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with _gone_on_error(part):
        yield part
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
        remove(path)
        raise


def remove(path: Path) -> None:
    """Removes a file or folder of our own, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.unlink()


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
