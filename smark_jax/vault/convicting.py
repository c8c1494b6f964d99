"""What an arbiter checks of secret words: that the bundle asks the accused fairly, and what the answers prove."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, carriers, errors, extraction, files, licence
from smark_jax.licence import conviction, documents
from smark_jax.licence.documents import Challenge, SignedAnswer
from smark_jax.vault import bundles, reading
from smark_jax.vault._checks import Checks, fails, require
from smark_jax.vault.documents import Bundle

_MOST = 64


class Convicted(NamedTuple):
    """An accused whose secret word the suspect carries.

    Attributes:
      customer: the name.
      serial: the number.
      statistic: T_c.
      log10_p: logarithm to base 10 of its p-value.
      fraction: the share of the word that was opened.
      opened_by: "customer" or "arbiter".
    """

    customer: str
    serial: int
    statistic: float
    log10_p: float
    fraction: float
    opened_by: str


def read_answers(paths: Sequence[Path]) -> list[SignedAnswer]:
    """Reads the files of answers; one may hold the answers of several licences.

    Raises:
      Unreadable: when a file is not an answer.
    """
    found = []
    for path in paths:
        with path.open("rb") as file:
            content = file.read(documents.LARGEST + 1)
        found += documents.loads(documents.AnswerFile, content, str(path)).answers
    if len(found) > _MOST:
        raise _validate.fail("evidence", f"at most {_MOST} answers", f"{len(found)}", "Pass those to this bundle.")
    return found


def check(
    checks: Checks,
    bundle: Bundle,
    answers: Sequence[SignedAnswer],
    read: reading.Read,
    mark: carriers.Mark,
    base: Mapping[str, np.ndarray],
) -> list[Convicted]:
    """Checks every challenge of a bundle and every answer to it, and tests the opened words.

    Args:
      checks: to which these are added.
      bundle: the evidence.
      answers: of the accused, or of their arbiters.
      read: the suspect as it was read.
      mark: the model's.
      base: the leaves of the base.
    """
    digest, left, values = bundles.digest(bundle), list(answers), None
    tested: dict[str, list[Convicted]] = {}
    for challenge in bundle.licences or ():
        offer, request = challenge.request.offer.offer, challenge.request.request
        about = (
            f"attempt {request.attempt}, signed by the key {request.identity[:16]}..., asked for {_parts(challenge)}"
        )
        with checks.check(f"licence of {offer.customer!r}", about):
            _check_licence(bundle, challenge)
        mine = [one for one in left if one.answer.request == documents.digest(request)]
        left = [one for one in left if one not in mine]
        for answer in mine if checks[-1].holds else ():
            values = _values(read, mark, base) if values is None else values
            with checks.check(f"answer of {offer.customer!r}", f"opens {_parts(challenge)}, as signed at the purchase"):
                tested.setdefault(offer.customer, []).append(_test(challenge, answer, digest, values))
    for answer in left:
        with checks.check("answer", ""):
            require(False, f"an answer for the request {answer.answer.request[:16]}..., which this bundle does not ask")
    return [one for some in tested.values() if some for one in _convicted(checks, bundle, some)]


def _convicted(checks: Checks, bundle: Bundle, tested: Sequence[Convicted]) -> list[Convicted]:
    """The customer, if one of its words is in the suspect; p-values pay for all the words that it drew."""
    best, alpha = min(tested, key=lambda one: one.log10_p), bundle.header.alpha
    level = f"T = {best.statistic:.2f}, p <= 10^{best.log10_p:.1f} at alpha = {alpha:g}"
    detail = f"{level}, from {best.fraction:.1%} of its choices, which the {best.opened_by} opened"
    with checks.check(f"secret word of {best.customer!r}", detail):
        require(best.log10_p <= math.log10(alpha), f"the suspect does not carry it: {level}")
    return [best] if checks[-1].holds else []


def _check_licence(bundle: Bundle, challenge: Challenge) -> None:
    """Requires that the challenge is whole, and that its offer is about the accused, the model and the commitment."""
    offer, request = challenge.request.offer.offer, challenge.request.request
    for other in bundle.licences or ():
        same = documents.digest(other.request.request) == documents.digest(request)
        require(other is challenge or not same, "the bundle asks for its word twice")
        same = other.request.offer.offer.serial != offer.serial or other.request.request.identity == request.identity
        require(same, "another key signed another licence of this customer")
    try:
        conviction.check_challenge(challenge, bundle.suspect.content)
    except errors.SmarkError as error:
        raise fails(error) from None
    names = {opened.leaf.serial: opened.leaf.customer for opened in bundle.opened}
    accused = {claim.serial for claim in bundle.accused}
    require(offer.serial in accused and names.get(offer.serial) == offer.customer, "it is not that of an accused")
    require(offer.public_key == bundle.header.public_key, "another owner made the offer")
    require(offer.model == bundle.header.model, "it is a licence of another model")
    roots = {(item.commitment.number, item.commitment.root) for item in bundle.chain}
    require((offer.number, offer.root) in roots, "the offer names a commitment that is not in the bundle")


def _values(read: reading.Read, mark: carriers.Mark, base: Mapping[str, np.ndarray]) -> np.ndarray:
    """The suspect's shifts in the coordinates of segments."""
    mark = mark._replace(spec=carriers.with_ties(mark.spec, base))
    original = files.nest({leaf.path: base[leaf.path] for leaf in mark.spec.leaves})
    return licence.shifts(extraction.shifts(files.nest(read.leaves), original, mark), mark)


