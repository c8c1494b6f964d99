"""How an arbiter verifies a bundle: everything is recomputed from the suspect, the base and the published root."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smark_jax import _validate, carriers, errors, files
from smark_jax.licence.documents import SignedAnswer
from smark_jax.vault import _checks, _drawn, bundles, convicting, evidence, openings, ranges, reading
from smark_jax.vault._checks import Check, Checks, Fails, refuse, require
from smark_jax.vault.documents import Bundle, Claim, Header, Missing

# The relative difference allowed between a statistic on the owner's computer and on the arbiter's.
_ROUNDING = 1e-2


class Accusation(NamedTuple):
    """An accused customer: name, serial, statistic, and the logarithm to base 10 of the p-value."""

    customer: str
    serial: int
    statistic: float
    log10_p: float


class Report(NamedTuple):
    """What an arbiter found.

    Attributes:
      checks: in the order in which they were made.
      accused: each accused, as computed here.
      header: the header of the commitment; of the oldest one when there are several.
      root: the root of that commitment.
      compared: whether the codewords were compared with published roots.
      statements: what the arbiter takes on the owner's word.
      num_customers: the number of customers for which p-values are corrected.
      largest_alpha: the highest committed level that the arbiter accepts.
      convicted: the accused whose own secret words the suspect carries.
    """

    checks: tuple[Check, ...]
    accused: tuple[Accusation, ...]
    header: Header
    root: str
    compared: bool
    statements: tuple[str, ...]
    num_customers: int
    largest_alpha: float
    convicted: tuple[convicting.Convicted, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every check holds."""
        return all(check.holds for check in self.checks)


def published_root(source: str) -> str:
    """The root that ``source`` names: either a commitment's file or the root itself in hexadecimal.

    Raises:
      SmarkError: when ``source`` is neither.
    """
    if re.fullmatch("[0-9a-fA-F]{64}", source):
        return source.lower()
    if not Path(source).is_file():
        cause = "Name the file that the owner published, or give the root itself."
        raise _validate.fail("evidence", "a commitment's file or a root of 64 hexadecimal digits", repr(source), cause)
    return bundles.read_commitment(Path(source)).root


def verify(
    bundle: Path,
    suspect: Path,
    base: Path,
    *,
    root: str | Sequence[str] | None = None,
    largest_alpha: float = ranges.LARGEST_ALPHA,
    aligner: reading.Aligner | None = None,
    answers: Sequence[SignedAnswer] = (),
    on_step: Callable[[str], None] = lambda text: None,
) -> Report:
    """Verifies a bundle without a vault: hashes, paths, the carrier, every accusation.

    Args:
      bundle: the evidence; beside it, where the model has a shape, the shape's file.
      suspect: the model in dispute.
      base: the model that copies were made from.
      root: the root published before the sale, in hex; several when customers were licensed one after another.
      largest_alpha: the highest committed level that the arbiter accepts.
      aligner: how to align, if the owner did; it uses the arbiter's own copy of the network.
      answers: of the accused or their arbiters, from :func:`smark_jax.vault.convicting.read_answers`.
      on_step: called with a description of the next step.

    Raises:
      SmarkError: when a file cannot be read at all, or ``largest_alpha`` is not a probability.
    """
    _validate.probability("evidence", "the largest alpha", largest_alpha)
    signed = bundles.read(bundle)
    content, header = signed.bundle, signed.bundle.header
    roots = (root,) if isinstance(root, str) else tuple(root or ())
    on_step("reading the models")
    theirs, ours = files.read(suspect, strict=False), files.read(base)
    checks, accused, convicted = Checks(), [], []
    with checks.check("signature", f"by the owner's key {header.public_key[:16]}..., which the commitment names"):
        require(bundles.genuine(signed), "the bundle was changed after it was signed")
    with checks.check("level", f"alpha {header.alpha:g}, of at most {largest_alpha:g} that you accept"):
        refuse(ranges.level(content, largest_alpha))
    with checks.check("numbers", "each is in its range"):
        refuse(ranges.numbers(content))
    _checks.check_commitments(checks, content, roots)
    _drawn.check(checks, content)
    proved = _checks.check_contents(checks, content, bundle.parent, theirs.leaves, ours.leaves)
    if proved is not None:
        on_step("reading the suspect's chips")
        read = None
        with checks.check("read-out", "the suspect read as the owner read it") as detail:
            read = _read(content, theirs.leaves, ours.leaves, proved.mark, aligner)
            detail.append(f"{read.coverage.read:,} of {read.coverage.weights:,} carrying weights")
            refuse(_misstated(content, read))
        if read is not None and read.log_maps:
            checks.append(Check("map of leaves", True, reading.maps_in_words(read.log_maps)))
        if read is not None:
            accused = [_judge(checks, content, claim, read, proved.words) for claim in content.accused]
            convicted = convicting.check(checks, content, answers, read, proved.mark, ours.leaves)
    return Report(
        checks=tuple(checks),
        accused=tuple(accused),
        header=header,
        root=content.commitment.root,
        compared=bool(roots),
        statements=(*_statements(content), *convicting.statements(content, convicted, answers)),
        num_customers=content.customers,
        largest_alpha=largest_alpha,
        convicted=tuple(convicted),
    )


