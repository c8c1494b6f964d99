"""Owners, customers, and what they make: licences, copies, disputes."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common import sections
from smark_jax import _documents, carriers, embedding, files, keys, licence
from smark_jax.licence import conviction, documents, group, issuing, requests, segments, variants

NUM_SEGMENTS, NUM_PARTS = requests.NUM_SEGMENTS, requests.NUM_PARTS
Leaves = Mapping[str, np.ndarray]


def identity(seed: int, *names: str) -> licence.Identity:
    """An identity that follows from a seed."""
    return licence.Identity(sections.secret(seed, "experiments.licence", *names))


class Party(NamedTuple):
    """One licence, seen from both sides.

    Attributes:
      signed: the request.
      secrets: the customer's.
      customer: the customer's keys.
      key: the owner's key of this offer.
      pieces: of the deposit.
    """

    signed: licence.SignedRequest
    secrets: licence.Secrets
    customer: licence.Identity
    key: keys.SecretKey
    pieces: tuple[bytes, ...]

    @property
    def word(self) -> np.ndarray:
        """The secret word, shape [n]."""
        return self.secrets.choices.word


def offer(
    owner: licence.Identity, key: keys.SecretKey, num_segments: int = NUM_SEGMENTS, num_parts: int = NUM_PARTS
) -> licence.SignedOffer:
    """An offer to some customer."""
    point = group.times_base(licence.scalar(key)).hex()
    public = owner.public.identity
    plain = licence.Offer(
        _documents.now(), "model", "customer", 0, 1, "00" * 32, public, point, num_segments, num_parts
    )
    return licence.sign_offer(plain, owner.signing)


def agree(signed: licence.SignedOffer, key: keys.SecretKey, customer: licence.Identity, attempt: int = 1) -> Party:
    """The customer's request under an offer."""
    made = licence.request(signed, customer, attempt)
    return Party(made.request, made.secrets, customer, key, made.pieces)


def opened(content: bytes, party: Party) -> dict[str, np.ndarray]:
    """The copy that the customer's package holds, as its file gives it.

    Raises:
      Damaged: when it cannot be opened.
    """
    with tempfile.TemporaryDirectory() as folder:
        written = []

        def write(suffix: Path) -> Path:
            written.append(Path(folder) / f"copy{suffix}")
            return written[0]

        licence.unpack(content, party.signed, party.secrets, "package", write)
        return files.read(written[0]).leaves


def part_keys_of(party: Party) -> list[keys.SecretKey]:
    """The owner's keys of all parts of a licence."""
    plain, request = party.signed.offer.offer, party.signed.request
    return segments.part_keys(party.key, documents.digest(request), plain.num_parts)


def divided(party: Party, mark: carriers.Mark) -> segments.Segments:
    """The segments of a licence."""
    plain = party.signed.offer.offer
    count = segments.num_coordinates(mark)
    return segments.draw(requests.seed(party.signed.request), count, plain.num_segments, plain.num_parts)


def copy(party: Party, base: Leaves, mark: carriers.Mark, word: np.ndarray) -> dict[str, np.ndarray]:
    """The copy that the customer's package holds, without sealing and opening it."""
    strength = issuing.SHARE * float(mark.strength)
    mark = mark._replace(spec=carriers.with_ties(mark.spec, dict(base)))
    marked = {name: np.asarray(leaf) for name, leaf in embedding.embed(dict(base), mark, word, strength).items()}
    found = divided(party, mark)
    signs = segments.all_signs(found, part_keys_of(party))
    made = variants.cut(marked, mark, found, signs, strength)
    chosen = [pair[bit] for pair, bit in zip(made.variants, party.secrets.choices.bits.tolist(), strict=True)]
    return variants.join(made.rest, made.places, made.bases, chosen, found)


class Reader(NamedTuple):
    """What reads one licence in any suspect: the segments and their signs.

    Attributes:
      party: the licence.
      found: its segments.
      signs: of all coordinates, shape [D].
    """

    party: Party
    found: segments.Segments
    signs: np.ndarray

    def read(self, values: np.ndarray) -> np.ndarray:
        """The readings z of all segments at once, shape [n]; part by part, they are those of ``segments.readings``."""
        return np.bincount(self.found.members, values.astype(np.float64) * self.signs, self.found.number)

    def test(self, z: np.ndarray, parts: Sequence[int], word: np.ndarray | None = None) -> licence.Conviction:
        """The conviction by these parts of the licence's word, or of another one."""
        where = np.concatenate([self.found.of_part(part) for part in parts])
        word = self.party.word if word is None else word
        plain, request = self.party.signed.offer.offer, self.party.signed.request
        return conviction.test(z[where], word[where], plain.num_parts, request.attempt, self.found.number)


def reader(party: Party, mark: carriers.Mark) -> Reader:
    """The reader of one licence."""
    found = divided(party, mark)
    return Reader(party, found, segments.all_signs(found, part_keys_of(party)))


def challenge(
    party: Party,
    suspect: str,
    earlier: tuple[documents.Earlier, ...] = (),
) -> licence.Challenge:
    """The owner's challenge to open one more part in a dispute about this suspect."""
    before = [one.part for one in earlier]
    part = next(part for part in licence.order(suspect, party.signed) if part not in before)
    return licence.Challenge(party.signed, (part,), (part_keys_of(party)[part].to_bytes().hex(),), earlier)


def answered(party: Party, asked: licence.Challenge, suspect: str, bundle: str) -> dict[int, np.ndarray]:
    """The words that the customer opens to a challenge, checked on both sides."""
    licence.check_challenge(asked, suspect)
    given = licence.answer(asked, bundle, party.secrets.choices, party.customer)
    return licence.opened_word(asked, given, bundle)
