"""The codewords that a bundle opens, each with its path to the root of the commitment that covers it."""

from collections.abc import Mapping, Sequence

from smark_jax import _validate
from smark_jax.vault import commitments, folder, merkle, store, timestamps
from smark_jax.vault.documents import Leaf, Opened, Stamp, Stamped


def under(vault: folder.Vault, model: str, shown: Sequence[int], newest: int, commitment: int | None) -> dict[int, int]:
    """The number of the commitment under which each serial's codeword is opened."""
    licensed = store.licences(vault.connection, model, shown)
    numbers = {serial: licensed[serial].number for serial in shown}
    if commitment is None:
        return numbers
    least = max(numbers.values())
    if not least <= commitment <= newest:
        licensed_with = " and ".join(map(str, sorted(set(numbers.values()))))
        cause = (
            f"Earlier ones lack an accused customer, and later ones were made after the suspect was seen. Without "
            f"--commitment, each codeword is opened under the one it was licensed with, here {licensed_with}."
        )
        expected = f"a commitment to {model} of number {least} to {newest}"
        raise _validate.fail("evidence", expected, f"number {commitment}", cause)
    return dict.fromkeys(shown, commitment)


def leaves(vault: folder.Vault, model: str, opened: Sequence[Leaf], under: Mapping[int, int]) -> list[Opened]:
    """The leaves with their paths to the roots of the commitments that cover them."""
    found = []
    for number in sorted(set(under.values())):
        commitment = commitments.get(vault, model, number)
        covered = store.leaves(vault.connection, model, number)
        tree = [commitments.header_leaf(commitment.header), *covered.values()]
        if merkle.root(tree).hex() != commitment.root:
            cause = "Restore the vault from your backup."
            raise _validate.fail("evidence", "the leaves that were committed to", "others", cause)
        index = {serial: place for place, serial in enumerate(covered, 1)}
        some = [leaf for leaf in opened if under[leaf.serial] == number]
        places = [index[leaf.serial] for leaf in some]
        for leaf, place, path in zip(some, places, merkle.paths(tree, places), strict=True):
            found.append(Opened(leaf, place, tuple(node.hex() for node in path), number))
    return found


def stamped(vault: folder.Vault, model: str, number: int) -> Stamped:
    """A commitment and its time stamps, as a bundle holds them."""
    commitment = commitments.get(vault, model, number)
    stamps = (Stamp(time, found.hex()) for time, found in timestamps.stored(vault, commitment))
    return Stamped(commitment, tuple(stamps))
