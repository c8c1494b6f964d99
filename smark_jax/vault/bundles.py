"""Evidence bundles as files: a JSON document with the owner's Ed25519 signature. Reading one trusts nothing in it."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from smark_jax import _documents, _foreign, errors, keys
from smark_jax.files import _limits
from smark_jax.vault import commitments, crypto, documents, drafts, versions

T = TypeVar("T")

FORMAT, VERSION = "smark evidence", 1
LARGEST = 1 << 24
"""The size in bytes of the largest bundle that is read."""


_AGAIN = "Ask for the file again: it may have been cut short, or be another one."
_UPGRADE = "Upgrade smark-jax: a newer one wrote it. Ask for the file again if yours is the newest."


def unreadable(what: str, got: str, advice: str = _AGAIN) -> errors.Unreadable:
    """The error for a file that is not a bundle or not a commitment; the caller raises it."""
    said = f"expected {what}, but got {got}"
    return errors.Unreadable(f"evidence: {said}", advice, desk=_foreign.clean(f"{said}. {advice}"))


def signed(bundle: Any, master: keys.SecretKey) -> bytes:
    """The file of a bundle, given as a document or as its JSON."""
    content = documents.plain(bundle)
    signature = crypto.signing_key(master).sign(_message(content)).hex()
    return json.dumps({"bundle": content, "signature": signature}, indent=1).encode() + b"\n"


def genuine(found: documents.Signed) -> bool:
    """Whether the bundle was signed with the key that its commitment names."""
    key = bytes.fromhex(found.bundle.header.public_key)
    message = _message(documents.plain(found.bundle))
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(bytes.fromhex(found.signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def digest(bundle: documents.Bundle) -> str:
    """The SHA-256 of what is signed, in hex: what answers name."""
    return hashlib.sha256(_message(documents.plain(bundle))).hexdigest()


def _message(content: Any) -> bytes:
    return b"smark evidence v1\n" + _documents.canonical(content)


def read(path: Path) -> documents.Signed:
    """Reads a bundle's file and checks the type of every field.

    Raises:
      Unreadable: when the file is not a bundle, or a newer version of smark-jax is needed to read it.
    """
    found = read_json(path, documents.Signed, "an evidence bundle")
    bundle = found.bundle
    _expect(FORMAT, VERSION, bundle.format, bundle.version)
    if bundle.drawn:
        _expect(drafts.FORMAT, drafts.VERSION, bundle.drawn.draft.format, bundle.drawn.draft.version)
    for item in bundle.chain:
        _known(item.commitment)
    return found


def read_commitment(path: Path) -> documents.Commitment:
    """Reads a commitment's file as the owner published it.

    Raises:
      Unreadable: when the file is not a commitment, or a newer version of smark-jax is needed to read it.
    """
    commitment = read_json(path, documents.Commitment, "a commitment")
    _known(commitment)
    return commitment


def _known(commitment: documents.Commitment) -> None:
    """Refuses a commitment with algorithms unknown to this version, which could only guess what it binds."""
    _expect(commitments.FORMAT, commitments.VERSION, commitment.format, commitment.version)
    if unknown := versions.unknown(commitment.header.algorithms):
        raise unreadable("a commitment to algorithms that this version knows", unknown, _UPGRADE)


def _expect(wanted: str, newest: int, name: str, version: int) -> None:
    if (name, version) != (wanted, newest):
        advice = _UPGRADE if name == wanted and version > newest else _AGAIN
        raise unreadable(f"{wanted!r} of version {newest}", f"{name[:40]!r} of version {version}", advice)


def read_json(path: Path, kind: type[T], what: str) -> T:
    """Reads a JSON file that holds a document of this kind.

    Raises:
      Unreadable: when it is larger than :data:`LARGEST`, is not JSON, or has a missing, unknown or invalid field.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise unreadable(f"{what} of at most {LARGEST:,} bytes", "a larger file")
    try:
        document = json.loads(_limits.json_text(data), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        got = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:100]
        raise unreadable(f"{what} in {str(path)!r}", f"a file that is not JSON ({got})") from None
    try:
        return documents.parse(kind, document)
    except documents.Wrong as error:
        raise unreadable(f"{what} in {str(path)!r}", f"one whose {error}") from None


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")  # the JSON parser treats it like an error of its own
