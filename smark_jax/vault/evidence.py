r"""Evidence: what an arbiter needs to recompute an accusation, and nothing that accuses anybody else.

*What the arbiter tests.* Let y be the suspect's chips and b_j the accused's codeword. A lone leaker is tested as in
:mod:`smark_jax.statistics`, T = <y, b_j> / \|y\|. In a coalition the other members' codewords hide that of j. So the
codewords of a support S of other accused are opened too, and projected out first. The owner, not the arbiter, chose S,
and may have looked at b_j. So the arbiter's p-value pays for all supports that could have been chosen:

.. math:: p_j = p(T_j \mid r_S) \cdot N \cdot \binom{N - 1}{|S|} \cdot 2^{|S| + 1} \cdot \text{suspects} \cdot
          \text{alignments} \cdot \text{maps} \cdot \text{shares}

For an innocent j and every fixed S, b_j is independent of the residual r_S. Summed over N customers, all S of each
size and all sizes, the probability of a false accusation is at most alpha. No step trusts the owner's search. N counts
every customer whom the verdict compared, even when the accused's own commitment had fewer. The number of shares is 4
where a part of the carrier can be opened (:mod:`smark_jax.vault.openings`), whichever was, and 1 for other models.
Where codewords were drawn, N counts the serials that could have been given out (:func:`counted`), and p-values count
the ranges that these could have been in.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _documents, _validate, carriers, statistics
from smark_jax.vault import (
    _opened,
    bundles,
    commitments,
    documents,
    drafts,
    folder,
    licensing,
    log,
    models,
    openings,
    verdicts,
    versions,
)
from smark_jax.vault.customers import Customer
from smark_jax.vault.documents import (
    MISSING,
    Accused,
    Bundle,
    Claim,
    Drawn,
    Exhibit,
    Leaf,
    Missing,
    Suspect,
    Verdict,
    VerdictNamed,
)
from smark_jax.vault.reading import base_alone

_SMALLEST_RESIDUAL = 1e-6


class Test(NamedTuple):
    """One accused's test: T on the residual, and the logarithm to base 10 of the bound above."""

    statistic: float
    log10_p: float


class Counts(NamedTuple):
    """What p-values are corrected for.

    Attributes:
      num_customers: N, the customers compared; at least as many as were committed to.
      num_suspects: how many suspects were examined together.
      num_alignments: how many readings were tried.
      log_maps: natural logarithm of the number of leaf maps from which the owner chose.
      num_shares: how many shares of the carrier the owner could choose from.
      log_ranges: natural logarithm of the number of ranges of serials from which the owner chose.
    """

    num_customers: int
    num_suspects: int
    num_alignments: int
    log_maps: float = 0.0
    num_shares: int = 1
    log_ranges: float = 0.0


def counted(counts: Counts, claim: Sequence[int], drawn: Drawn | Missing | None) -> Counts:
    """The counts for a test of these serials; an owner gives out drawn words when they are known, which is paid for."""
    if not drawn:
        return counts
    customers, log_ranges = drafts.choices(claim, drawn.draft.header.capacity)
    return counts._replace(num_customers=max(counts.num_customers, customers), log_ranges=log_ranges)


def test(
    chips: np.ndarray,
    word: np.ndarray,
    support: Sequence[np.ndarray],
    counts: Counts,
    *,
    base: np.ndarray | None = None,
) -> Test:
    """Computes an accused's statistic and p-value as an arbiter does.

    Args:
      chips: the suspect's read-out y, shape [m].
      word: the accused's codeword in {-1, +1}, shape [m].
      support: the codewords of other customers that are projected out, each of shape [m].
      counts: what the p-value is corrected for.
      base: chips that are projected out too, without a correction, since nobody chose them.

    Raises:
      SmarkError: when a number is below 1.
    """
    for name in ("num_customers", "num_suspects", "num_alignments", "num_shares"):
        _validate.positive("evidence", name, getattr(counts, name))
    residual = direction = statistics.direction(chips)
    fixed = [] if base is None else [statistics.direction(base) * math.sqrt(len(chips))]
    if support or fixed:
        words = np.stack([*support, *fixed]).astype(np.float64)
        residual = direction - np.linalg.lstsq(words.T, direction, rcond=None)[0] @ words
    norm = float(np.linalg.norm(residual))
    if norm < _SMALLEST_RESIDUAL:  # only rounding error is left, or y was zero
        return Test(0.0, 0.0)
    statistic = float(residual @ word) / norm
    size = len(support)
    others = counts.num_customers - 1
    choices = math.lgamma(others + 1) - math.lgamma(size + 1) - math.lgamma(max(0, others - size) + 1)
    log_p = float(statistics.log_p_value(statistic, residual)) + math.log(counts.num_customers) + choices
    readings = math.log(counts.num_suspects) + math.log(counts.num_alignments) + math.log(counts.num_shares)
    log_p += (size + 1) * math.log(2) + readings + counts.log_maps + counts.log_ranges
    return Test(statistic, min(0.0, log_p) / math.log(10))


