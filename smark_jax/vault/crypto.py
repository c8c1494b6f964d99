"""The master key, kept in a file that only the passphrase opens, and the key that signs evidence."""

import json
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from smark_jax import _documents, _validate, errors, keys

SHORTEST_PASSPHRASE = 12
"""A passphrase of fewer characters is weak; callers warn."""
# 128 MB and about a third of a second per guess (OWASP's recommendation for scrypt).
_N, _R, _P = 2**17, 8, 1
# The most that a key file may ask for, so that an edited file cannot exhaust memory.
_LARGEST = {"n": 2**20, "r": 16, "p": 4}
_LONGEST_FILE = 10_000


def seal(master: keys.SecretKey, passphrase: str) -> bytes:
    """The content of a key file: JSON with the key under scrypt (RFC 7914) and ChaCha20-Poly1305 (RFC 8439).

    The ciphertext authenticates all parameters, so none can be changed unnoticed.

    Raises:
      SmarkError: when the passphrase is empty.
    """
    header = {
        "format": "smark master key",
        "version": 1,
        "kdf": {"name": "scrypt", "n": _N, "r": _R, "p": _P, "salt": os.urandom(16).hex()},
        "cipher": {"name": "ChaCha20-Poly1305", "nonce": os.urandom(12).hex()},
    }
    cipher = ChaCha20Poly1305(_stretch(passphrase, header["kdf"]))
    nonce = bytes.fromhex(header["cipher"]["nonce"])
    sealed = cipher.encrypt(nonce, master.to_bytes(), _documents.canonical(header))
    return json.dumps({**header, "ciphertext": sealed.hex()}, indent=2).encode() + b"\n"


def unseal(path: Path, passphrase: str) -> keys.SecretKey:
    """The master key in a key file.

    Raises:
      SmarkError: when the passphrase is wrong, the file was changed, or it is not a key file.
    """
    broken = _validate.fail("vault", f"a whole key file {path}", "a damaged one", "Restore it from your backup.")
    with path.open("rb") as file:
        content = file.read(_LONGEST_FILE)
    try:
        header: dict[str, Any] = json.loads(content)
        sealed = bytes.fromhex(header.pop("ciphertext"))
        nonce, kdf = bytes.fromhex(header["cipher"]["nonce"]), header["kdf"]
        if not all(type(kdf[name]) is int and 1 <= kdf[name] <= most for name, most in _LARGEST.items()):
            raise broken
        secret = ChaCha20Poly1305(_stretch(passphrase, kdf)).decrypt(nonce, sealed, _documents.canonical(header))
    except InvalidTag:
        cause = "Type it again. If you are sure of it, the file was changed: restore master.key from your backup."
        raise _validate.fail(
            "vault",
            "the passphrase of this vault",
            "one that does not open it",
            cause,
            kind=errors.WrongPassphrase,
        ) from None
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError):
        raise broken from None
    return keys.from_bytes(secret)


def _stretch(passphrase: str, kdf: dict[str, Any]) -> bytes:
    if not passphrase:
        cause = "Choose a sentence that nobody guesses; without it nobody can open the vault, not even you."
        raise _validate.fail("vault", "a passphrase", "an empty one", cause)
    scrypt = Scrypt(salt=bytes.fromhex(kdf["salt"]), length=keys.KEY_BYTES, n=kdf["n"], r=kdf["r"], p=kdf["p"])
    return scrypt.derive(passphrase.encode())


def signing_key(master: keys.SecretKey) -> Ed25519PrivateKey:
    """The owner's Ed25519 key (RFC 8032), which signs evidence."""
    return Ed25519PrivateKey.from_private_bytes(keys.derive(master, "signing").to_bytes())


def public_key(master: keys.SecretKey) -> str:
    """The public half of the signing key, 32 bytes in hex; every commitment names it and so binds it before sale."""
    raw = signing_key(master).public_key()
    return raw.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
