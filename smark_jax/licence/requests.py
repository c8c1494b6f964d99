"""The first two steps: an owner's offer, and a customer's request under it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from smark_jax import _documents, _validate, errors, keys
from smark_jax.licence import deposits, documents, group, segments, transfer
from smark_jax.licence.documents import Arbiter, Offer, Request, SignedOffer, SignedRequest
from smark_jax.licence.identities import Identity

NUM_SEGMENTS, NUM_PARTS = 4096, 8
FEWEST, MOST = 64, 1 << 16
"""Of choices: with fewer, a part convicts nobody; with more, documents grow without use."""
MOST_ATTEMPTS = 8
"""After so many words for one owner that brought no copy, a customer draws none for it. A p-value pays for the number,
which the customer states: a large one would make every conviction fail."""
_LONGEST_TEXT = 200
# A sealed part is a public key, the secret that sealed it, the openings, and what authenticates them.
_SEALING = 32 + 32 + 16
_AGAIN = "Ask for the file again: it may have been changed, or be another one."


class Secrets(NamedTuple):
    """What a customer keeps of a request: without it the copy cannot be opened, nor a dispute be answered.

    Attributes:
      choices: of the segments.
      rest: the scalar of the key of the rest.
    """

    choices: transfer.Choices
    rest: bytes

    def __repr__(self) -> str:
        return "Secrets(<hidden>)"


class Made(NamedTuple):
    """A new request: the customer's secrets, what it signed, and the sealed parts of its deposit."""

    secrets: Secrets
    request: SignedRequest
    pieces: tuple[bytes, ...]


def scalar(key: keys.SecretKey) -> bytes:
    """The owner's scalar a, from a key that is used for one offer."""
    wide = b"".join(keys.derive(key, "transfer", half).to_bytes() for half in ("low", "high"))
    return group.scalar(wide)


def sign_offer(offer: Offer, signing: Ed25519PrivateKey) -> SignedOffer:
    """An offer with its owner's signature."""
    return SignedOffer(offer, documents.sign(signing, offer))


def check_offer(signed: SignedOffer) -> None:
    """Refuses an offer that its owner did not sign, or that asks for unusable numbers.

    Raises:
      SmarkError: with the reason.
    """
    offer = signed.offer
    _require(documents.genuine(offer.public_key, offer, signed.signature), "an offer that its owner signed", "another")
    _require(group.is_point(bytes.fromhex(offer.point)), "an offer with a point of the group", "another one")
    several = 1 <= offer.num_parts <= min(256, offer.num_segments) and offer.num_segments % offer.num_parts == 0
    numbers = f"{offer.num_segments} in {offer.num_parts} parts"
    _require(FEWEST <= offer.num_segments <= MOST and several, f"{FEWEST} to {MOST:,} choices in equal parts", numbers)
    _short(offer.created, offer.model, offer.customer)


def request(offer: SignedOffer, identity: Identity, attempt: int = 1, arbiter: Arbiter | None = None) -> Made:
    """Draws the customer's secret word, and hides it in a signed request.

    Args:
      offer: the owner's.
      identity: the customer's.
      attempt: one more than the words that the customer has drawn for this owner and that brought no copy: convictions
        pay for it.
      arbiter: whom to deposit the openings with.

    Raises:
      SmarkError: when the offer is unusable.
    """
    check_offer(offer)
    _validate.positive("licence", "attempt", attempt)
    owner = bytes.fromhex(offer.offer.point)
    choices, rest = transfer.draw(offer.offer.num_segments), group.random_scalar()
    sent, deposit, pieces = transfer.points(choices, owner), documents.MISSING, ()
    plain = Request(
        created=_documents.now(),
        offer=documents.digest(offer.offer),
        attempt=attempt,
        identity=identity.public.identity,
        points=sent.hex(),
        rest=group.times_base(rest).hex(),
    )
    if arbiter is not None:
        _check_arbiter(arbiter)
        found, about = parts(plain, offer.offer), undeposited(plain)
        sealed = [
            deposits.seal(arbiter, about, part, openings(choices, found.of_part(part)))
            for part in range(offer.offer.num_parts)
        ]
        pieces = tuple(sealed)
        deposit = documents.Deposit(arbiter, tuple(documents.sha256(piece) for piece in pieces))
    plain = plain._replace(deposit=deposit)
    signed = SignedRequest(offer, plain, documents.sign(identity.signing, plain))
    return Made(Secrets(choices, rest), signed, pieces)


