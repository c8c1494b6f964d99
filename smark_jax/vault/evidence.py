r"""Evidence: what an arbiter needs to recompute an accusation, and nothing that accuses anybody else.

*What the arbiter tests.* Let y be the suspect's chips and b_j the accused's codeword. A lone leaker is tested as in
:mod:`smark_jax.statistics`, T = <y, b_j> / \|y\|. In a coalition the other members' codewords hide that of j. So the
codewords of a support S of other accused are opened too, and projected out first. The owner, not the arbiter, chose S,
and may have looked at b_j. So the arbiter's p-value pays for all supports that could have been chosen:

.. math:: p_j = p(T_j \mid r_S) \cdot N \cdot \binom{N - 1}{|S|} \cdot 2^{|S| + 1} \cdot \text{suspects} \cdot
          \text{alignments} \cdot \text{maps}

For an innocent j and every fixed S, b_j is independent of the residual r_S. Summed over N customers, all S of each
size and all sizes, the probability of a false accusation is at most alpha. No step trusts the owner's search. N counts
every customer whom the verdict compared, even when the accused's own commitment had fewer. Where codewords were drawn,
N counts the serials that could have been given out (:func:`counted`).
"""

import math
import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax import _documents, _validate, carriers, statistics
from smark_jax.vault import (
    bundles,
    commitments,
    documents,
    drafts,
    folder,
    log,
    merkle,
    models,
    store,
    timestamps,
    verdicts,
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
    Opened,
    Stamp,
    Stamped,
    Suspect,
    Verdict,
    VerdictNamed,
)
from smark_jax.vault.reading import base_alone

_SMALLEST_RESIDUAL = 1e-6
_EVENT = "evidence exported"


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
      log_ranges: natural logarithm of the number of ranges of serials from which the owner chose.
    """

    num_customers: int
    num_suspects: int
    num_alignments: int
    log_maps: float = 0.0
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
    for name in ("num_customers", "num_suspects", "num_alignments"):
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
    log_p += (
        (size + 1) * math.log(2) + math.log(counts.num_suspects) + math.log(counts.num_alignments) + counts.log_maps
    ) + counts.log_ranges
    return Test(statistic, min(0.0, log_p) / math.log(10))


class Exported(NamedTuple):
    """A bundle.

    Attributes:
      content: the bytes of the file.
      accused: the customers it accuses.
      left_out: accused customers against whom it proves nothing.
      shape: the shape of the model's mark, whose file belongs beside the bundle; None where it has none.
      commitments: the numbers of the commitments under which it opens codewords.
    """

    content: bytes
    accused: tuple[str, ...]
    left_out: tuple[str, ...]
    shape: carriers.Shape | None
    commitments: tuple[int, ...]


def export(vault: folder.Vault, number: int, place: int | None = None, commitment: int | None = None) -> Exported:
    """Makes the bundle on one suspect of a verdict, and records in the log that it was made.

    The bundle opens the model's carrier key and the leaves of the accused. The support of each accused is the smallest
    sufficient set of the other accused, taken in order of decreasing share.

    Each codeword is opened under the commitment with which its customer was licensed, so that it holds against the root
    that was published before that sale. The bundle contains all commitments from the oldest of these to the verdict's
    own. Each names its predecessor, so a root published later proves them too.

    Args:
      vault: an open vault.
      number: the verdict's number.
      place: the suspect's place in the verdict, from 1; may be omitted when only one was traced.
      commitment: number of a single commitment under which to open all codewords instead.

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
    claims, left_out = _claims(model, verdicts.chips(vault, number, where), ranked, leaves, _counts(verdict, suspect))
    shown = sorted({serial for claim in claims for serial in (claim.serial, *claim.support)})
    newest = verdict.commitment.number
    under = _under(vault, model.name, shown, newest, commitment)
    opened = {one.leaf.serial: one for one in _opened(vault, model.name, [leaves[s] for s in shown], under)}
    if drawn := drafts.drawn(model):
        opened = {s: opened[s]._replace(own=own) for s, own in drafts.own_words(model, shown).items()}
    (first, *later) = [_stamped(vault, model.name, n) for n in range(min(under.values()), newest + 1)]
    bundle = Bundle(
        format=bundles.FORMAT,
        version=bundles.VERSION,
        created=_documents.now(),
        smark_version=verdict.smark_version,
        commitment=first.commitment,
        timestamps=first.timestamps,
        later=tuple(later),
        carrier_key=models.carrier_key(vault, model.name).to_bytes().hex(),
        spec=documents.rows(model.settings.spec),
        verdict=VerdictNamed(number, verdict.created, verdict.occasion or 0),
        suspect=_exhibit(verdict, suspect),
        num_suspects=suspect.num_suspects or 0,
        num_alignments=suspect.num_alignments or 0,
        num_customers=verdict.num_customers,
        opened=tuple(opened[serial] for serial in shown),
        accused=tuple(claims),
        drawn=drawn or MISSING,
    )
    details = {"model": model.name, "verdict": number, "suspect": where + 1, "opened": shown}
    folder.record(vault, _EVENT, {}, **details)
    who = tuple(leaves[claim.serial].customer for claim in claims)
    content, numbers = bundles.signed(bundle, vault.master), tuple(sorted(set(under.values())))
    return Exported(content, who, tuple(left_out), model.shape, numbers)


