r"""Conviction: whether a suspect carries the secret word of whom tracing has named.

The accused opens :math:`(b_i, c_i)` of a part. Anybody checks them against the signed points, reads :math:`z_i` of the
part's segments, and computes

.. math:: T_c = \langle z, c \rangle / |z|, \qquad p = p(T_c \mid z) \cdot P \cdot q (q + 1)

with the bound T1+ of :mod:`smark_jax.statistics`, P parts, each of which one dispute may open, and the word
of attempt q: before it, q - 1 words that the customer drew for this owner brought it no copy.

Formal guarantee (T4, no framing). For every owner and every suspect, base, mark and key that it names: if nothing that
was computed from the customer's copy reached the owner, then c is uniform given z, so that

.. math:: P(\text{convicted in any dispute at level } \alpha) \le \alpha.

The owner's view holds only points that are uniform whatever c is. A dispute opens parts that no earlier one opened, so
what the owner learned before says nothing of them. An owner may spoil packages until a word survives that suits it.
For the word of attempt q, z may then depend on its survival alone: the probability that it survives and convicts is at
most that of T1 for the z that is chosen upon survival. Summed over all attempts, the factors
:math:`1 / (q (q + 1))` give 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from smark_jax import _documents, _validate, keys, statistics
from smark_jax.carriers import Mark
from smark_jax.licence import deposits, documents, requests, segments, transfer
from smark_jax.licence.documents import Answer, Challenge, Opened, SignedAnswer, SignedRequest
from smark_jax.licence.identities import Identity

_AGAIN = "Ask its author for the file again: it may have been changed, or be another one."


class Conviction(NamedTuple):
    """How well a suspect fits the accused's secret word.

    Attributes:
      statistic: T_c.
      log10_p: logarithm to base 10 of its p-value, all disputes and attempts counted.
      segments: how many segments were opened.
      fraction: that number as a share of the word.
    """

    statistic: float
    log10_p: float
    segments: int
    fraction: float


def order(suspect: str, request: SignedRequest) -> list[int]:
    """The order in which a dispute about this suspect opens a licence's parts: by a hash that nobody chooses.

    Args:
      suspect: the content hash of the suspect, in hex.
      request: the accused's.
    """
    about = bytes.fromhex(suspect) + bytes.fromhex(documents.digest(request.request))
    return keys.hashed_order(b"smark licence parts v1" + about, request.offer.offer.num_parts)


def check_challenge(challenge: Challenge, suspect: str) -> None:
    """Refuses a challenge that is not whole, or asks for other parts than the hash names.

    Args:
      challenge: the owner's.
      suspect: the content hash of the suspect.

    Raises:
      SmarkError: with the reason.
    """
    requests.check(challenge.request)
    earlier = [one.part for one in challenge.earlier]
    left = [part for part in order(suspect, challenge.request) if part not in earlier]
    wanted = tuple(left[: len(challenge.parts)])
    _require(len(set(earlier)) == len(earlier), "earlier parts that are all different", "one that comes twice")
    _require(set(earlier) <= set(order(suspect, challenge.request)), "earlier parts of this licence", "others")
    _require(0 < len(challenge.parts) <= len(left), "at least one part, and no more than are left", "others")
    _require(challenge.parts == wanted, f"the parts {_listed(wanted)}, which the hash names", _listed(challenge.parts))
    _require(len(challenge.keys) == len(wanted), "a key for each part", f"{len(challenge.keys)}")
    deposit = challenge.request.request.deposit
    hashes = tuple(deposit.pieces[part] for part in wanted) if deposit and challenge.pieces else ()
    found = tuple(documents.sha256(bytes.fromhex(piece)) for piece in challenge.pieces)
    _require(found == hashes, "the sealed parts that were deposited", "others")


def answer(challenge: Challenge, bundle: str, choices: transfer.Choices, identity: Identity) -> SignedAnswer:
    """The customer's openings of the parts that a checked challenge asks for.

    Args:
      challenge: from the bundle.
      bundle: the bundle's digest.
      choices: the customer's.
      identity: the customer's.
    """
    found = requests.parts(challenge.request.request, challenge.request.offer.offer)
    size = 32 * found.number // challenge.request.offer.offer.num_parts
    opened = []
    for part in challenge.parts:
        text = requests.openings(choices, found.of_part(part))
        opened.append(Opened(part, text[:size].hex(), text[size:].hex()))
    return _signed(challenge, bundle, tuple(opened), identity)


def answer_deposit(challenge: Challenge, bundle: str, identity: Identity) -> SignedAnswer:
    """The openings that the accused deposited with this arbiter.

    Raises:
      SmarkError: when nothing was deposited with this arbiter, or the deposit cannot be opened.
    """
    deposit = challenge.request.request.deposit
    if not deposit or deposit.arbiter != identity.public or not challenge.pieces:
        cause = (
            "Only the arbiter whom the request names can open a deposit; the accused itself answers with its wallet."
        )
        raise _validate.fail("licence", "a deposit with this arbiter", "none", cause)
    size = 32 * challenge.request.offer.offer.num_segments // challenge.request.offer.offer.num_parts
    opened = []
    about = requests.undeposited(challenge.request.request)
    for part, piece in zip(challenge.parts, challenge.pieces, strict=True):
        plain = deposits.unseal(identity, about, part, bytes.fromhex(piece))
        if plain is None:
            cause = "The customer signed the hash of a text that this arbiter cannot open: state that as your finding."
            raise _validate.fail("licence", "a deposit that opens", f"part {part}, which does not", cause)
        ephemeral, text = plain
        opened.append(Opened(part, text[:size].hex(), text[size:].hex(), ephemeral.hex()))
    return _signed(challenge, bundle, tuple(opened), identity)


def _signed(challenge: Challenge, bundle: str, opened: tuple[Opened, ...], identity: Identity) -> SignedAnswer:
    request = documents.digest(challenge.request.request)
    plain = Answer(_documents.now(), bundle, request, identity.public.identity, opened)
    return SignedAnswer(plain, documents.sign(identity.signing, plain))


def opened_word(challenge: Challenge, signed: SignedAnswer, bundle: str) -> dict[int, np.ndarray]:
    """The opened chips of each part, shape [n / P] of -1 and +1.

    Raises:
      SmarkError: when the answer is to another bundle or request, is signed by nobody who may open, opens other parts,
        or does not fit the points that the customer signed.
    """
    found, request, offer = signed.answer, challenge.request.request, challenge.request.offer.offer
    _require(documents.genuine(found.key, found, signed.signature), "an answer that its author signed", "another")
    _require(found.bundle == bundle, "an answer to this bundle", "one to another bundle")
    _require(found.request == documents.digest(request), "an answer for this request", "one for another request")
    arbiter = request.deposit.arbiter.identity if request.deposit else None
    _require(found.key in (request.identity, arbiter), "the key of the accused, or of its arbiter", "another key")
    _require(tuple(one.part for one in found.opened) == challenge.parts, f"parts {_listed(challenge.parts)}", "others")
    segments_of, words = requests.parts(request, offer), {}
    for one in found.opened:
        deposited = found.key != request.identity
        if deposited:
            _check_deposited(challenge, one)
        bits = _bits(challenge.request, one, segments_of.of_part(one.part))
        if bits is None:
            got = "a deposit that does not fit them" if deposited else "others"
            accused = "The accused deposited false openings, as anybody can check: state that as your finding."
            cause = accused if deposited else _AGAIN
            raise _validate.fail("licence", "openings of the points that the customer signed", got, cause)
        words[one.part] = 1 - 2 * bits.astype(np.int8)
    return words


def _bits(signed: SignedRequest, one: Opened, numbers: np.ndarray) -> np.ndarray | None:
    """A part's choices as 0 and 1; None where the openings are not those of its points."""
    owner, points = bytes.fromhex(signed.offer.offer.point), transfer.split(bytes.fromhex(signed.request.points))
    scalars, packed = transfer.split(bytes.fromhex(one.scalars)), bytes.fromhex(one.bits)
    if len(scalars) != len(numbers) or len(packed) != -(-len(numbers) // 8):
        return None
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=len(numbers))
    if np.packbits(bits).tobytes() != packed:  # other texts of the same openings
        return None
    opens = zip(scalars, bits.tolist(), numbers.tolist(), strict=True)
    return bits if all(transfer.fits(scalar, bit, owner, points[number]) for scalar, bit, number in opens) else None