def check(signed: SignedRequest, pieces: Sequence[bytes] | None = None) -> None:
    """Refuses a request that is not whole: signatures, points, numbers, deposit.

    Args:
      signed: the request.
      pieces: of its deposit; None where they are not at hand.

    Raises:
      SmarkError: with the reason.
    """
    check_offer(signed.offer)
    offer, found = signed.offer.offer, signed.request
    _require(
        documents.genuine(found.identity, found, signed.signature), "a request that its customer signed", "another"
    )
    _require(found.offer == documents.digest(offer), "a request under its offer", "one under another offer")
    points = transfer.split(bytes.fromhex(found.points))
    _require(len(points) == offer.num_segments, f"{offer.num_segments} points", f"{len(points)}")
    _require(1 <= found.attempt <= MOST_ATTEMPTS, f"attempt 1 to {MOST_ATTEMPTS}", f"attempt {found.attempt}")
    _short(found.created)
    _require(all(map(group.is_point, [bytes.fromhex(found.rest), *points])), "points of the group", "other bytes")
    _require(len(set(points)) == len(points), "points that are all different", "one that comes twice")
    wanted = ()
    if found.deposit:
        _check_arbiter(found.deposit.arbiter)
        wanted = found.deposit.pieces
        _require(len(wanted) == offer.num_parts, f"a deposit of {offer.num_parts} parts", f"{len(wanted)}")
    if pieces is not None:
        same = tuple(map(documents.sha256, pieces)) == wanted
        _require(same, "the deposit that the customer signed", "another one, or none")
        size = _sealed_size(offer)
        _require(all(len(piece) <= size for piece in pieces), f"sealed parts of at most {size:,} bytes", "longer ones")


def seed(signed: Request) -> bytes:
    """What permutes the segments: the hash of the points, which neither side chooses alone."""
    return bytes.fromhex(documents.sha256(bytes.fromhex(signed.offer) + bytes.fromhex(signed.points)))


def undeposited(signed: Request) -> bytes:
    """The digest of a request without its deposit: what the deposit's sealed parts belong to."""
    return bytes.fromhex(documents.digest(signed._replace(deposit=documents.MISSING)))


def parts(signed: Request, offer: Offer) -> segments.Segments:
    """Which segment belongs to which part; the members are those of a single run of coordinates."""
    return segments.draw(seed(signed), offer.num_segments, offer.num_segments, offer.num_parts)


def openings(choices: transfer.Choices, numbers: np.ndarray) -> bytes:
    """The scalars of these segments, then their bits, packed."""
    scalars = transfer.split(choices.scalars)
    return b"".join(scalars[i] for i in numbers.tolist()) + np.packbits(choices.bits[numbers]).tobytes()


def _sealed_size(offer: Offer) -> int:
    """The bytes of a deposit's sealed part; a false one may have fewer."""
    count = offer.num_segments // offer.num_parts
    return _SEALING + 32 * count + -(-count // 8)


def _short(*texts: str) -> None:
    """Evidence holds what a customer signed, and must stay small enough to be read."""
    longest = max(map(len, texts))
    _require(longest <= _LONGEST_TEXT, f"texts of at most {_LONGEST_TEXT} characters", f"one of {longest:,}")


def _check_arbiter(arbiter: Arbiter) -> None:
    usable = deposits.can_open(arbiter) and group.is_point(bytes.fromhex(arbiter.identity))
    _require(usable, "an arbiter with keys that open deposits and sign", "others")


def _require(holds: bool, expected: str, got: str) -> None:
    if not holds:
        raise _validate.fail("licence", expected, got, _AGAIN, kind=errors.SmarkError)