def _judge(
    checks: Checks, bundle: Bundle, claim: Claim, read: reading.Read, words: Mapping[int, np.ndarray]
) -> Accusation:
    """Recomputes one accusation."""
    name = next(opened.leaf.customer for opened in bundle.opened if opened.leaf.serial == claim.serial)
    alpha, shares = bundle.header.alpha, openings.readings(bundle.header.algorithms)
    counts = evidence.Counts(bundle.customers, bundle.num_suspects, bundle.num_alignments, read.log_maps, shares)
    counts = evidence.counted(counts, (claim.serial, *claim.support), bundle.drawn)
    word, support = words[claim.serial], [words[serial] for serial in claim.support]
    found, apart = (evidence.test(read.chips, word, support, counts, base=base) for base in (None, read.nothing))
    rest = f", with {len(claim.support)} others' parts taken out" if claim.support else ""
    level = f"p <= 10^{found.log10_p:.1f} at alpha = {alpha:g}, counting {counts.num_customers:,} customers"
    level += f" and {shares} shares of the carrier" if shares > 1 else ""
    detail = f"T = {found.statistic:.2f}, {level}{rest}"
    with checks.check(f"accusation of {name!r}", detail):
        require(found.log10_p <= math.log10(alpha), f"not significant: {detail}")
        close = abs(found.statistic - claim.statistic) <= _ROUNDING * max(1.0, abs(claim.statistic))
        # Of bundles with an earlier read-out, T may differ; the value found here counts.
        close |= _earlier(bundle)
        require(close, f"T is {found.statistic:.2f} here and {claim.statistic:.2f} in the bundle")
        # Zeros in place of the suspect read like the base alone: what the suspect shares with them does not count.
        lost = f"the base alone reads as this codeword (T is {apart.statistic:.2f} without what it adds)"
        require(apart.log10_p <= math.log10(alpha), lost)
    return Accusation(name, claim.serial, *found)


def _read(
    bundle: Bundle,
    suspect: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    mark: carriers.Mark,
    aligner: reading.Aligner | None,
) -> reading.Read:
    how = bundle.suspect.reading
    if how.align and not aligner:
        raise Fails(f"the owner aligned it by {how.align}: pass --align with your own copy of that function")
    same = reading.Reading(aligner if how.align else None, how.rectify, how.given)
    try:
        return reading.read(suspect, base, mark, same, control=True)
    except errors.SmarkError as error:
        raise Fails(error.desk) from None


def _earlier(bundle: Bundle) -> bool:
    """Whether an earlier version read the suspect, perhaps otherwise."""
    number = bundle.suspect.reading.readout
    return isinstance(number, Missing) or number < reading.READOUT


def _misstated(bundle: Bundle, read: reading.Read) -> str | None:
    """What the bundle misstates about the reading; None when nothing, or when an older version wrote the bundle."""
    suspect = bundle.suspect
    if _earlier(bundle):
        return None
    if suspect.layout != read.layout:
        return "the bundle states another layout than is found here"
    if (suspect.left_out or ()) != read.coverage.left_out:
        return f"the bundle states that other weights were left out than here, where {read.coverage}"
    return None


def _statements(bundle: Bundle) -> tuple[str, ...]:
    stamped = all(item.timestamps for item in bundle.chain)
    made = "base and shape were made without a look at codewords, and are what copies were made from"
    if bundle.drawn:  # both were fixed before anybody could know a codeword
        made = (
            "base and shape are what copies were made from" if bundle.header.shape else "copies were made from the base"
        )
    elif not bundle.header.shape:
        made = "the base was made without a look at codewords, and is what copies were made from"
    age = "the time stamps say how old that is" if stamped else "no time stamp says how old that is"
    return (
        f"that {bundle.num_suspects} suspect(s) were examined together, in {bundle.num_alignments} reading(s) each: "
        "p-values count them",
        f"that it was occasion {bundle.verdict.occasion} of tracing this model: alpha holds for each occasion",
        f"that the suspect was compared with no more than {bundle.customers:,} customers: p-values count them",
        *_drawn.statements(bundle),
        f"that {made}",
        "that the owner published no other commitment to this model, with other codewords, to choose from",
        f"that the suspect is younger than the commitment: {age}, and nothing here says how old the suspect is",
        "that no copy with this codeword was made for anybody but the accused",
    )
