"""Merkle trees as in Certificate Transparency (RFC 6962, section 2.1; path checking: RFC 9162, section 2.1.3.2).

A byte 0 precedes a leaf before hashing, a byte 1 an inner node, so that neither can pass for the other.
"""

import hashlib
from collections.abc import Iterator, Sequence

from smark_jax import _validate


def leaf_hash(data: bytes) -> bytes:
    """The hash of a leaf."""
    return hashlib.sha256(b"\0" + data).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over hashed leaves.

    Raises:
      SmarkError: when there are none.
    """
    *_, (top,) = _levels(leaves)
    return top


def paths(leaves: Sequence[bytes], indices: Sequence[int]) -> list[list[bytes]]:
    """For each index, the siblings from the leaf to the root, which prove that the leaf is under the root."""
    found: list[list[bytes]] = [[] for _ in indices]
    for height, level in enumerate(_levels(leaves)):
        for path, index in zip(found, indices, strict=True):
            if (other := index >> height ^ 1) < len(level):
                path.append(level[other])
    return found


def root_of_path(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a hashed leaf and its path lead to, in a tree of ``size`` leaves; None when they cannot.

    Args:
      leaf: its hash.
      index: its place, from 0.
      size: number of leaves.
      path: as from :func:`paths`.
    """
    if not 0 <= index < size:
        return None
    node, last, rest = leaf, size - 1, list(path)
    while last:
        if index % 2 or index < last:
            if not rest:
                return None
            other = rest.pop(0)
            node = _node(other, node) if index % 2 else _node(node, other)
        index, last = index // 2, last // 2
    return None if rest else node


def proves(leaf: bytes, index: int, size: int, path: Sequence[str], root: str) -> bool:
    """Whether a hashed leaf and its path, in hex as documents hold it, lead to this root; as :func:`root_of_path`."""
    found = root_of_path(leaf, index, size, [bytes.fromhex(node) for node in path])
    return found == bytes.fromhex(root)


def headed(leaves: Sequence[bytes]) -> tuple[tuple[str, ...], str]:
    """The path of the first leaf, which is the header's, and the root, both in hex; the tree is hashed once."""
    (path,) = paths(leaves, [0])
    top = root_of_path(leaves[0], 0, len(leaves), path)
    assert top is not None
    return tuple(node.hex() for node in path), top.hex()


def _levels(leaves: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The levels from the leaves up; a node without a sibling moves up unchanged, which gives RFC 6962's tree."""
    _validate.positive("merkle", "the number of leaves", len(leaves))
    level = leaves
    yield level
    while len(level) > 1:
        level = [*map(_node, level[:-1:2], level[1::2]), *level[len(level) - len(level) % 2 :]]
        yield level


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()
