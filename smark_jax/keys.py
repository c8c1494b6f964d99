"""Secret keys, their derivation and commitment, and the keystream drawn from them.

HKDF derives every secret of the owner from one 256-bit master key, so that a vault stores only 32 bytes.
"""

import hashlib
import hmac
import os
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from smark_jax import _validate

if TYPE_CHECKING:  # the commands that make, open and fill a vault start without arrays
    import numpy as np
    from jaxtyping import UInt32

    from smark_jax.chacha import keystream

__all__ = [
    "KEY_BYTES",
    "SecretKey",
    "commitment",
    "derive",
    "from_bytes",
    "hashed_order",
    "keystream",
    "new",
    "seal",
    "unseal",
]

KEY_BYTES = 32
_NONCE_BYTES = 12


class SecretKey:
    """A 256-bit secret. ``repr`` and ``str`` never show it, and comparison takes constant time."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if not isinstance(secret, bytes | bytearray) or len(secret) != KEY_BYTES:
            got = f"{len(secret)} bytes" if isinstance(secret, bytes | bytearray) else type(secret).__name__
            raise _validate.fail("SecretKey", "32 bytes", got, "Was the key file cut short, or is it hexadecimal?")
        self._secret = bytes(secret)

    def to_bytes(self) -> bytes:
        """The 32 secret bytes: for a vault, never for a log."""
        return self._secret

    def to_words(self) -> "UInt32[np.ndarray, '8']":
        """The key in ChaCha20's form: eight little-endian words, shape [8]."""
        import numpy as np

        return np.frombuffer(self._secret, "<u4").astype(np.uint32)

    def __repr__(self) -> str:
        return "SecretKey(<hidden>)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretKey) and hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash((SecretKey, self._secret))


def new() -> SecretKey:
    """A fresh key from the operating system's entropy."""
    return SecretKey(os.urandom(KEY_BYTES))


def from_bytes(secret: bytes) -> SecretKey:
    """The key with these 32 bytes.

    Raises:
      SmarkError: when ``secret`` is not 32 bytes.
    """
    return SecretKey(secret)


def derive(key: SecretKey, *labels: str) -> SecretKey:
    """The key that HKDF-SHA256 (RFC 5869) derives for ``labels``: independent of ``key`` and of all other labels.

    Labels are joined with their lengths, so that ``("ab", "c")`` and ``("a", "bc")`` give different keys.

    Examples:
      >>> from smark_jax import keys
      >>> master = keys.from_bytes(bytes(32))
      >>> keys.derive(master, "resnet", "carrier") == keys.derive(master, "resnet", "code")
      False

    Raises:
      SmarkError: without labels, or when one is not a string.
    """
    if not labels or not all(isinstance(label, str) for label in labels):
        raise _validate.fail("derive", "at least one text label", repr(labels), 'Say what for: derive(key, "carrier").')
    info = b"smark-jax v1" + b"".join(len(t).to_bytes(4, "big") + t for t in (label.encode() for label in labels))
    return SecretKey(HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=info).derive(key.to_bytes()))


def commitment(key: SecretKey) -> str:
    """The SHA-256 of the key's 32 bytes, in hex.

    Publishing it before sale binds the owner to the key (collision resistance) and reveals nothing usable about it (256
    bits of entropy). Anyone who later sees the key can recompute the hash with ``sha256sum``.
    """
    return hashlib.sha256(key.to_bytes()).hexdigest()


def hashed_order(start: bytes, number: int) -> list[int]:
    """The numbers below ``number`` in the order of SHA-256(start, i as four bytes, big-endian), which nobody chooses.

    Examples:
      >>> from smark_jax import keys
      >>> sorted(keys.hashed_order(b"a suspect", 8))
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return sorted(range(number), key=lambda i: hashlib.sha256(start + i.to_bytes(4, "big")).digest())


def __getattr__(name: str) -> Any:
    # The keystream needs jax, which takes half a second to load; signing and deriving keys do not need it.
    if name == "keystream":
        from smark_jax import chacha

        return chacha.keystream
    raise AttributeError(f"module 'smark_jax.keys' has no attribute {name!r}")


def seal(key: SecretKey, content: bytes, about: bytes) -> bytes:
    """Encrypts and authenticates: a random nonce, then ChaCha20-Poly1305 (RFC 8439).

    Only the key can open or make such a content.

    Args:
      key: used for this purpose only.
      content: what to seal.
      about: a description of the content; it is authenticated but not stored.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key.to_bytes()).encrypt(nonce, content, about)


def unseal(key: SecretKey, sealed: bytes, about: bytes) -> bytes:
    """The content that :func:`seal` was given.

    Raises:
      cryptography.exceptions.InvalidTag: when it was sealed with another key or another ``about``, or was changed.
    """
    nonce, content = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
    if len(nonce) < _NONCE_BYTES:
        raise InvalidTag
    return ChaCha20Poly1305(key.to_bytes()).decrypt(nonce, content, about)
