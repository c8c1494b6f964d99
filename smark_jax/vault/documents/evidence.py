"""Bundles of evidence, which an arbiter reads without trusting them."""

from typing import NamedTuple

from smark_jax import extraction, files
from smark_jax._documents import MISSING, Hash, Hex, Missing, Signature
from smark_jax.licence.documents import Challenge
from smark_jax.vault.documents.drafts import Drawn, OwnWord
from smark_jax.vault.documents.settings import Commitment, Header, Leaf, LeafRow
from smark_jax.vault.documents.verdicts import Reading


class Stamp(NamedTuple):
    """A time stamp: the time that it states, and the authority's response."""

    time: str
    response: Hex


class Stamped(NamedTuple):
    """A commitment with its time stamps."""

    commitment: Commitment
    timestamps: tuple[Stamp, ...]


class VerdictNamed(NamedTuple):
    """Which verdict a bundle is about."""

    number: int
    created: str
    occasion: int


class Exhibit(NamedTuple):
    """The suspect in a bundle, and how the owner read it."""

    sha256: Hash
    content: Hash
    format: str
    layout: tuple[files.Move, ...]
    alignment: str | None
    file: str
    reading: Reading
    left_out: tuple[extraction.LeftOut, ...] | Missing = MISSING
    log_maps: float | Missing = MISSING


class Opened(NamedTuple):
    """A customer's leaf with its path to the root of a commitment; by default the bundle's oldest one.

    Where words were drawn, the owner's own word stands beside it.
    """

    leaf: Leaf
    index_: int
    path: tuple[Hash, ...]
    commitment: int | Missing = MISSING
    own: OwnWord | Missing = MISSING


class Piece(NamedTuple):
    """An opened piece of the carrier: its number, its key, and the path from that key's hash to the header's root."""

    index_: int
    key: Hash
    path: tuple[Hash, ...]


class Claim(NamedTuple):
    """An accusation for the arbiter to recompute, with the other customers whose codewords are projected out first."""

    serial: int
    support: tuple[int, ...]
    statistic: float
    log10_p: float
    share: float


class Bundle(NamedTuple):
    """Evidence: what an arbiter needs to compute an accusation again.

    Either ``carrier_key`` opens the whole carrier, or ``pieces`` opens a part of it.
    """

    format: str
    version: int
    created: str
    smark_version: str
    commitment: Commitment
    timestamps: tuple[Stamp, ...]
    spec: tuple[LeafRow, ...]
    verdict: VerdictNamed
    suspect: Exhibit
    num_suspects: int
    num_alignments: int
    opened: tuple[Opened, ...]
    accused: tuple[Claim, ...]
    later: tuple[Stamped, ...] | Missing = MISSING
    num_customers: int | Missing = MISSING
    licences: tuple[Challenge, ...] | Missing = MISSING
    carrier_key: Hash | Missing = MISSING
    pieces: tuple[Piece, ...] | Missing = MISSING
    drawn: Drawn | Missing = MISSING

    @property
    def header(self) -> Header:
        """The header of the oldest commitment, by which the suspect is judged."""
        return self.commitment.header

    @property
    def chain(self) -> tuple[Stamped, ...]:
        """The commitments with their time stamps; each is the ``previous`` of the next."""
        return (Stamped(self.commitment, self.timestamps), *(self.later or ()))

    @property
    def customers(self) -> int:
        """How many customers p-values count: all that the verdict compared, and at least all that are committed to."""
        return max(self.num_customers or 0, *(item.commitment.header.customers for item in self.chain))

    def proved_by(self, opened: Opened) -> int:
        """The number of the commitment that covers an opened leaf."""
        return self.header.number if isinstance(opened.commitment, Missing) else opened.commitment


class Signed(NamedTuple):
    """A bundle's file."""

    bundle: Bundle
    signature: Signature
