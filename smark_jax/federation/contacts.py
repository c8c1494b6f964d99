"""Maps Flower's nodes to the identities that have proved in this run that they hold their private keys."""

import secrets
from collections.abc import Iterable
from logging import WARNING

from smark_jax.aggregation.protocol import ProtocolError, messages
from smark_jax.federation._log import log


class Contacts:
    """The server's address book.

    A public identity is not secret. Anybody who has read it could claim it, and would then get somebody else's
    fingerprinted copy. So each node must sign its own challenge; until then it has no identity.

    Args:
      session: random bytes that name the training run.
    """

    def __init__(self, session: bytes) -> None:
        self.identities: dict[int, bytes] = {}
        """The public identity of each node."""
        self.serials: dict[str, int] = {}
        """The serial of each public identity (in hexadecimal), in the order of first proof."""
        self._session = session
        self._open: dict[int, messages.Challenge] = {}

    def challenges(self, nodes: Iterable[int]) -> dict[int, messages.Challenge]:
        """A new challenge for every unknown node."""
        fresh = {
            n: messages.Challenge(self._session, secrets.token_bytes(32)) for n in nodes if n not in self.identities
        }
        self._open.update(fresh)
        return fresh

    def introduce(self, node: int, introduction: object) -> None:
        """Accepts a node's answer to its challenge.

        The newest proof counts: a participant who returns at another node takes over. A claim without proof changes
        nothing, neither for the node nor for the identity that it claims.
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
        """Makes a node introduce itself again, since it may have been restarted."""
        self.identities.pop(node, None)

    def serial(self, node: int) -> int:
        """The serial of the participant behind a node.

        Raises:
          KeyError: when the node is not known.
        """
        return self.serials[self.identities[node].hex()]
