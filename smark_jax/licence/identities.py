"""Who signs: a customer's or an arbiter's long-term keys, derived from one secret."""

from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from smark_jax import keys
from smark_jax.licence.documents import Arbiter


class Identity(NamedTuple):
    """A person's secret; its keys are derived from it."""

    secret: keys.SecretKey

    @property
    def signing(self) -> Ed25519PrivateKey:
        """Signs requests and answers."""
        return Ed25519PrivateKey.from_private_bytes(keys.derive(self.secret, "licence signing").to_bytes())

    @property
    def opening(self) -> X25519PrivateKey:
        """Opens deposits that were sealed to this person."""
        return X25519PrivateKey.from_private_bytes(keys.derive(self.secret, "licence deposits").to_bytes())

    @property
    def public(self) -> Arbiter:
        """Both public keys. A customer's first one is what its requests name."""
        signing, opening = (key.public_key().public_bytes_raw().hex() for key in (self.signing, self.opening))
        return Arbiter(signing, opening)
