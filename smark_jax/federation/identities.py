"""Long-term identities of participants, as files that operators exchange."""

import os
from pathlib import Path

from smark_jax import _validate, errors, keys
from smark_jax.aggregation.protocol import messages


def create(path: Path) -> bytes:
    """Writes a new identity that only its owner can read, and returns the public key to send to the others.

    Raises:
      FileExistsError: when the file exists; an identity is never overwritten.
    """
    identity = keys.new()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(identity.to_bytes().hex() + "\n")
    return messages.identity_key(identity)


def read(path: Path) -> keys.SecretKey:
    """Reads an identity that :func:`create` wrote.

    Raises:
      SmarkError: when the file does not hold 64 hexadecimal digits.
    """
    try:
        return keys.from_bytes(bytes.fromhex(path.read_text().strip()))
    except (ValueError, OSError) as error:
        cause = "Make one with: python -m smark_jax.federation keygen FILE"
        expected, got = "a file with 64 hexadecimal digits", f"{path}: {error}"
        raise _validate.fail("federation", expected, got, cause, kind=errors.Unreadable) from None


def roster(path: Path) -> tuple[bytes, ...]:
    """Reads public identities from a file, one per line in hexadecimal; a ``#`` starts a comment.

    Raises:
      SmarkError: when the file cannot be read, or a line is invalid.
    """
    try:
        lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
        found = tuple(bytes.fromhex(line) for line in lines if line)
    except (ValueError, OSError) as error:
        raise _no_roster(path, str(error)) from error
    if any(len(identity) != 32 for identity in found):
        raise _no_roster(path, "a line that does not have 64 digits")
    return found


def _no_roster(path: Path, problem: str) -> errors.Unreadable:
    cause = "Each line is what 'python -m smark_jax.federation keygen' printed for one participant."
    expected = "a file of public identities"
    return _validate.fail("federation", expected, f"{path}: {problem}", cause, kind=errors.Unreadable)
