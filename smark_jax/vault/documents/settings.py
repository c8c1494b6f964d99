"""A model's settings, which never change, and the commitments that bind them."""

from typing import NamedTuple

from smark_jax import carriers
from smark_jax._documents import MISSING, Hash, Hex, Missing, canonical


class Versions(NamedTuple):
    """The algorithms that make and trace a model's copies, each as ``"name/version"``.

    A document that names none dates from when there was only one of each; these are the defaults.

    Attributes:
      cipher: the cipher that codewords, carriers and all other secrets are drawn with.
      carrier: assigns a direction of weight space to each chip.
      code: derives codewords from the code key.
      decoder: reaches verdicts.
      shape: how a stored shape distributes strength over the weights, and so how suspects are read; null when all
        leaves are marked alike.
    """

    cipher: str = "chacha20/1"
    carrier: str = "hadamard/1"
    code: str = "signs/1"
    decoder: str = "joint/1"
    shape: str | None = None


LeafRow = tuple[str, tuple[int, ...], float]
"""A carrying leaf: path, shape, scale."""


class Shape(NamedTuple):
    """The shape of a model's mark, whose arrays are in a file.

    Attributes:
      digest: of the shape, by which its file is found and checked.
      images: how many images it was made from; 0 when it follows from the weights alone.
      change: relative change of the logits in copies of the model's own strength; null when nobody measured it.
    """

    digest: Hash
    images: int
    change: float | None


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
    shape: Shape | Missing | None = MISSING
    form: str | Missing = MISSING


class DrawNamed(NamedTuple):
    """What codewords were drawn from: the draft's root, and the SHA-256 of the public value, the public words' key."""

    root: Hash
    value: Hash


class Header(NamedTuple):
    """The first leaf of a commitment's tree: everything that an accusation rests on, except the codewords.

    ``pieces`` is the Merkle root over the keys of the carrier's pieces (:mod:`smark_jax.vault.openings`); it is missing
    where the carrier has none.
    """

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
    shape: Hash | Missing = MISSING
    pieces: Hash | Missing = MISSING
    draw: DrawNamed | Missing = MISSING

    @property
    def algorithms(self) -> Versions:
        """The committed versions; older headers named only the decoder's."""
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
        """The number of the commitment, from 1; each issue with new customers adds one."""
        return self.header.number

    @property
    def published(self) -> bytes:
        """The file for publication, whose SHA-256 a time stamp covers."""
        return canonical(self) + b"\n"


class Leaf(NamedTuple):
    """A customer's leaf in plaintext; in its codeword, a bit of 1 stands for a chip of -1."""

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