def _counts(verdict: Verdict, suspect: Suspect) -> Counts:
    """What p-values of this suspect are corrected for."""
    tried = (suspect.num_suspects or 0, suspect.num_alignments or 0)
    return Counts(verdict.num_customers, *tried, log_maps=suspect.log_maps or 0.0)


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
    chips: np.ndarray,
    ranked: Sequence[Accused],
    leaves: Mapping[int, Leaf],
    counts: Counts,
) -> tuple[list[Claim], list[str]]:
    """The accusations that an arbiter will find significant, and the names of the others."""
    settings = model.settings
    words = {serial: commitments.word(leaf, settings.num_chips) for serial, leaf in leaves.items()}
    alone = base_alone(model.base, model.mark)
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
    if not claims:
        got = "none: the verdict names them, but what an arbiter can check alone is weaker"
        cause = "Trace more of what leaked; docs/evidence.md explains what an arbiter can check."
        raise _validate.fail("evidence", f"an accusation that holds at alpha {settings.alpha:g}", got, cause)
    return claims, left_out


def _under(
    vault: folder.Vault, model: str, shown: Sequence[int], newest: int, commitment: int | None
) -> dict[int, int]:
    """The number of the commitment under which each serial's codeword is opened."""
    licensed = store.licences(vault.connection, model, shown)
    under = {serial: licensed[serial].number for serial in shown}
    if commitment is None:
        return under
    least = max(under.values())
    if not least <= commitment <= newest:
        licensed_with = " and ".join(map(str, sorted(set(under.values()))))
        cause = (
            f"Earlier ones lack an accused customer, and later ones were made after the suspect was seen. Without "
            f"--commitment, each codeword is opened under the one it was licensed with, here {licensed_with}."
        )
        expected = f"a commitment to {model} of number {least} to {newest}"
        raise _validate.fail("evidence", expected, f"number {commitment}", cause)
    return dict.fromkeys(shown, commitment)


def _opened(vault: folder.Vault, model: str, leaves: Sequence[Leaf], under: Mapping[int, int]) -> list[Opened]:
    """The leaves with their paths to the roots of the commitments that cover them."""
    opened = []
    for number in sorted(set(under.values())):
        commitment = commitments.get(vault, model, number)
        covered = store.leaves(vault.connection, model, number)
        tree = [commitments.header_leaf(commitment.header), *covered.values()]
        if merkle.root(tree).hex() != commitment.root:
            cause = "Restore the vault from your backup."
            raise _validate.fail("evidence", "the leaves that were committed to", "others", cause)
        index = {serial: place for place, serial in enumerate(covered, 1)}
        some = [leaf for leaf in leaves if under[leaf.serial] == number]
        places = [index[leaf.serial] for leaf in some]
        for leaf, place, path in zip(some, places, merkle.paths(tree, places), strict=True):
            opened.append(Opened(leaf, place, tuple(node.hex() for node in path), number))
    return opened


def _stamped(vault: folder.Vault, model: str, number: int) -> Stamped:
    """A commitment and its time stamps, as a bundle holds them."""
    commitment = commitments.get(vault, model, number)
    stamps = (Stamp(time, found.hex()) for time, found in timestamps.stored(vault, commitment))
    return Stamped(commitment, tuple(stamps))


def exports(vault: folder.Vault, model: str) -> list[str]:
    """When bundles that open this model's carrier were exported; check this before issuing more copies."""
    return [entry.time for entry in log.entries(vault.connection, _EVENT, model)]


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
