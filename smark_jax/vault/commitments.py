"""The commitment that the owner publishes before selling a copy: one hash of everything an accusation will rest on.

The hash is the root of a Merkle tree. Its first leaf is the header: the hashes of carrier key and base, the root over
the keys of the carrier's pieces, the level, the versions of all algorithms, the number of customers, the key that will
sign evidence, and, where a public value drew the codewords, the draft's root and the hash of that value
(:mod:`smark_jax.vault.drafts`). Each further leaf holds one customer's name, serial and codeword with a salt. So the
root reveals nothing about customers or codewords, and a leaf can be opened without the others.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from smark_jax import _io, _validate, keys
from smark_jax.vault import documents, drafts, folder, merkle, models, store
from smark_jax.vault.customers import Customer
from smark_jax.vault.documents import Commitment, Header, Leaf

FORMAT, VERSION = "smark commitment", 1
_LEAVES_PER_PASS = 4096


def open_leaves(model: models.OpenModel, customers: Sequence[Customer]) -> list[Leaf]:
    """Customers' leaves in the clear."""
    words = model.words([customer.serial for customer in customers])
    salts = keys.derive(model.vault.master, model.name, "salt")
    return [
        Leaf(
            customer=customer.name,
            salt=keys.derive(salts, str(customer.serial)).to_bytes().hex(),
            serial=customer.serial,
            word=bits.tobytes().hex(),
        )
        for customer, bits in zip(customers, np.packbits(words < 0, axis=1), strict=True)
    ]


def leaf(opened: Leaf) -> bytes:
    """The hash of an opened leaf."""
    return merkle.leaf_hash(b"customer " + documents.canonical(opened))


def header_leaf(header: Header) -> bytes:
    """The hash of the header."""
    return merkle.leaf_hash(b"header " + documents.canonical(header))


def word(opened: Leaf, num_chips: int) -> np.ndarray:
    """The codeword in an opened leaf, float64 signs of shape [m]."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(opened.word), np.uint8), count=num_chips)
    return 1.0 - 2.0 * bits


def leaves(model: models.OpenModel, customers: Sequence[Customer]) -> list[bytes]:
    """The hashed leaves of these customers, in their order."""
    parts = (customers[start : start + _LEAVES_PER_PASS] for start in range(0, len(customers), _LEAVES_PER_PASS))
    return [leaf(opened) for part in parts for opened in open_leaves(model, part)]


def build(model: models.OpenModel, hashed: Sequence[bytes]) -> Commitment:
    """The next commitment to a model, over the leaves of all its customers in the order of their serials."""
    vault = model.vault
    before = latest(vault, model.name)
    header = Header(
        **drafts.common(model),
        customers=len(hashed),
        number=before.number + 1 if before else 1,
        previous=before.root if before else None,
        probes_key=keys.commitment(models.probes_key(vault, model.name)),
        pieces=models.pieces_root(vault, model.name, model.settings.versions) or documents.MISSING,
        draw=drafts.named(model),
    )
    tree = [header_leaf(header), *hashed]
    return Commitment(FORMAT, VERSION, header, *merkle.headed(tree))


def row(commitment: Commitment) -> store.Commitment:
    """A commitment as the vault stores it."""
    return store.Commitment(commitment.model, commitment.number, commitment.root, documents.text(commitment))


def _stored(row: store.Commitment) -> Commitment:
    return documents.stored(Commitment, row.document)


def latest(vault: folder.Vault, model: str) -> Commitment | None:
    """A model's newest commitment; None before the first issue."""
    row = store.latest_commitment(vault.connection, model)
    return _stored(row) if row else None


def get(vault: folder.Vault, model: str, number: int) -> Commitment:
    """A model's commitment of this number.

    Raises:
      SmarkError: when there is none.
    """
    row = store.commitment(vault.connection, model, number)
    if row is None:
        newest = latest(vault, model)
        cause = f"The newest is number {newest.number}." if newest else "'smark issue' makes the first."
        raise _validate.fail("vault", f"a commitment to {model}", f"number {number}, which does not exist", cause)
    return _stored(row)


def write_all(vault: folder.Vault) -> None:
    """Writes any missing files for publication into the vault's folder ``commitments``."""
    for row in store.commitments(vault.connection):
        commitment = _stored(row)
        path = file(vault, commitment)
        if not path.exists():
            _io.write(path, commitment.published, private=True)


def file(vault: folder.Vault, commitment: Commitment) -> Path:
    """Where a commitment's file for publication is."""
    return vault.folder / folder.COMMITMENTS / f"{commitment.model}-{commitment.number}.json"
