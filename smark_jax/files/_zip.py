"""Opens zip archives, the containers of npz and PyTorch files, and checks them before unpacking anything."""

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits
from smark_jax.files._limits import shown
from smark_jax.files._places import Checksum

ADVICE = "The file is damaged or forged: ask for it again, as safetensors."
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, OverflowError, RuntimeError, ValueError)
"""What zipfile raises on damaged files: RuntimeError for unsupported features, ValueError for invalid offsets."""

_CHUNK = 2**20
_MAX_DIRECTORY = 4 * 2**20  # a zip's directory grows about twenty-fold when parsed


class _ShortReads(io.BytesIO):
    """A file in memory that refuses long reads, since zipfile reads a whole directory at once, however long."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._size = len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        """Up to ``size`` bytes."""
        left = self._size - self.tell()
        if (left if size is None or size < 0 else min(size, left)) > _MAX_DIRECTORY:
            raise Unreadable("its directory is too long for a file of weights", ADVICE)
        return super().read(size)


def matches(data: bytes) -> bool:
    """Whether the content begins like a zip, empty or not."""
    return data[:4] in (b"PK\x03\x04", b"PK\x05\x06")


def opened(data: bytes) -> zipfile.ZipFile:
    """Opens the archive, and checks that its members are few, have safe names and use a common compression.

    Raises:
      Unreadable: when a member fails these checks, or the directory is damaged or too long.
    """
    try:
        archive = zipfile.ZipFile(_ShortReads(data))
    except Unreadable:
        raise
    except DAMAGE:
        raise Unreadable("its zip directory is damaged", ADVICE) from None
    found = archive.infolist()
    _limits.check_names(info.filename for info in found)
    for info in found:
        _limits.check_name(info.filename)
        steps = info.filename.replace("\\", "/").split("/")
        if ".." in steps or steps[0] == "" or ":" in steps[0]:
            raise Unreadable(f"its member {shown(info.filename)} points outside the file", ADVICE)
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Unreadable(f"its member {shown(info.filename)} is encrypted or compressed in a rare way", ADVICE)
    return archive


def bounded(data: bytes, max_bytes: int) -> zipfile.ZipFile:
    """Opens the archive as :func:`opened` does, and checks that it unpacks to at most ``max_bytes``."""
    archive = opened(data)
    total = sum(info.file_size for info in archive.infolist())
    if total > max_bytes:
        raise _limits.too_large(f"it unpacks to {total:,} bytes, more than {max_bytes:,}")
    return archive


def taken(stream: IO[bytes], size: int, what: str) -> np.ndarray:
    """The next ``size`` bytes of a member, read in pieces, since a long read would be refused.

    Raises:
      Unreadable: when there are fewer; ``what`` is what has too few.
    """
    content, position = np.empty(size, np.uint8), 0
    while piece := stream.read(min(_CHUNK, size - position + 1)):
        content[position : position + len(piece)] = np.frombuffer(piece, np.uint8)
        position += len(piece)
    if position < size:
        raise Unreadable(f"{what} has {position:,} bytes of {size:,}", ADVICE)
    return content


def spans(data: bytes) -> Mapping[str, tuple[int, int]]:
    """Where the content of each member begins and ends that is stored as it is, by the member's name.

    Raises:
      Unreadable: when the archive is not safe to open, or a member lies outside of it.
    """
    return {info.filename: _span(data, info) for info in opened(data).infolist() if _stored(info)}


def checksums(data: bytes) -> list[Checksum]:
    """The checksums of the members that are stored as they are, and all places at which each is written.

    Those are the central directory, and the header before the member or the descriptor behind it.

    Raises:
      Unreadable: as for :func:`spans`.
    """
    archive = opened(data)
    found, entry = [], archive.start_dir
    for info in archive.infolist():
        lengths = struct.unpack_from("<HHH", data, entry + 28)  # of the name, the extra field and the comment
        if _stored(info):
            start, end = _span(data, info)
            signed = data[end : end + 4] == b"PK\x07\x08"
            places = [info.header_offset + 14, *([end + 4 * signed] if info.flag_bits & 8 else [])]
            crc = info.CRC.to_bytes(4, "little")
            there = [place for place in places if data[place : place + 4] == crc]
            found.append(Checksum(start, end, (*there, entry + 16)))
        entry += 46 + sum(lengths)
    return found


def _stored(info: zipfile.ZipInfo) -> bool:
    return info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size


def _span(data: bytes, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the content of a stored member begins and ends."""
    header = data[info.header_offset : info.header_offset + 30]
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:])) if len(header) == 30 else len(data)
    if header[:4] != b"PK\x03\x04" or start + info.file_size > len(data):
        raise Unreadable(f"its member {shown(info.filename)} lies outside of it", ADVICE)
    return start, start + info.file_size