class Pieces(NamedTuple):
    """How many pieces of a carrier a bundle opens, of how many, and how many no bundle has opened so far."""

    opened: int
    of: int
    secret: int


class Exported(NamedTuple):
    """A bundle.

    Attributes:
      content: the bytes of the file.
      accused: the customers it accuses.
      left_out: accused customers against whom it proves nothing.
      shape: the shape of the model's mark, whose file belongs beside the bundle; None where it has none.
      commitments: the numbers of the commitments under which it opens codewords.
      pieces: of the carrier; None where the model's carrier has none, so that the bundle opens it whole.
      asked: the accused who are asked to open parts of their secret words, with the numbers of those parts.
    """

    content: bytes
    accused: tuple[str, ...]
    left_out: tuple[str, ...]
    shape: carriers.Shape | None
    commitments: tuple[int, ...]
    pieces: Pieces | None
    asked: tuple[tuple[str, tuple[int, ...]], ...] = ()


def export(
    vault: folder.Vault, number: int, place: int | None = None, commitment: int | None = None, parts: int = 1
) -> Exported:
    """Makes the bundle on one suspect of a verdict, and records in the log that it was made.

    The bundle opens the leaves of the accused, and the smallest share of the carrier's pieces that proves as many
    accusations as any (:mod:`smark_jax.vault.openings`): the carrier key only when that is all of them, or when the
    carrier has no pieces. The support of each accused is the smallest sufficient set of the other accused, taken in
    order of decreasing share.

    Each codeword is opened under the commitment with which its customer was licensed, so that it holds against the root
    that was published before that sale. The bundle contains all commitments from the oldest of these to the verdict's
    own. Each names its predecessor, so a root published later proves them too.

    Args:
      vault: an open vault.
      number: the verdict's number.
      place: the suspect's place in the verdict, from 1; may be omitted when only one was traced.
      commitment: number of a single commitment under which to open all codewords instead.
      parts: how many parts of its secret word to ask of each accused who has one; a bundle that asks is kept, and
        exporting it again gives the same one.

    Raises:
      SmarkError: when there is no such verdict or suspect, when the suspect was not traced by its weights, when no
        accusation that an arbiter can check reaches the committed level, or when the commitment does not cover the
        accused.
    """
    verdict = verdicts.get(vault, number)
    where = _place(verdict, place)
    suspect = verdict.suspects[where]
    model = models.get(vault, verdict.model)
    ranked = sorted(suspect.accused, key=operator.attrgetter("share"), reverse=True)
    customers = [Customer(accused.serial, accused.customer, "") for accused in ranked]
    leaves = {leaf.serial: leaf for leaf in commitments.open_leaves(model, customers)}
    claims, left_out, part = _smallest(model, verdict, where, ranked, leaves)
    shown = sorted({serial for claim in claims for serial in (claim.serial, *claim.support)})
    newest = verdict.commitment.number
    serials = [claim.serial for claim in claims]
    asking = licensing.challenges(model, serials, suspect.content or "", parts, (number, where))
    under = _opened.under(vault, model.name, shown, newest, commitment)
    opened = {one.leaf.serial: one for one in _opened.leaves(vault, model.name, [leaves[s] for s in shown], under)}
    if drawn := drafts.drawn(model):
        opened = {s: opened[s]._replace(own=own) for s, own in drafts.own_words(model, shown).items()}
    (first, *later) = [_opened.stamped(vault, model.name, n) for n in range(min(under.values()), newest + 1)]
    bundle = Bundle(
        format=bundles.FORMAT,
        version=bundles.VERSION,
        created=_documents.now(),
        smark_version=verdict.smark_version,
        commitment=first.commitment,
        timestamps=first.timestamps,
        later=tuple(later),
        spec=documents.rows(model.settings.spec),
        verdict=VerdictNamed(number, verdict.created, verdict.occasion or 0),
        suspect=_exhibit(verdict, suspect),
        num_suspects=suspect.num_suspects or 0,
        num_alignments=suspect.num_alignments or 0,
        num_customers=verdict.num_customers,
        opened=tuple(opened[serial] for serial in shown),
        accused=tuple(claims),
        licences=tuple(asking) if asking else MISSING,
        **_keys(model, part),
        drawn=drawn or MISSING,
    )
    pieces = {"pieces": part} if part else {}
    details = {"model": model.name, "verdict": number, "suspect": where + 1, "opened": shown, **pieces}
    folder.record(vault, openings.EVENT, {}, **details)
    who = tuple(leaves[claim.serial].customer for claim in claims)
    asked = tuple((one.request.offer.offer.customer, one.parts) for one in asking)
    content, numbers = bundles.signed(bundle, vault.master), tuple(sorted(set(under.values())))
    if asking:
        content = licensing.kept(model, asking, bundle, content, (number, where))
    return Exported(content, who, tuple(left_out), model.shape, numbers, _pieces(model, part), asked)


