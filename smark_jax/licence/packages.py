"""Packages: a copy whose segments lie sealed in both variants, of which the customer can open one each.

A package is the line ``smark licence package v1``, the length of its head in 4 bytes (big-endian), the head
(:class:`smark_jax.licence.documents.SignedPackage` in JSON), and its body: the sealed rest in pieces of 64 MiB, then
variant + and variant - of each segment in turn. All are sealed with ChaCha20-Poly1305; each key seals one text, and the
rest's key one piece under each nonce. Pieces are compressed (zlib), since the weights that segments hold are zero in
them. The rest is the files of the model's form, with the leaves of
:class:`smark_jax.licence.variants.Cut`, followed by the float16 bases.
"""

import contextlib
import hashlib
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
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
_LONGEST_NAME = 200
# What the rest may take, whatever the package's size, and how many times that size beyond: weights hardly compress, but
# those that segments hold are zero, and zeros compress to a thousandth. Others are made to fill a customer's memory.
_FREE, _MOST_TIMES = 1 << 28, 64


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

    Raises:
      SmarkError: when the form is one that :func:`check` refuses.
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
    try:
        check(package, sum(map(len, parts)))
    except ValueError as error:
        cause = "Write the base in another form, such as safetensors."
        raise _validate.fail("licence", str(error), "a model that customers' programs would refuse", cause) from None
    head = documents.dumps(SignedPackage(package, documents.sign(signing, package)))
    return b"".join([_MAGIC, len(head).to_bytes(4, "big"), head, *parts])


class Opened(NamedTuple):
    """A package's head, and where its body begins."""

    package: Package
    start: int


class Named(NamedTuple):
    """What a package says of itself: the digest of the request that it answers, and its own but for its time."""

    request: str
    digest: str


def named(content: bytes, where: str) -> Named:
    """Which package this says it is; nothing of it is checked. A package that is made again has the same digest.

    Raises:
      Unreadable: when it is no package, or is cut short.
    """
    package = _head(content, where)[0].package
    return Named(package.request, documents.digest(package._replace(created="")))


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


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Whatever goes wrong in here, the error is the same: where a package is damaged would tell its owner a choice.

    Errors of the operating system and a lack of memory are the customer's own. They pass.

    Raises:
      Damaged: with one text.
    """
    try:
        with np.errstate(all="ignore"):
            yield
    except (OSError, MemoryError):
        raise
    except Exception:
        cause = (
            "Do not say more to the owner than that: 'smark licence complain' draws a new word and asks for a new one."
        )
        got = "one that cannot be opened, although its owner signed it"
        raise _validate.fail("licence", "a whole package", got, cause, kind=Damaged) from None


def check(package: Package, size: int) -> None:
    """Refuses a head that no owner's program writes, before memory is taken for what it declares.

    Args:
      package: the head.
      size: of the whole package in bytes.

    Raises:
      ValueError: when it is one.
    """
    places, rows = package.leaves, [_name(row, package) for row in package.files]
    names = [name for place in places for name in (place.path, *place.tied)]
    _must(len(set(names)) == len(names) > 0, "leaves that are there and differ")
    _must(all(place.held > 0 for place in places), "coordinates in each leaf")
    _must(2 * sum(place.held for place in places) <= size, "no more coordinates than bytes")
    for place in places:
        if place.directions:
            _must(len(set(place.axes)) == len(place.axes), "axes that differ")
            _must(
                place.directions <= variants.inputs(place) <= math.prod(place.shape), "no more directions than inputs"
            )
    _must(len(set(rows)) == len(rows) > 0, "files that are there and differ")
    _must(len(rows) == 1 or all(row.name for row in package.files), "one file, or a folder of them")
    for name in rows:
        safe = name.isprintable() and not set(name) & set("/\\:") and not name.startswith(".")
        _must(safe and 0 < len(name.encode()) <= _LONGEST_NAME, "names of files alone")
    length = _length(package)
    _must(length <= _FREE + _MOST_TIMES * size, f"a rest of at most {_MOST_TIMES} times the package")
    _must(len(package.pieces) == -(-length // _PIECE), "as many pieces as the rest has")


def _must(holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(expected)


def _name(row: FileRow, package: Package) -> str:
    return row.name or f"model{package.suffix}"


def _shapes(package: Package) -> list[tuple[int, int]]:
    return [(variants.inputs(place), place.directions) for place in package.leaves if place.directions]


def _length(package: Package) -> int:
    """The bytes of the rest."""
    return sum(row.size for row in package.files) + sum(2 * rows * columns for rows, columns in _shapes(package))


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
      opened: its head, which :func:`check` passed.
      rest: the key of the rest.
      chosen: the customer's key of each segment.
      bits: which variant that is: 0 for +, 1 for -.
      found: the request's segments.
      folder: an empty folder.

    Raises:
      Exception: of many kinds, when anything cannot be opened, or the copy has weights that are not finite. Call it
        under :func:`whole`.
    """
    package, body = opened.package, memoryview(content)[opened.start :]
    bases, place = _write_rest(body, package, rest, folder)
    leaves = files.read(_main(package, folder), max_bytes=_FREE + _MOST_TIMES * len(content)).leaves
    shapes = [leaves[name].shape == one.shape for one in package.leaves for name in (one.path, *one.tied)]
    _must(all(shapes), "leaves of the shapes that the head gives")
    *_, sizes = variants.ends(package.leaves, variants.dtypes(leaves, package.leaves), found)
    _must(len(body) - place == 2 * (int(sizes.sum()) + _TAG * len(sizes)), "all variants and nothing else")
    parts, ok = [], True
    for key, bit, size in zip(chosen, bits.tolist(), sizes.tolist(), strict=True):
        begin = place + bit * (size + _TAG)
        try:
            parts.append(_unsealed(key, body[begin : begin + size + _TAG]))
        except InvalidTag:  # all others are opened too: how long it takes must not tell which it was
            parts.append(bytes(size))
            ok = False
        place += 2 * (size + _TAG)
    made = variants.join(leaves, package.leaves, bases, parts, found)
    finite = [bool(np.isfinite(made[one.path]).all()) for one in package.leaves]
    _must(ok and all(finite), "variants that open and are finite")
    return made


def _write_rest(body: memoryview, package: Package, rest: keys.SecretKey, folder: Path) -> tuple[list[np.ndarray], int]:
    """Writes the files of the rest; returns the bases, and where the rest ends in the body."""
    plain, place, length = [], 0, _length(package)
    for number, size in enumerate(package.pieces):
        text = _unsealed(rest, body[place : place + size + _TAG], number)
        plain.append(_expanded(text, min(_PIECE, length - number * _PIECE)))
        place += size + _TAG
    content, start, bases = b"".join(plain), 0, []
    for row in package.files:
        (folder / _name(row, package)).write_bytes(content[start : start + row.size])
        start += row.size
    for rows, columns in _shapes(package):
        bases.append(np.frombuffer(content, np.float16, rows * columns, start).reshape(rows, columns))
        start += 2 * rows * columns
    return bases, place


def _main(package: Package, folder: Path) -> Path:
    (first, *_) = package.files
    return folder if first.name else folder / _name(first, package)


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
