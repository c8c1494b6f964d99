"""What parties and server send each other, and the signatures under it.

Every signature is Ed25519 over the round's context, the message's kind, its sender and the hash of its content, so that
no message counts in another round, for another model, at another stage, or from somebody else.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519
from jaxtyping import UInt32

from smark_jax import keys
from smark_jax.aggregation.protocol.parameters import Setup, pack, refuse


class Keys(NamedTuple):
    """Stage "keys", party to server, and by it to all: X25519 keys of this round, and a commitment to the seed."""

    party: int
    channel: bytes
    mask: bytes
    seed_hash: bytes
    signature: bytes


class Shares(NamedTuple):
    """Stage "shares", party to server, and by it to each neighbour: that neighbour's shares, encrypted for it."""

    party: int
    sealed: Mapping[int, bytes]
    signature: bytes


class Masked(NamedTuple):
    """Stage "masked": the party's words under its masks, and the agreement that holds if nobody drops out now.

    ``model`` is the SHA-256 of the model that the party was given.
    """

    party: int
    words: UInt32[np.ndarray, " num_words"]
    model: bytes
    agreement: bytes
    signature: bytes


class Confirm(NamedTuple):
    """Stage "confirm", after somebody dropped out: the party agrees that these are the survivors."""

    party: int
    agreement: bytes


class Reveal(NamedTuple):
    """Stage "unmask": shares of the survivors' seeds, and of the mask secrets of those who dropped out."""

    party: int
    seeds: Mapping[int, bytes]
    secrets: Mapping[int, bytes]
    signature: bytes


class ShareRequest(NamedTuple):
    """Server to party: everybody's keys. The party answers with :class:`Shares`."""

    advertised: Mapping[int, Keys]


class MaskRequest(NamedTuple):
    """Server to party: who shared, and what the neighbours sealed for it. Answer: :class:`Masked`."""

    members: tuple[int, ...]
    sealed: Mapping[int, bytes]


class ConfirmRequest(NamedTuple):
    """Server to party: whose words arrived. Answer: :class:`Confirm`."""

    survivors: tuple[int, ...]


class UnmaskRequest(NamedTuple):
    """Server to party: the survivors and their agreements. Answer: :class:`Reveal`."""

    survivors: tuple[int, ...]
    agreements: Mapping[int, bytes]


Message = Keys | Shares | Masked | Confirm | Reveal
Request = ShareRequest | MaskRequest | ConfirmRequest | UnmaskRequest


def transcript(setup: Setup, advertised: Mapping[int, Keys]) -> bytes:
    """SHA-256 of everybody's keys of this round: whoever agrees on it agrees on the graph and on all public keys."""
    parts = [part for party in sorted(advertised) for part in (party, *advertised[party][1:4])]
    return hashlib.sha256(pack(setup.context, *parts)).digest()


def content(message: Message) -> bytes:
    """The hash that a message's signature covers, besides context, kind and sender."""
    match message:
        case Keys():
            parts = [message.channel, message.mask, message.seed_hash]
        case Shares():
            parts = [part for v in sorted(message.sealed) for part in (v, message.sealed[v])]
        case Masked():
            parts = [message.words.astype("<u4").tobytes(), message.model, message.agreement]
        case Reveal():
            both = (message.seeds, message.secrets)
            parts = [len(message.seeds), *(part for shares in both for v in sorted(shares) for part in (v, shares[v]))]
        case _:
            parts = []
    return hashlib.sha256(pack(*parts)).digest()


def agreement_content(model: bytes, survivors: tuple[int, ...]) -> bytes:
    """What an agreement signs: that these and no others survived, in a round with this model."""
    return hashlib.sha256(pack(model, *survivors)).digest()


def sign(identity: keys.SecretKey, setup: Setup, kind: str, bound: bytes, party: int, digest: bytes) -> bytes:
    """An Ed25519 signature of 64 bytes.

    Args:
      identity: the party's private key.
      setup: the round.
      kind: of message.
      bound: the transcript of keys, or nothing before there is one.
      party: the sender.
      digest: hash of the content.
    """
    private = ed25519.Ed25519PrivateKey.from_private_bytes(identity.to_bytes())
    return private.sign(pack(setup.context, kind, bound, party, digest))


def verify(setup: Setup, kind: str, bound: bytes, party: int, digest: bytes, signature: bytes) -> None:
    """Refuses a signature that this party did not make for this round, kind, transcript and content.

    Raises:
      ProtocolError: when it does not verify, or the party is not on the roster.
    """
    if not 0 <= party < len(setup.roster):
        cause = "Was the message sent to another round?"
        raise refuse(kind, f"a party of the roster, 0 to {len(setup.roster) - 1}", str(party), cause)
    public = ed25519.Ed25519PublicKey.from_public_bytes(setup.roster[party])
    try:
        public.verify(signature, pack(setup.context, kind, bound, party, digest))
    except InvalidSignature:
        raise refuse(
            kind,
            f"party {party}'s signature on this message in round {setup.round}",
            "another signature",
            "The message was altered, forged, replayed from another round, or made with other keys or another model.",
        ) from None


def identity_key(identity: keys.SecretKey) -> bytes:
    """The Ed25519 public key (RFC 8032, 32 bytes) by which others know a party."""
    return ed25519.Ed25519PrivateKey.from_private_bytes(identity.to_bytes()).public_key().public_bytes_raw()
