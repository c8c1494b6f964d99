"""The documents of a licence, in the order in which they pass between owner and customer.

Each is canonical JSON (sorted keys, no spaces) and signed with Ed25519 over ``smark licence v1 KIND``, a line break,
and that text. A digest is the SHA-256 of the same bytes, in hex. Anybody with these rules can write
another implementation.
"""

import hashlib
import json
from typing import Any, NamedTuple, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from smark_jax import _documents, _foreign, errors
from smark_jax._documents import MISSING, Hash, Hex, Missing, Signature
from smark_jax.licence import group

T = TypeVar("T")

VERSION = 1
LARGEST = 1 << 25
"""The size in bytes of the largest document that is read."""


class Offer(NamedTuple):
    """What an owner offers one customer before it knows the customer's word.

    Attributes:
      created: when.
      model: the model's name.
      customer: the customer's name with the owner.
      serial: the customer's number with the owner.
      number: of the commitment that covers the customer's codeword.
      root: that commitment's root.
      public_key: the owner's Ed25519 key, which commitments name too.
      point: the owner's point A of the transfers.
      num_segments: n, the choices that the customer makes.
      num_parts: P, the disputes that a licence bears.
    """

    created: str
    model: str
    customer: str
    serial: int
    number: int
    root: Hash
    public_key: Hash
    point: Hash
    num_segments: int
    num_parts: int


class SignedOffer(NamedTuple):
    """An offer's file, signed by the owner."""

    offer: Offer
    signature: Signature


class Arbiter(NamedTuple):
    """Whom a customer trusts with its openings: the keys that sign its answers and that deposits are sealed to."""

    identity: Hash
    deposits: Hash


class Deposit(NamedTuple):
    """A customer's openings, sealed to an arbiter part by part: the SHA-256 of each sealed part."""

    arbiter: Arbiter
    pieces: tuple[Hash, ...]


class Request(NamedTuple):
    """The customer's choices, hidden in points.

    Attributes:
      created: when.
      offer: the offer's digest.
      attempt: how many words the customer has drawn for this owner, this one included, that brought it no copy before.
      identity: the customer's Ed25519 key.
      points: B_i, 32 bytes each.
      rest: the point of the key that seals what does not depend on choices.
      deposit: where the openings are deposited, if anywhere.
    """

    created: str
    offer: Hash
    attempt: int
    identity: Hash
    points: Hex
    rest: Hash
    deposit: Deposit | Missing = MISSING


class SignedRequest(NamedTuple):
    """An offer, and the customer's signed request under it."""

    offer: SignedOffer
    request: Request
    signature: Signature


class RequestFile(NamedTuple):
    """A request as it is sent, with the sealed parts of its deposit."""

    request: SignedRequest
    pieces: tuple[Hex, ...] = ()


class Place(NamedTuple):
    """How a package's segments make one leaf.

    Attributes:
      path: of the leaf.
      tied: other names of the same tensor.
      shape: of the leaf.
      axes: those over which its layer sums, where coordinates are directions.
      directions: how many there are; 0 where the coordinates are the weights themselves.
      held: how many of the leaf's first coordinates belong to segments.
    """

    path: str
    tied: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    directions: int
    held: int


class FileRow(NamedTuple):
    """A file of the model's form: its name, empty for a model in a single file, and its size in bytes."""

    name: str
    size: int


class Package(NamedTuple):
    """The head of a package.

    Attributes:
      created: when.
      request: the digest of the request.
      suffix: what the name of a model in a single file ends with.
      leaves: how segments make the leaves.
      files: of the model's form.
      pieces: sizes of the rest's pieces in bytes, compressed, without the 16 bytes that authenticate each.
      body: the SHA-256 of what follows the head.
    """

    created: str
    request: Hash
    suffix: str
    leaves: tuple[Place, ...]
    files: tuple[FileRow, ...]
    pieces: tuple[int, ...]
    body: Hash


class SignedPackage(NamedTuple):
    """The head, signed by the owner."""

    package: Package
    signature: Signature


class Earlier(NamedTuple):
    """A part that an earlier dispute opened, and the digest of that dispute's bundle."""

    part: int
    bundle: Hash


class Challenge(NamedTuple):
    """What an owner asks of an accused: to open these parts of the word.

    Attributes:
      request: the accused's, as signed.
      parts: which to open.
      keys: of these parts, with which anybody can read them in the suspect.
      earlier: parts opened before.
      pieces: of these parts, as deposited; empty where nothing is.
    """

    request: SignedRequest
    parts: tuple[int, ...]
    keys: tuple[Hash, ...]
    earlier: tuple[Earlier, ...]
    pieces: tuple[Hex, ...] = ()


