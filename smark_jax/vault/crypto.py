"""The master key, kept in a file that only the passphrase opens, and the key that signs evidence."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from smark_jax import _documents, _validate, errors, keys
from smark_jax._documents import MISSING, Hex, Missing

SHORTEST_PASSPHRASE = 12
"""A passphrase of fewer characters is weak; callers warn."""
# 128 MB and about a third of a second per guess (OWASP's recommendation for scrypt).
_N, _R, _P = 2**17, 8, 1
# The most that a key file may ask for, so that an edited file cannot exhaust memory.
_LARGEST = {"n": 2**20, "r": 16, "p": 4}
_LONGEST_FILE = 10_000


class Kdf(NamedTuple):
    """How the passphrase becomes a key."""

    name: str
    n: int
    r: int
    p: int
    salt: Hex


class Cipher(NamedTuple):
    """What seals the master key."""

    name: str
    nonce: Hex


class KeyFile(NamedTuple):
    """A key file; its ciphertext authenticates the other fields."""

    format: str
    version: int
    kdf: Kdf
    cipher: Cipher
    ciphertext: Hex | Missing = MISSING


def seal(master: keys.SecretKey, passphrase: str) -> bytes:
    """The content of a key file: JSON with the key under scrypt (RFC 7914) and ChaCha20-Poly1305 (RFC 8439).

    The ciphertext authenticates all parameters, so none can be changed unnoticed.

    Raises:
      SmarkError: when the passphrase is empty.
    """
    nonce = os.urandom(12)
    kdf = Kdf("scrypt", _N, _R, _P, os.urandom(16).hex())
    header = KeyFile("smark master key", 1, kdf, Cipher("ChaCha20-Poly1305", nonce.hex()))
    cipher = ChaCha20Poly1305(_stretch(passphrase, kdf))
    sealed = cipher.encrypt(nonce, master.to_bytes(), _documents.canonical(header))
    return _documents.pretty(header._replace(ciphertext=sealed.hex()))


def unseal(path: Path, passphrase: str) -> keys.SecretKey:
    """The master key in a key file.

    Raises:
      SmarkError: when the passphrase is wrong, the file was changed, or it is not a key file.
    """
    broken = _validate.fail("vault", f"a whole key file {path}", "a damaged one", "Restore it from your backup.")
    with path.open("rb") as file:
        content = file.read(_LONGEST_FILE)
    try:
        found = _documents.parse(KeyFile, json.loads(content))
        if not found.ciphertext or not all(1 <= getattr(found.kdf, name) <= most for name, most in _LARGEST.items()):
            raise broken
        cipher, nonce = ChaCha20Poly1305(_stretch(passphrase, found.kdf)), bytes.fromhex(found.cipher.nonce)
        header = found._replace(ciphertext=MISSING)
        secret = cipher.decrypt(nonce, bytes.fromhex(found.ciphertext), _documents.canonical(header))
    except InvalidTag:
        cause = "Type it again. If you are sure of it, the file was changed: restore master.key from your backup."
        raise _validate.fail(
            "vault",
            "the passphrase of this vault",
            "one that does not open it",
            cause,
            kind=errors.WrongPassphrase,
        ) from None
    except (_documents.Wrong, RecursionError, ValueError):
        raise broken from None
    return keys.from_bytes(secret)


def _stretch(passphrase: str, kdf: Kdf) -> bytes:
    if not passphrase:
        cause = "Choose a sentence that nobody guesses; without it nobody can open the vault, not even you."
        raise _validate.fail("vault", "a passphrase", "an empty one", cause)
    scrypt = Scrypt(salt=bytes.fromhex(kdf.salt), length=keys.KEY_BYTES, n=kdf.n, r=kdf.r, p=kdf.p)
    return scrypt.derive(passphrase.encode())


def signing_key(master: keys.SecretKey) -> Ed25519PrivateKey:
    """The owner's Ed25519 key (RFC 8032), which signs evidence."""
    return Ed25519PrivateKey.from_private_bytes(keys.derive(master, "signing").to_bytes())


def public_key(master: keys.SecretKey) -> str:
    """The public half of the signing key, 32 bytes in hex; every commitment names it and so binds it before sale."""
    return signing_key(master).public_key().public_bytes_raw().hex()
