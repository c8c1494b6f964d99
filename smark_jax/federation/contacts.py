"""Who is behind which of Flower's nodes: identities that have shown their private key in this run."""

import secrets
from collections.abc import Iterable
from logging import WARNING

from smark_jax.aggregation.protocol import ProtocolError, messages
from smark_jax.federation._log import log


class Contacts:
    """The server's address book.

    A public identity is no secret: whoever has read it could claim it and be sent the fingerprinted copy of somebody
    else. So each node answers a challenge of its own with a signature, and until then it is nobody.

    Args:
      session: random bytes that name the training run.
    """

    def __init__(self, session: bytes) -> None:
        self.identities: dict[int, bytes] = {}
        """Public identity by node."""
        self.serials: dict[str, int] = {}
        """Serial by public identity in hexadecimal, in the order of first proof."""
        self._session = session
        self._open: dict[int, messages.Challenge] = {}

    def challenges(self, nodes: Iterable[int]) -> dict[int, messages.Challenge]:
        """A fresh challenge for every node that is not known."""
        fresh = {
            n: messages.Challenge(self._session, secrets.token_bytes(32)) for n in nodes if n not in self.identities
        }
        self._open.update(fresh)
        return fresh

    def introduce(self, node: int, introduction: object) -> None:
        """Takes a node's answer. The newest proof counts: an owner who comes back at another node takes over.

        A claim without proof changes nothing, for the node or for whom it claims to be.
        """
        challenge = self._open.pop(node, None)
        if challenge is None or not isinstance(introduction, messages.Introduction):
            return
        try:
            messages.check_introduction(introduction, challenge, node)
        except ProtocolError as error:
            log(WARNING, "Client %s stays unknown: %s", node, error)
            return
        for other in [n for n, identity in self.identities.items() if identity == introduction.identity]:
            log(WARNING, "Client %s takes over from client %s: both hold the same identity", node, other)
            del self.identities[other]
        self.identities[node] = introduction.identity
        self.serials.setdefault(introduction.identity.hex(), len(self.serials))

    def forget(self, node: int) -> None:
        """Has a node introduce itself anew: it may have been restarted."""
        self.identities.pop(node, None)

    def serial(self, node: int) -> int:
        """The serial of the participant behind a node.

        Raises:
          KeyError: when the node is not known.
        """
        return self.serials[self.identities[node].hex()]
