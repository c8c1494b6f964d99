"""What the owner publishes before a copy is sold: one hash over all that an accusation will rest on.

The root of a Merkle tree. Its first leaf is the header: the hashes of carrier key and base, the level, the decoder, the
number of customers and the key that will sign evidence. Each further leaf holds one customer's name, serial and
codeword, salted, so that the root tells nothing about customers or codewords, and one leaf can be opened alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _io, _validate, codes, keys
from smark_jax.vault import _text, crypto, folder, merkle, models, store
from smark_jax.vault.customers import Customer

FORMAT, VERSION = "smark commitment", 1
_LEAVES_PER_PASS = 4096


class Commitment(NamedTuple):
    """A commitment as it is published.

    Attributes:
      model: name of the model.
      number: from 1, one more with each issue.
      root: of the tree, in hex: what to publish at least.
      document: the canonical JSON text of ``{"format", "version", "header", "header_path", "root"}``.
    """

    model: str
    number: int
    root: str
    document: str

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Commitment":
        """The commitment of a document."""
        header = content["header"]
        return cls(header["model"], header["number"], content["root"], _text.canonical(content).decode())

    @property
    def content(self) -> dict[str, Any]:
        """The document."""
        return json.loads(self.document)

    @property
    def header(self) -> dict[str, Any]:
        """The first leaf."""
        return self.content["header"]

    @property
    def published(self) -> bytes:
        """The file for publication, whose SHA-256 a time stamp covers."""
        return self.document.encode() + b"\n"


def open_leaves(vault: folder.Vault, model: models.Model, customers: Sequence[Customer]) -> list[dict[str, Any]]:
    """Customers' leaves in the clear: name, serial, codeword (bit 1 for a chip of -1), and the salt."""
    serials = [customer.serial for customer in customers]
    words = np.asarray(codes.codebook(models.code_key(vault, model.name), serials, model.num_chips))
    salts = keys.derive(vault.master, model.name, "salt")
    return [
        {
            "customer": customer.name,
            "salt": keys.derive(salts, str(customer.serial)).to_bytes().hex(),
            "serial": customer.serial,
            "word": bits.tobytes().hex(),
        }
        for customer, bits in zip(customers, np.packbits(words < 0, axis=1), strict=True)
    ]


def leaf(opened: dict[str, Any]) -> bytes:
    """The hash of an opened leaf."""
    return merkle.leaf_hash(b"customer " + _text.canonical(opened))


def header_leaf(header: dict[str, Any]) -> bytes:
    """The hash of the header."""
    return merkle.leaf_hash(b"header " + _text.canonical(header))


def word(opened: dict[str, Any], num_chips: int) -> np.ndarray:
    """The codeword in an opened leaf, float64 signs of shape [m]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(opened["word"]), np.uint8), count=num_chips)
    return 1.0 - 2.0 * bits


def leaves(vault: folder.Vault, model: models.Model, customers: Sequence[Customer]) -> list[bytes]:
    """The hashed leaves of these customers, in their order."""
    parts = (customers[start : start + _LEAVES_PER_PASS] for start in range(0, len(customers), _LEAVES_PER_PASS))
    return [leaf(opened) for part in parts for opened in open_leaves(vault, model, part)]


def build(vault: folder.Vault, model: models.Model, hashed: Sequence[bytes]) -> Commitment:
    """The next commitment to a model, over the leaves of all its customers in the order of their serials."""
    before = latest(vault, model.name)
    number = before.number + 1 if before else 1
    header = {
        "alpha": model.alpha,
        "base": model.base,
        "carrier_key": keys.commitment(models.carrier_key(vault, model.name)),
        "created": _text.now(),
        "customers": len(hashed),
        "decoder": models.DECODER,
        "decoder_version": models.DECODER_VERSION,
        "model": model.name,
        "num_chips": model.num_chips,
        "number": number,
        "previous": before.root if before else None,
        "probes_key": keys.commitment(models.probes_key(vault, model.name)),
        "public_key": crypto.public_key(vault.master),
        "spec": models.spec_digest(model.spec),
        "strength": model.strength,
    }
    tree = [header_leaf(header), *hashed]
    (path,) = merkle.paths(tree, [0])
    content = {"format": FORMAT, "version": VERSION, "header": header, "root": merkle.root(tree).hex()}
    return Commitment.of({**content, "header_path": [node.hex() for node in path]})


def latest(vault: folder.Vault, model: str) -> Commitment | None:
    """A model's newest commitment; None before the first issue."""
    row = store.latest_commitment(vault.connection, model)
    return Commitment(*row) if row else None


def get(vault: folder.Vault, model: str, number: int) -> Commitment:
    """A model's commitment of this number.

    Raises:
      SmarkError: when there is none.
    """
    row = store.commitment(vault.connection, model, number)
    if row is None:
        newest = latest(vault, models.get(vault, model).name)
        cause = f"The newest is number {newest.number}." if newest else "'smark issue' makes the first."
        raise _validate.fail("vault", f"a commitment to {model}", f"number {number}, which there is not", cause)
    return Commitment(*row)


def write_all(vault: folder.Vault) -> None:
    """Writes the files for publication that are missing, into the vault's folder ``commitments``."""
    for row in store.commitments(vault.connection):
        commitment = Commitment(*row)
        path = file(vault, commitment)
        if not path.exists():
            _io.write(path, commitment.published, private=True)


def file(vault: folder.Vault, commitment: Commitment) -> Path:
    """Where a commitment's file for publication is."""
    return vault.folder / folder.COMMITMENTS / f"{commitment.model}-{commitment.number}.json"
