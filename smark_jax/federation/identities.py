"""Long-term identities of participants, as files that operators exchange."""

import os
from pathlib import Path

from smark_jax import _validate, keys
from smark_jax.aggregation.protocol import Setup, messages


def create(path: Path) -> bytes:
    """Writes a fresh identity that only its owner may read, and returns the public key to send to the others.

    Raises:
      FileExistsError: when the file is there already; an identity is never overwritten.
    """
    identity = keys.new()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(identity.to_bytes().hex() + "\n")
    return messages.identity_key(identity)


def read(path: Path) -> keys.SecretKey:
    """The identity that :func:`create` wrote.

    Raises:
      ValueError: when the file does not hold 64 hexadecimal digits.
    """
    try:
        return keys.from_bytes(bytes.fromhex(path.read_text().strip()))
    except (ValueError, OSError) as error:
        cause = "Make one with: python -m smark_jax.federation keygen FILE"
        raise _validate.fail("federation", "a file with 64 hexadecimal digits", f"{path}: {error}", cause) from None


def check_roster(path: object, setup: Setup) -> None:
    """Refuses a round whose roster lists somebody whom the file at ``path`` does not; anything goes without a file."""
    if path is None:
        return
    lines = Path(str(path)).read_text().split("\n")
    known = {line.split("#")[0].strip().lower() for line in lines} - {""}
    strangers = [identity.hex() for identity in setup.roster if identity.hex() not in known]
    if strangers:
        got = f"{len(strangers)} others, such as {strangers[0][:16]}..."
        cause = f"Ask the operators, and add the line to {path} if it is one of them."
        raise _validate.fail("federation", f"only identities of {path}", got, cause)
