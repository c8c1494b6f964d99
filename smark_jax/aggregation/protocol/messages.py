"""What parties and server send each other, and the signatures under it.

Every signature is Ed25519 over the round's context, the message's kind, its sender and the hash of its content, so that
no message counts in another round, for another task, at another stage, or from somebody else.
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


class Challenge(NamedTuple):
    """Server to a client that it does not know yet, before any round. Answer: :class:`Introduction`.

    ``nonce`` is fresh, 32 random bytes; ``session`` names the training run.
    """

    session: bytes
    nonce: bytes


class Introduction(NamedTuple):
    """An Ed25519 identity, and the proof that the sender holds its private key, now and at this address."""

    identity: bytes
    signature: bytes


class Keys(NamedTuple):
    """Stage "keys", party to server, who passes it on to all: this round's X25519 keys and a commitment to the seed."""

    party: int
    channel: bytes
    mask: bytes
    seed_hash: bytes
    signature: bytes


class Shares(NamedTuple):
    """Stage "shares", party to server, who passes on to each neighbour its shares, encrypted for it."""

    party: int
    sealed: Mapping[int, bytes]
    signature: bytes


class Masked(NamedTuple):
    """Stage "masked": the party's words under its masks, and the agreement that holds if nobody drops out now.

    ``task`` is the SHA-256 of all that the update was made from.
    """

    party: int
    words: UInt32[np.ndarray, " num_words"]
    task: bytes
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
            parts = [message.words.astype("<u4").tobytes(), message.task, message.agreement]
        case Reveal():
            both = (message.seeds, message.secrets)
            parts = [len(message.seeds), *(part for shares in both for v in sorted(shares) for part in (v, shares[v]))]
        case _:
            parts = []
    return hashlib.sha256(pack(*parts)).digest()


def agreement_content(task: bytes, survivors: tuple[int, ...]) -> bytes:
    """What an agreement signs: that these and no others survived, in a round with this task."""
    return hashlib.sha256(pack(task, *survivors)).digest()


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
            "It was altered, forged, replayed from another round, or made with other keys or for another task.",
        ) from None


def introduce(identity: keys.SecretKey, challenge: Challenge, address: int) -> Introduction:
    """Answers a challenge.

    Args:
      identity: the party's Ed25519 private key.
      challenge: the server's.
      address: where the party can be reached, such as Flower's node id: the proof is worth nothing elsewhere, so that
        nobody can pass a challenge on to a party and take the answer for his own.
    """
    private = ed25519.Ed25519PrivateKey.from_private_bytes(identity.to_bytes())
    return Introduction(identity_key(identity), private.sign(_introduction(challenge, address)))


def check_introduction(introduction: Introduction, challenge: Challenge, address: int) -> None:
    """Refuses an identity whose private key the sender has not shown to hold.

    Raises:
      ProtocolError: when the signature is not one on this challenge and address.
    """
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(introduction.identity)
        public.verify(introduction.signature, _introduction(challenge, address))
    except (InvalidSignature, ValueError):
        cause = "Somebody claims an identity whose key he does not hold, or repeats an old answer."
        got = f"another one, for {introduction.identity.hex()[:16]}..."
        raise refuse("hello", f"a signature on this challenge from address {address}", got, cause) from None


def _introduction(challenge: Challenge, address: int) -> bytes:
    return pack("smark-jax introduction v1", challenge.session, challenge.nonce, address)


def identity_key(identity: keys.SecretKey) -> bytes:
    """The Ed25519 public key (RFC 8032, 32 bytes) by which others know a party."""
    return ed25519.Ed25519PrivateKey.from_private_bytes(identity.to_bytes()).public_key().public_bytes_raw()
