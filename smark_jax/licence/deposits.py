"""Deposits: a customer's openings, sealed to an arbiter part by part, so that a refusal to open does not end a dispute.

A part is sealed by X25519 with an ephemeral key, HKDF-SHA256, and ChaCha20-Poly1305. The sealed text begins with the
ephemeral secret. So an arbiter that opens it can show anybody what the customer deposited: sealed again, it gives the
same bytes, whose hash the customer signed.

It opens under the customer's own request alone. The owner, who holds all sealed parts, could otherwise have a friend
deposit them as its own, and learn the customer's word from the arbiter's answer.
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from smark_jax import keys
from smark_jax.licence.documents import Arbiter
from smark_jax.licence.identities import Identity

_NONCE = bytes(12)  # each key seals once


def can_open(arbiter: Arbiter) -> bool:
    """Whether a key of deposits is one: some, of small order, agree on the same secret with everybody."""
    try:
        seal(arbiter, b"", 0, b"", bytes(32))
    except ValueError:
        return False
    return True


def seal(arbiter: Arbiter, request: bytes, part: int, openings: bytes, ephemeral: bytes | None = None) -> bytes:
    """One part's openings, sealed.

    Args:
      arbiter: whom to seal it to.
      request: the digest of the request without its deposit.
      part: the part's number.
      openings: the scalars, then the packed bits.
      ephemeral: the secret to seal with; a fresh one unless a deposit is checked.

    Raises:
      ValueError: when the arbiter's key is not one.
    """
    secret = keys.new().to_bytes() if ephemeral is None else ephemeral
    own = X25519PrivateKey.from_private_bytes(secret)
    public = own.public_key().public_bytes_raw()
    shared = own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(arbiter.deposits)))
    return public + _cipher(shared, public, arbiter, request, part).encrypt(_NONCE, secret + openings, None)


def unseal(identity: Identity, request: bytes, part: int, sealed: bytes) -> tuple[bytes, bytes] | None:
    """The ephemeral secret and the openings; None when :func:`seal` did not make this for this arbiter and request."""
    public, text = sealed[:32], sealed[32:]
    try:
        shared = identity.opening.exchange(X25519PublicKey.from_public_bytes(public))
        plain = _cipher(shared, public, identity.public, request, part).decrypt(_NONCE, text, None)
    except (InvalidTag, ValueError):
        return None
    ephemeral, openings = plain[:32], plain[32:]
    again = len(ephemeral) == 32 and seal(identity.public, request, part, openings, ephemeral) == sealed
    return (ephemeral, openings) if again else None


def _cipher(shared: bytes, public: bytes, arbiter: Arbiter, request: bytes, part: int) -> ChaCha20Poly1305:
    about = public + bytes.fromhex(arbiter.deposits) + request + part.to_bytes(4, "big")
    info = b"smark licence deposit v1" + about
    return ChaCha20Poly1305(HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(shared))