class _Proof(NamedTuple):
    """What a share of the carrier proves, the accused whom it does not, and its pieces; none for the whole carrier."""

    claims: list[Claim]
    left_out: list[str]
    part: tuple[int, ...]


def _smallest(
    model: models.OpenModel, verdict: Verdict, where: int, ranked: Sequence[Accused], leaves: Mapping[int, Leaf]
) -> _Proof:
    """The proof by the smallest share of the carrier that proves as many accusations as any."""
    suspect = verdict.suspects[where]
    whole, *rows = verdicts.chips(model.vault, verdict, where)
    parts = model.parts(suspect.content or "") if rows else []
    counts = Counts(
        verdict.num_customers,
        suspect.num_suspects or 0,
        suspect.num_alignments or 0,
        suspect.log_maps or 0.0,
        openings.readings(model.settings.versions),
    )
    found = _Proof([], [], ())
    for part, chips in zip([*parts, ()], [*rows, whole], strict=True):
        proof = _Proof(*_claims(model, part, chips, ranked, leaves, counts), part)
        found = max(found, proof, key=lambda one: len(one.claims))  # the first of the best
        if len(found.claims) == len(ranked):  # a larger share proves no more
            break
    if not found.claims:
        got = "none: the verdict names them, but what an arbiter can check alone is weaker"
        cause = "Trace more of what leaked; docs/evidence.md explains what an arbiter can check."
        expected = f"an accusation that holds at alpha {model.settings.alpha:g}"
        raise _validate.fail("evidence", expected, got, cause)
    return found


def _keys(model: models.OpenModel, part: tuple[int, ...]) -> dict[str, Any]:
    """The fields of a bundle that open these pieces of the carrier; all of it if there are none."""
    key = models.carrier_key(model.vault, model.name)
    return {"pieces": openings.opened(key, part)} if part else {"carrier_key": key.to_bytes().hex()}


def _pieces(model: models.OpenModel, part: tuple[int, ...]) -> Pieces | None:
    if model.settings.versions.carrier not in versions.IN_PIECES:
        return None
    every = range(model.mark.carrier.num_pieces)
    secret = set(every) - openings.published(model.vault.connection, model.name)
    return Pieces(len(part or every), len(every), len(secret))


def _exhibit(verdict: Verdict, suspect: Suspect) -> Exhibit:
    """A suspect that was traced by its weights, as a bundle shows it; its file is named without its folders."""
    return Exhibit(
        sha256=suspect.sha256 or "",
        content=suspect.content or "",
        format=suspect.format or "",
        layout=suspect.layout or (),
        alignment=suspect.alignment or None,
        file=suspect.file.rpartition("/")[2],
        reading=verdict.reading,
        left_out=suspect.left_out or MISSING,
        log_maps=suspect.log_maps or MISSING,
    )


def _claims(
    model: models.OpenModel,
    part: tuple[int, ...],
    chips: np.ndarray,
    ranked: Sequence[Accused],
    leaves: Mapping[int, Leaf],
    counts: Counts,
) -> tuple[list[Claim], list[str]]:
    """The accusations that an arbiter with these pieces will find significant, and the names of the others."""
    settings = model.settings
    words = {serial: commitments.word(leaf, settings.num_chips) for serial, leaf in leaves.items()}
    carrier = model.mark.carrier.part(part) if part else model.mark.carrier
    alone = base_alone(model.base, model.mark._replace(carrier=carrier))
    claims, left_out, drawn = [], [], drafts.drawn(model)
    for accused in ranked:
        others = [serial for serial in words if serial != accused.serial]
        for size in range(len(others) + 1):
            support = others[:size]
            rest = [words[serial] for serial in support]
            paid = counted(counts, (accused.serial, *support), drawn)
            found, apart = (test(chips, words[accused.serial], rest, paid, base=base) for base in (None, alone))
            if max(found.log10_p, apart.log10_p) <= math.log10(settings.alpha):
                claims.append(Claim(accused.serial, tuple(support), *found, share=accused.share))
                break
        else:
            left_out.append(accused.customer)
    return claims, left_out


def exports(vault: folder.Vault, model: str) -> list[str]:
    """When bundles that open this model's carrier, or a part of it, were exported."""
    return [entry.time for entry in log.entries(vault.connection, openings.EVENT, model)]


def _place(verdict: Verdict, place: int | None) -> int:
    suspects = verdict.suspects
    traced = [i for i, suspect in enumerate(suspects) if suspect.verdict == "traced" and suspect.read == "weights"]
    if place is None and len(traced) == 1:
        return traced[0]
    if place is None or place - 1 not in traced:
        listed = ", ".join(f"{i + 1} ({suspects[i].file})" for i in traced) or "none"
        expected = f"a suspect of verdict {verdict.number} that was traced by its weights"
        got = f"number {place}" if place is not None else f"{len(traced)} of them"
        raise _validate.fail("evidence", expected, got, f"Say which one with --suspect: {listed}.")
    return place - 1
