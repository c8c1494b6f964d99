r"""Which pieces of a carrier evidence opens, and the proof that these were committed to.

The header of a commitment holds the root of a Merkle tree over the keys of the carrier's pieces
(:func:`smark_jax.carriers.piece_keys`); leaf p is the hash of ``b"piece "`` and the SHA-256 of key p. It is the same in
all commitments to a model.

For a suspect, the P pieces are put in the order of

.. math:: \text{SHA-256}(\text{"smark pieces v1\n"} \,\|\, \text{root} \,\|\, \text{content hash} \,\|\, p),

with p in four bytes, big-endian. Evidence opens the first eighth of them, the first quarter, the first half, or all:
the smallest share that suffices. The order depends on carrier and suspect alone, and never on a codeword, so an owner
has :data:`READINGS` readings to choose from and no more, and p-values always count them all.
"""

from collections.abc import Collection, Mapping

from smark_jax import carriers, keys
from smark_jax.vault import log, merkle, store, versions
from smark_jax.vault.documents import Bundle, Missing, Piece, Versions

_SHARES = (8, 4, 2, 1)
READINGS = len(_SHARES)
"""How many shares of a carrier may be tried: an eighth, a quarter, half and all."""
EVENT = "evidence exported"
"""The log's entries on bundles."""


def readings(named: Versions) -> int:
    """The number of shares of a carrier that p-values count: 1 where it has no pieces."""
    return READINGS if named.carrier in versions.IN_PIECES else 1


def root(carrier_key: keys.SecretKey) -> str:
    """The root over the keys of all pieces, in hex."""
    return merkle.root(_leaves(carriers.piece_keys(carrier_key))).hex()


def sizes(num_pieces: int) -> list[int]:
    """How many pieces each share has, rounded up, in order: of fewer than 8 pieces, the smallest part is one piece."""
    return sorted({-(-num_pieces // share) for share in _SHARES})


def order(root: str, content: str, num_pieces: int) -> list[int]:
    """The pieces in the order in which evidence on a suspect opens them.

    Args:
      root: over the pieces' keys, in hex.
      content: the suspect's content hash, in hex.
      num_pieces: P.
    """
    start = b"smark pieces v1\n" + bytes.fromhex(root) + bytes.fromhex(content)
    return keys.hashed_order(start, num_pieces)


def parts(root: str, content: str, num_pieces: int) -> list[tuple[int, ...]]:
    """The pieces of each share less than all, smallest first; none if there is a single piece."""
    pieces = order(root, content, num_pieces)
    return [tuple(sorted(pieces[:size])) for size in sizes(num_pieces)[:-1]]


def published(connection: store.Connection, model: str) -> set[int]:
    """The pieces that bundles on this model have opened so far, as the log says; all where one opened the carrier."""
    found = (entry.details.get("pieces") for entry in log.entries(connection, EVENT, model))
    return {piece for pieces in found for piece in (range(carriers.MOST_PIECES) if pieces is None else pieces)}


def opened(carrier_key: keys.SecretKey, pieces: Collection[int]) -> tuple[Piece, ...]:
    """These pieces' keys, each with its path to the root."""
    found, numbers = carriers.piece_keys(carrier_key), sorted(pieces)
    paths = merkle.paths(_leaves(found), numbers)
    return tuple(
        Piece(piece, found[piece].to_bytes().hex(), tuple(node.hex() for node in path))
        for piece, path in zip(numbers, paths, strict=True)
    )


def keys_of(bundle: Bundle) -> carriers.Keys:
    """The carrier key that a bundle opens, or the keys of pieces; unchecked."""
    if not isinstance(bundle.carrier_key, Missing):
        return _key(bundle.carrier_key)
    return {piece.index_: _key(piece.key) for piece in bundle.pieces or ()}


def wrong_keys(bundle: Bundle) -> str | None:
    """Describes what is wrong with the opened keys; None when each was committed to."""
    header = bundle.header
    if (header.algorithms.carrier in versions.IN_PIECES) != bool(header.pieces):
        return "the commitment names a carrier of pieces without their root, or the other way round"
    if isinstance(bundle.carrier_key, Missing) == (not bundle.pieces):
        return "the bundle opens neither the carrier nor a part of it, or both"
    if not isinstance(bundle.carrier_key, Missing):
        key = _key(bundle.carrier_key)
        if keys.commitment(key) != header.carrier_key:
            return "its key was not committed to: it is forged"
        if header.pieces and root(key) != header.pieces:
            return "its key is not the one that the pieces committed to come from"
        return None
    pieces = bundle.pieces or ()
    if not header.pieces or len({piece.index_ for piece in pieces}) != len(pieces):
        return "a piece is opened twice, or the carrier has none"
    for piece in pieces:
        hashed = _leaf(_key(piece.key))
        if not merkle.proves(hashed, piece.index_, carriers.MOST_PIECES, piece.path, str(header.pieces)):
            return f"the key of piece {piece.index_} was not committed to: it is forged"
    return None


def wrong_choice(bundle: Bundle, num_pieces: int) -> str | None:
    """Describes what is wrong with the opened pieces; None when they are a share in the order that the hash gives."""
    root = bundle.header.pieces
    if not bundle.pieces:
        return None
    if isinstance(root, Missing):
        return "the commitment names no pieces"
    numbers = sorted(piece.index_ for piece in bundle.pieces)
    allowed = sizes(num_pieces)[:-1]
    if len(numbers) not in allowed:
        listed = " or ".join(map(str, allowed)) or "none"
        return f"{len(numbers)} of {num_pieces} pieces are opened: it should be {listed}, or the whole carrier"
    if numbers != sorted(order(root, bundle.suspect.content, num_pieces)[: len(numbers)]):
        return "the opened pieces are not those that the hash of carrier and suspect names: the owner chose them"
    return None


def _leaves(by_piece: Mapping[int, keys.SecretKey]) -> list[bytes]:
    return [_leaf(by_piece[piece]) for piece in range(carriers.MOST_PIECES)]


def _leaf(key: keys.SecretKey) -> bytes:
    return merkle.leaf_hash(b"piece " + bytes.fromhex(keys.commitment(key)))


def _key(text: str) -> keys.SecretKey:
    return keys.from_bytes(bytes.fromhex(text))
