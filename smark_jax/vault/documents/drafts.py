"""The draft of a model's words, and the public value that the issued words were drawn with."""

import hashlib
from typing import NamedTuple

from smark_jax import keys
from smark_jax._documents import MISSING, Hash, Hex, Missing, canonical
from smark_jax.vault.documents.settings import Versions


class DraftHeader(NamedTuple):
    """The first leaf of a draft's tree: what the words are for, and how many there are.

    All that a reading rests on is fixed here, before the public value is known: fields that a commitment's header has
    too hold the same there.
    """

    alpha: float
    base: Hash
    capacity: int
    carrier_key: Hash
    code_key: Hash
    created: str
    model: str
    num_chips: int
    public_key: Hash
    spec: Hash
    strength: float
    versions: Versions
    shape: Hash | Missing = MISSING


class Draft(NamedTuple):
    """A draft as it is published: the header, its path to the root, and the root over it and all own words."""

    format: str
    version: int
    header: DraftHeader
    header_path: tuple[Hash, ...]
    root: Hash

    @property
    def published(self) -> bytes:
        """The file for publication, whose SHA-256 a time stamp covers."""
        return canonical(self) + b"\n"


class Token(NamedTuple):
    """A time stamp of the draft: the time that it states, and the authority's response."""

    time: str
    response: Hex


class Beacon(NamedTuple):
    """A public source of randomness, and which of its values was taken."""

    name: str
    round: str


class Draw(NamedTuple):
    """The public value V, and either the time stamp whose signature it is, or the beacon that published it."""

    value: Hex
    token: Token | Missing = MISSING
    beacon: Beacon | Missing = MISSING

    @property
    def key(self) -> keys.SecretKey:
        """The key of the public words, SHA-256(V): no secret, but of the form that streams are drawn with."""
        return keys.from_bytes(hashlib.sha256(bytes.fromhex(self.value)).digest())


class Drawn(NamedTuple):
    """A draft and the draw that followed it."""

    draft: Draft
    draw: Draw


class OwnWord(NamedTuple):
    """The owner's own word of one serial, with its salt and its path to the draft's root."""

    word: Hex
    salt: Hash
    path: tuple[Hash, ...]
