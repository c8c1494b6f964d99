"""Packages: a copy whose segments lie sealed in both variants, of which the customer can open one each.

A package is the line ``smark licence package v1``, the length of its head in 4 bytes (big-endian), the head
(:class:`smark_jax.licence.documents.SignedPackage` in JSON), and its body: the sealed rest in pieces of 64 MiB, then
variant + and variant - of each segment in turn. All are sealed with ChaCha20-Poly1305; each key seals one text, and the
rest's key one piece under each nonce. Pieces are compressed (zlib), since the weights that segments hold are zero in
them. The rest is the files of the model's form, with the leaves of
:class:`smark_jax.licence.variants.Cut`, followed by the float16 bases.
"""

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from smark_jax import _documents, _validate, errors, files, keys
from smark_jax.licence import documents, segments, variants
from smark_jax.licence.documents import FileRow, Package, SignedPackage

_MAGIC = b"smark licence package v1\n"
_PIECE = 1 << 26
_TAG = 16
_LONGEST_HEAD = 1 << 24


class Keys(NamedTuple):
    """All keys that the owner seals with: of the rest, and of both variants of each segment."""

    rest: keys.SecretKey
    segments: Sequence[tuple[keys.SecretKey, keys.SecretKey]]


class Damaged(errors.SmarkError):
    """A package that does not hold what its owner signed, or cannot be opened: the text never says where."""


def pack(
    made: variants.Cut,
    form: Mapping[str, bytes],
    suffix: str,
    request: str,
    sealing: Keys,
    signing: Ed25519PrivateKey,
) -> bytes:
    """The bytes of a package.

    Args:
      made: the copy in pieces.
      form: the files that hold the rest, by name; the name is empty for a model in a single file.
      suffix: what the name of a single file ends with.
      request: the request's digest.
      sealing: the keys.
      signing: the owner's key.
    """
    plain = b"".join([*form.values(), *(basis.tobytes() for basis in made.bases)])
    texts = [zlib.compress(plain[start : start + _PIECE], 1) for start in range(0, len(plain), _PIECE)]
    parts = [_sealed(sealing.rest, text, number) for number, text in enumerate(texts)]
    for pair, both in zip(sealing.segments, made.variants, strict=True):
        parts += [_sealed(key, text) for key, text in zip(pair, both, strict=True)]
    body = hashlib.sha256()
    for part in parts:
        body.update(part)
    rows = tuple(FileRow(name, len(content)) for name, content in form.items())
    pieces = tuple(map(len, texts))
    package = Package(_documents.now(), request, suffix, made.places, rows, pieces, body.hexdigest())
    head = documents.dumps(SignedPackage(package, documents.sign(signing, package)))
    return b"".join([_MAGIC, len(head).to_bytes(4, "big"), head, *parts])


class Opened(NamedTuple):
    """A package's head, and where its body begins."""

    package: Package
    start: int


def named(content: bytes, where: str) -> str:
    """The digest of the request that a package says it answers; nothing of it is checked.

    Raises:
      Unreadable: when it is no package, or is cut short.
    """
    return _head(content, where)[0].package.request


def head(content: bytes, owner: str, request: str, where: str) -> Opened:
    """Reads and checks a package's head and the hash of its body, which takes no secret.

    Args:
      content: the package's.
      owner: the key that the offer names.
      request: the digest of the customer's request.
      where: the file's name, for messages.

    Raises:
      Unreadable: when it is no package, or is cut short.
      SmarkError: when somebody else signed it, it answers another request, or its body is not the one that was signed.
    """
    signed, start = _head(content, where)
    package, again = signed.package, "Ask the owner for the package that answers this request."
    if not documents.genuine(owner, package, signed.signature):
        raise _validate.fail("licence", "a package signed by the owner of the offer", "another signature", again)
    if package.request != request:
        raise _validate.fail("licence", "the package that answers your request", "one for another request", again)
    if hashlib.sha256(memoryview(content)[start:]).hexdigest() != package.body:
        again = "It was damaged on its way: ask the owner to send the same file again."
        raise _validate.fail("licence", "the package's content as the owner signed it", "other bytes", again)
    return Opened(package, start)


def _head(content: bytes, where: str) -> tuple[SignedPackage, int]:
    """The head, and where the body begins."""
    if not content.startswith(_MAGIC):
        raise documents.unreadable(where, "a licence's package", "another file")
    start = len(_MAGIC) + 4
    length = int.from_bytes(content[start - 4 : start], "big")
    if not 0 < length <= min(_LONGEST_HEAD, len(content) - start):
        raise documents.unreadable(where, "a licence's package", "one that is cut short")
    return documents.loads(SignedPackage, content[start : start + length], where), start + length