class Opened(NamedTuple):
    """One part's openings.

    Attributes:
      part: its number.
      scalars: b_i of its segments in increasing order, 32 bytes each.
      bits: c_i, packed, the first in the highest bit.
      ephemeral: the secret that sealed the deposit, if an arbiter opened it: anybody can seal it again and compare.
    """

    part: int
    scalars: Hex
    bits: Hex
    ephemeral: Hash | Missing = MISSING


class Answer(NamedTuple):
    """The openings that an accused, or its arbiter, gives to one bundle.

    Attributes:
      created: when.
      bundle: the digest of the bundle that asked.
      request: the digest of the request.
      key: the Ed25519 key that signs: the customer's, or its arbiter's.
      opened: the parts.
    """

    created: str
    bundle: Hash
    request: Hash
    key: Hash
    opened: tuple[Opened, ...]


class SignedAnswer(NamedTuple):
    """An answer, signed by whom it names."""

    answer: Answer
    signature: Signature


class AnswerFile(NamedTuple):
    """All answers of one wallet to a bundle, which may ask for several words."""

    answers: tuple[SignedAnswer, ...]


KINDS: dict[type, str] = {
    Offer: "offer",
    Request: "request",
    Package: "package",
    Answer: "answer",
    Arbiter: "arbiter",
}
"""What each signed or hashed document is called in its message."""


def message(document: Any) -> bytes:
    """The bytes that are signed and hashed."""
    kind = KINDS[type(document)]
    return f"smark licence v{VERSION} {kind}\n".encode() + _documents.canonical(document)


def digest(document: Any) -> str:
    """The SHA-256 of :func:`message`, in hex."""
    return hashlib.sha256(message(document)).hexdigest()


def sha256(content: bytes) -> str:
    """The SHA-256 of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()


def sign(key: Ed25519PrivateKey, document: Any) -> str:
    """The signature of a document, in hex."""
    return key.sign(message(document)).hex()


def genuine(key: str, document: Any, signature: str) -> bool:
    """Whether a signature is this key's. Under a key of small order anybody can sign anything: none is genuine."""
    if not group.is_point(bytes.fromhex(key)):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), message(document))
    except (InvalidSignature, ValueError):
        return False
    return True


def dumps(document: Any) -> bytes:
    """A document's file."""
    kind, content = f"smark licence {_NAMES[type(document)]}", _documents.plain(document)
    return json.dumps({"format": kind, "version": VERSION, "content": content}).encode() + b"\n"


def loads(kind: type[T], content: bytes, where: str) -> T:
    """Reads a document's file, and checks the type of every field.

    Args:
      kind: of document.
      content: the file's.
      where: the file's name, for messages.

    Raises:
      Unreadable: when it is another file, is damaged or from a newer version.
    """
    name = _NAMES[kind]
    what = f"a licence's {name}"
    if len(content) > LARGEST:
        raise unreadable(where, what, f"more than {LARGEST:,} bytes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise unreadable(where, what, "a file that is not JSON") from None
    if not isinstance(found, dict) or found.keys() != {"format", "version", "content"}:
        raise unreadable(where, what, "another document")
    if found["format"] != f"smark licence {name}":
        raise unreadable(where, what, f"{str(found['format'])[:60]!r}")
    if found["version"] != VERSION or isinstance(found["version"], bool):
        raise unreadable(where, f"{what} of version {VERSION}", f"version {str(found['version'])[:20]}")
    try:
        return _documents.parse(kind, found["content"])
    except (_documents.Wrong, RecursionError) as error:
        raise unreadable(where, what, f"one whose {error}") from None


def unreadable(where: str, what: str, got: str) -> errors.Unreadable:
    """The error for a file that is not what it should be; the caller raises it."""
    said = _foreign.clean(f"expected {what} in {where}, but got {got}")
    advice = "Ask for the file again: it may be another one, cut short, or from a newer smark-jax."
    return errors.Unreadable(f"licence: {said}", advice, desk=f"{said}. {advice}")


_NAMES: dict[Any, str] = {
    SignedOffer: "offer",
    RequestFile: "request",
    AnswerFile: "answer",
    Arbiter: "arbiter",
    SignedPackage: "package",
}