def _test(challenge: Challenge, answer: SignedAnswer, digest: str, values: np.ndarray) -> Convicted:
    """The test of an opened word; requires that it was opened as the customer signed it."""
    offer, request = challenge.request.offer.offer, challenge.request.request
    who = "customer" if answer.answer.key == request.identity else "arbiter"
    try:
        words = licence.opened_word(challenge, answer, digest)
        found = licence.convict(values, challenge, words)
    except errors.SmarkError as error:
        raise fails(error) from None
    return Convicted(offer.customer, offer.serial, found.statistic, found.log10_p, found.fraction, who)


def _parts(challenge: Challenge) -> str:
    parts = " and ".join(map(str, challenge.parts))
    return f"part{'s' * (len(challenge.parts) > 1)} {parts}"


def statements(bundle: Bundle, convicted: Sequence[Convicted], answers: Sequence[SignedAnswer] = ()) -> tuple[str, ...]:
    """What rests on whose word, as far as secret words go."""
    if not bundle.licences:
        return (
            "that the owner did not put this codeword into the suspect: without a licence that the customer requested "
            "itself, nothing here excludes that",
        )
    found, done = [], {one.customer for one in convicted}
    answered = {one.answer.request for one in answers}
    for challenge in bundle.licences:
        name = challenge.request.offer.offer.customer
        key = challenge.request.request.identity
        found.append(f"that the key {key} is that of {name!r}: compare it with the licence contract")
        if name in done:
            found.append(
                f"that neither the copy of {name!r}, nor what was computed from it, reached the owner before this "
                "bundle was made: without it, the owner could not know the secret word"
            )
            if any(one.customer == name and one.opened_by == "arbiter" for one in convicted):
                found.append(
                    f"that {name!r} had not opened {_parts(challenge)} for another bundle before its arbiter did: "
                    "its wallet's status says what it has opened"
                )
        elif documents.digest(challenge.request.request) in answered:
            found.append(
                f"that the owner did not put this codeword into the suspect: the answer of {name!r} does not show that"
            )
        else:
            found.append(
                f"that the owner did not put this codeword into the suspect: {name!r} was asked to open "
                f"{_parts(challenge)} of its secret word, and no answer is here. A refusal proves nothing by "
                "itself; the licence contract says what it means, and an arbiter with a deposit can answer instead"
            )
    return tuple(found)