def unpack(
    content: bytes,
    opened: Opened,
    rest: keys.SecretKey,
    chosen: Sequence[keys.SecretKey],
    bits: np.ndarray,
    found: segments.Segments,
    folder: Path,
) -> dict[str, np.ndarray]:
    """The copy's leaves; the files of the rest, whose form it has, are written into ``folder``.

    Args:
      content: the package's.
      opened: its head.
      rest: the key of the rest.
      chosen: the customer's key of each segment.
      bits: which variant that is: 0 for +, 1 for -.
      found: the request's segments.
      folder: an empty folder.

    Raises:
      Damaged: when anything cannot be opened, or the copy has weights that are not finite. Whatever the reason, the
        error is the same: where a package is damaged would tell its owner a choice.
    """
    try:
        return _unpacked(memoryview(content)[opened.start :], opened.package, rest, chosen, bits, found, folder)
    except (InvalidTag, ValueError, KeyError, IndexError, OverflowError, MemoryError, OSError):
        cause = (
            "Do not say more to the owner than that: 'smark licence complain' draws a new word and asks for a new one."
        )
        got = "one that cannot be opened, although its owner signed it"
        raise _validate.fail("licence", "a whole package", got, cause, kind=Damaged) from None


def _unpacked(
    body: memoryview,
    package: Package,
    rest: keys.SecretKey,
    chosen: Sequence[keys.SecretKey],
    bits: np.ndarray,
    found: segments.Segments,
    folder: Path,
) -> dict[str, np.ndarray]:
    shapes = [(variants.inputs(place), place.directions) for place in package.leaves if place.directions]
    length = sum(row.size for row in package.files) + sum(2 * rows * columns for rows, columns in shapes)
    if len(package.pieces) != -(-length // _PIECE):
        raise ValueError("another number of pieces")
    plain, place = [], 0
    for number, size in enumerate(package.pieces):
        text = _unsealed(rest, body[place : place + size + _TAG], number)
        plain.append(_expanded(text, min(_PIECE, length - number * _PIECE)))
        place += size + _TAG
    content = b"".join(plain)
    start = _write(content, package, folder)
    bases = []
    for rows, columns in shapes:
        bases.append(np.frombuffer(content, np.float16, rows * columns, start).reshape(rows, columns))
        start += 2 * rows * columns
    leaves = files.read(_main(package, folder), max_bytes=files.ANY_SIZE).leaves
    itemsizes = [4 if one.directions else leaves[one.path].dtype.itemsize for one in package.leaves]
    if any(leaves[one.path].shape != one.shape for one in package.leaves):
        raise ValueError("leaves of another shape")
    texts = variants.sizes(package.leaves, itemsizes, found).sum(axis=1).tolist()
    if len(body) - place != 2 * (sum(texts) + _TAG * len(texts)):
        raise ValueError("a body of another length")
    parts, ok = [], True
    for key, bit, size in zip(chosen, bits.tolist(), texts, strict=True):
        begin = place + bit * (size + _TAG)
        try:
            parts.append(_unsealed(key, body[begin : begin + size + _TAG]))
        except InvalidTag:  # all others are opened too: how long it takes must not tell which it was
            parts.append(bytes(size))
            ok = False
        place += 2 * (size + _TAG)
    made = variants.join(leaves, package.leaves, bases, parts, found)
    if not ok or not all(np.isfinite(np.asarray(made[one.path], np.float32)).all() for one in package.leaves):
        raise ValueError("not opened, or not finite")
    return made


def _write(content: bytes, package: Package, folder: Path) -> int:
    start = 0
    for row in package.files:
        name = row.name or f"model{package.suffix}"
        if Path(name).name != name or name.startswith("."):
            raise ValueError("a file outside the folder")
        (folder / name).write_bytes(content[start : start + row.size])
        start += row.size
    return start


def _main(package: Package, folder: Path) -> Path:
    single = [row for row in package.files if not row.name]
    return folder / f"model{package.suffix}" if single else folder


def form_of(package: Package, folder: Path) -> files.Form:
    """The form of the copy, once :func:`unpack` has written the rest."""
    return files.Form(_main(package, folder))


def _expanded(text: bytes, size: int) -> bytes:
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(text, size + 1)
    except zlib.error as error:
        raise ValueError("a piece that is not compressed") from error
    if len(found) != size:
        raise ValueError("a piece of another size")
    return found


def _sealed(key: keys.SecretKey, text: bytes, number: int = 0) -> bytes:
    return ChaCha20Poly1305(key.to_bytes()).encrypt(number.to_bytes(12, "big"), text, None)


def _unsealed(key: keys.SecretKey, text: memoryview, number: int = 0) -> bytes:
    return ChaCha20Poly1305(key.to_bytes()).decrypt(number.to_bytes(12, "big"), text, None)


def read_form(path: Path) -> dict[str, bytes]:
    """The files of a model's form, by name; the name is empty for a single file."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {one.name: one.read_bytes() for one in sorted(path.iterdir())}
