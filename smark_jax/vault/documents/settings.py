"""What a model fixes once and for all, and the commitments that bind it."""

from typing import NamedTuple

from smark_jax import carriers
from smark_jax.vault.documents.codec import MISSING, Hash, Hex, Missing, canonical


class Versions(NamedTuple):
    """The algorithms that a model's copies are made and traced with, ``"name/version"`` each.

    A document that names none is of the time when there was one of each, which are the defaults.

    Attributes:
      cipher: draws codewords, carriers and all other secrets.
      carrier: which direction of weight space is which chip.
      code: codewords from the code key.
      decoder: how verdicts are reached.
      shape: how strongly which weights are marked; null where all leaves are marked alike.
    """

    cipher: str = "chacha20/1"
    carrier: str = "hadamard/1"
    code: str = "signs/1"
    decoder: str = "joint/1"
    shape: str | None = None


LeafRow = tuple[str, tuple[int, ...], float]
"""A carrying leaf: path, shape, scale."""


class Model(NamedTuple):
    """A model's settings as they are stored."""

    name: str
    base: Hash
    spec: tuple[LeafRow, ...]
    num_chips: int
    alpha: float
    strength: float
    created: str
    public: Hash | Missing | None = MISSING
    versions: Versions | Missing = MISSING


class Header(NamedTuple):
    """The first leaf of a commitment's tree: all that an accusation rests on but the codewords."""

    alpha: float
    base: Hash
    carrier_key: Hash
    created: str
    customers: int
    model: str
    num_chips: int
    number: int
    previous: str | None
    probes_key: Hash
    public_key: Hash
    spec: Hash
    strength: float
    decoder: str | Missing = MISSING
    decoder_version: int | Missing = MISSING
    versions: Versions | Missing = MISSING

    @property
    def algorithms(self) -> Versions:
        """The versions that are committed to; older headers named the decoder's alone."""
        if self.versions:
            return self.versions
        decoder = f"{self.decoder}/{self.decoder_version}" if self.decoder else Versions().decoder
        return Versions(decoder=decoder)


class Commitment(NamedTuple):
    """A commitment as it is published: the header, its path to the root, and the root."""

    format: str
    version: int
    header: Header
    header_path: tuple[Hash, ...]
    root: Hash

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.header.model

    @property
    def number(self) -> int:
        """From 1, one more with each issue."""
        return self.header.number

    @property
    def published(self) -> bytes:
        """The file for publication, whose SHA-256 a time stamp covers."""
        return canonical(self) + b"\n"


class Leaf(NamedTuple):
    """A customer's leaf in the clear; the codeword has a bit of 1 for a chip of -1."""

    customer: str
    salt: Hash
    serial: int
    word: Hex


def rows(spec: carriers.Spec) -> tuple[LeafRow, ...]:
    """The carrying leaves as documents hold them."""
    return tuple((leaf.path, leaf.shape, float(scale)) for leaf, scale in zip(spec.leaves, spec.scales, strict=True))


def spec(rows: tuple[LeafRow, ...]) -> carriers.Spec:
    """The carrying leaves of a document."""
    leaves = tuple(carriers.Leaf(path, shape) for path, shape, _ in rows)
    return carriers.Spec(leaves, tuple(scale for _, _, scale in rows))