def _check_deposited(challenge: Challenge, one: Opened) -> None:
    """Requires that an arbiter's openings are what the customer deposited."""
    deposit = challenge.request.request.deposit
    assert deposit
    text = bytes.fromhex(one.scalars) + bytes.fromhex(one.bits)
    ephemeral = bytes.fromhex(one.ephemeral) if one.ephemeral else bytes(32)
    again = deposits.seal(deposit.arbiter, requests.undeposited(challenge.request.request), one.part, text, ephemeral)
    same = documents.sha256(again) == deposit.pieces[one.part]
    _require(same, "the openings that the customer deposited", "others")


def convict(
    values: Float[np.ndarray, " D"],
    challenge: Challenge,
    words: dict[int, np.ndarray],
) -> Conviction:
    """T_c and its p-value.

    Args:
      values: the suspect's shifts in the coordinates of segments, from :func:`shifts`.
      challenge: checked.
      words: from :func:`opened_word`.
    """
    request, offer = challenge.request.request, challenge.request.offer.offer
    found = segments.draw(requests.seed(request), len(values), offer.num_segments, offer.num_parts)
    pairs = list(zip(challenge.parts, map(bytes.fromhex, challenge.keys), strict=True))
    z = np.concatenate([segments.readings(values, found, part, keys.from_bytes(key)) for part, key in pairs])
    return test(z, np.concatenate([words[part] for part, _ in pairs]), offer.num_parts, request.attempt, found.number)


def test(z: np.ndarray, word: np.ndarray, num_parts: int, attempt: int, num_segments: int) -> Conviction:
    """The statistic and the p-value of segments' readings z against an opened word."""
    direction = statistics.direction(z)
    statistic = float(direction @ word)
    log_p = float(statistics.log_p_value(statistic, direction)) + math.log(num_parts)
    log_p += math.log(attempt) + math.log(attempt + 1)
    return Conviction(statistic, min(0.0, log_p) / math.log(10), len(z), len(z) / num_segments)


def _listed(parts: Sequence[int]) -> str:
    return ", ".join(map(str, parts)) or "none"


def _require(holds: bool, expected: str, got: str) -> None:
    if not holds:
        raise _validate.fail("licence", expected, got, _AGAIN)


def shifts(values: np.ndarray, mark: Mark) -> Float[np.ndarray, " D"]:
    """The coordinates that segments use, of a suspect's shifts as :func:`smark_jax.extraction.shifts` gives them."""
    return segments.coordinates(np.asarray(values), mark)
