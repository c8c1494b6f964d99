"""Traces suspects against all customers of a model, and keeps the verdicts in the vault.

Each call is one occasion. The bound alpha covers all suspects of that call together, and the number of readings that
the caller reports in ``tried``; it does not cover other occasions. A verdict states how many occasions its model has
had so far.
"""

import functools
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smark_jax import _documents, _validate, errors, extraction, files, statistics, tracing
from smark_jax.vault import commitments, documents, folder, models, sealing, store
from smark_jax.vault.documents import Suspect, Verdict
from smark_jax.vault.reading import Read, Reading, read

_WORDS_PER_BLOCK = 1 << 16
COMPARED = ("traced", "nobody")
"""Verdicts on suspects that were compared with customers; only these count as an occasion."""
PENDING = ""
"""The verdict of a suspect that was read and not yet judged."""


class Judged(NamedTuple):
    """A suspect's part of a verdict, with the arrays that are stored apart from its document.

    Attributes:
      suspect: the document.
      statistics: T of every customer, float32; empty when the suspect was not compared.
      chips: the suspect's chips, float64, shape [m]; empty when it was not compared.
      parts: the chips that each part of the carrier reads which evidence may open, likewise.
    """

    suspect: Suspect
    statistics: np.ndarray = np.zeros(0, "<f4")
    chips: np.ndarray = np.zeros(0, "<f8")
    parts: tuple[np.ndarray, ...] = ()


def trace(
    model: models.OpenModel,
    suspects: Sequence[Path],
    reading: Reading | None = None,
    *,
    alpha: float | None = None,
    tried: int = 1,
    on_suspect: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Traces suspects against every customer who was issued a copy, and keeps the verdict.

    Args:
      model: of an open vault.
      suspects: files of weights. An unreadable file does not stop the others and does not count as a suspect. When no
        file can be read, no verdict is kept and no occasion is counted.
      reading: how to read them.
      alpha: the level; by default the committed one. Evidence is always judged at the committed level.
      tried: how many readings of these suspects were tried in all, including this one; p-values count them.
      on_suspect: called with a description of the next step.

    Returns:
      The verdict, as :func:`get` returns it; its number is None when it was not kept. A suspect's ``verdict`` is
      ``"traced"`` or ``"nobody"`` when it was compared with the customers. Otherwise it is ``"not a copy"`` (alignment
      found that it is no copy of this base), ``"undecided"`` (it was read but allows no conclusion) or
      ``"unreadable"``.

    Raises:
      SmarkError: when there are no suspects, no copy of the model was issued, ``reading`` rectifies although the model
        has a shape, or the given map names leaves that do not exist or contradicts their content.
    """
    _validate.positive("trace", "the number of suspects", len(suspects))
    reading = reading or Reading()
    if reading.rectify and model.settings.shape:
        cause = "Models with a shape have one reading, which weighs by itself: leave --rectify out."
        raise _validate.fail("trace", "a model without a shape, to rectify", f"{model.name}, which has one", cause)
    needed = _needed(model, model.settings.alpha if alpha is None else alpha)
    rows, chips, parts = [], [], []
    for path in suspects:
        on_suspect(f"reading {path.name}")
        row, found = _examined(model, path, reading, needed)
        rows.append(row)
        if found is not None:
            chips.append(found.chips)
            parts.append(found.parts)
    return judge(model, rows, chips, reading, alpha=alpha, tried=tried, parts=parts, on_suspect=on_suspect)


def _examined(model: models.OpenModel, path: Path, reading: Reading, needed: int) -> tuple[Suspect, Read | None]:
    """A suspect before it is compared with customers, and what was read; None when it cannot be compared."""
    row = Suspect(str(path), None, None, None, read="weights", verdict=PENDING, error=None, accused=())
    try:
        weights = files.read(path, strict=False)
    except errors.Unreadable as error:
        return row._replace(verdict="unreadable", error=error.desk), None
    content = files.content_hash(weights.leaves)
    row = row._replace(
        sha256=weights.sha256,
        content=content,
        format=weights.format,
        foreign=tuple(weights.foreign),
    )
    try:
        # Parts are made one by one: each is as large as the carrier.
        parts = map(model.mark.carrier.part, model.parts(content))
        found = read(weights.leaves, model.base, model.mark, reading, parts=parts)
        _enough(found.coverage, needed)
    except errors.NothingMatched as error:
        return row._replace(verdict="not a copy", error=error.desk), None
    except errors.Undecided as error:
        return row._replace(verdict="undecided", error=error.desk), None
    return _described(row, found), found


def _described(row: Suspect, found: Read) -> Suspect:
    """The suspect, with a record of how it was read."""
    coverage = found.coverage
    return row._replace(
        layout=found.layout,
        alignment=found.alignment,
        coverage=documents.Coverage(coverage.weights, coverage.read, coverage.bounded, coverage.bound),
        left_out=coverage.left_out,
        log_maps=found.log_maps,
    )


def _needed(model: models.OpenModel, alpha: float) -> int:
    """The fewest carrying weights with which anybody could be accused, if this were the only suspect."""
    _validate.probability("trace", "alpha", alpha)
    customers = committed(model).header.customers
    num_chips = model.settings.num_chips
    threshold = statistics.threshold(np.ones(num_chips), math.log(alpha) - math.log(customers))
    return extraction.least_weights(num_chips, threshold)


def _enough(coverage: extraction.Coverage, needed: int) -> None:
    if coverage.read < needed:
        expected = f"at least {needed:,} carrying weights (with fewer, an intact copy would accuse nobody)"
        got = f"{coverage.read:,} of {coverage.weights:,}"
        raise _validate.fail("trace", expected, got, f"{str(coverage).capitalize()}.", kind=errors.Undecided)


def committed(model: models.OpenModel) -> documents.Commitment:
    """The newest commitment to a model; suspects are compared with the customers it covers.

    Raises:
      SmarkError: when no copy was issued.
    """
    commitment = commitments.latest(model.vault, model.name)
    if commitment is None:
        got = f"{model.name}, of which nobody has one"
        raise _validate.fail("trace", "a model of which customers have copies", got, "Run 'smark issue' first.")
    return commitment


def judge(
    model: models.OpenModel,
    rows: Sequence[Suspect],
    chips: Sequence[np.ndarray],
    reading: Reading,
    *,
    alpha: float | None,
    tried: int,
    asked: np.ndarray | None = None,
    parts: Sequence[tuple[np.ndarray, ...]] = (),
    on_suspect: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Judges suspects that were read, and records the verdict.

    ``rows`` are the suspects; those whose verdict is :data:`PENDING` have chips. When only the chips in ``asked`` were
    read, they are compared with the same part of each codeword. ``parts`` are what parts of the carrier read in each
    suspect that has chips; they are kept for evidence, and compared with nobody.
    """
    vault, settings, commitment = model.vault, model.settings, committed(model)
    serials = store.covered(vault.connection, model.name, commitment.number)
    level = settings.alpha if alpha is None else alpha
    on_suspect(f"comparing with {len(serials):,} customers")

    def on_progress(done: int, total: int) -> None:
        on_suspect(f"comparing with customers: {done:,} of {total:,}")

    found: Sequence[tracing.Verdict] = ()
    if chips:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the decoys' alarm: the document states it anyway
            log_maps = [row.log_maps or 0.0 for row in rows if row.verdict == PENDING]
            found = _trace(model, np.stack(chips), serials, level, tried, log_maps, asked, on_progress)
    names = functools.partial(store.name, vault.connection)
    judged = zip(found, chips, parts or [()] * len(chips), strict=True)
    findings = [_judged(row, *next(judged), names) if row.verdict == PENDING else Judged(row) for row in rows]
    verdict = Verdict(
        number=None,
        created=_documents.now(),
        smark_version=importlib.metadata.version("smark-jax"),
        model=model.name,
        num_customers=len(serials),
        num_chips=settings.num_chips,
        alpha=level,
        decoder=model.decoder,
        base_sha256=settings.base,
        strength=settings.strength,
        commitment=documents.CommitmentNamed(commitment.number, commitment.root, commitment.header.created),
        reading=reading.document,
        occasion=None,
        suspects=tuple(finding.suspect for finding in findings),
    )
    if all(suspect.verdict == "unreadable" for suspect in verdict.suspects):
        return verdict
    return _record(vault, verdict, findings)


def _trace(
    model: models.OpenModel,
    chips: np.ndarray,
    serials: Sequence[int],
    alpha: float,
    tried: int,
    log_maps: Sequence[float],
    asked: np.ndarray | None,
    on_progress: Callable[[int, int], None],
) -> tuple[tracing.Verdict, ...]:
    trace = functools.partial(tracing.trace_batch, num_alignments=tried, log_maps=log_maps, on_progress=on_progress)
    if asked is None and serials == range(len(serials)):
        return trace(chips, model.book(len(serials)), alpha, model.decoder)
    columns = slice(None) if asked is None else asked
    blocks = (serials[start : start + _WORDS_PER_BLOCK] for start in range(0, len(serials), _WORDS_PER_BLOCK))
    words = np.concatenate([model.words(some)[:, columns] for some in blocks])
    return trace(chips[:, columns], words, alpha, model.decoder, serials=serials)


def _judged(
    row: Suspect,
    found: tracing.Verdict,
    chips: np.ndarray,
    parts: tuple[np.ndarray, ...],
    name: Callable[[int], str],
) -> Judged:
    """A suspect that was read, completed with its verdict and arrays."""
    suspect = row._replace(
        verdict="traced" if found.accused else "nobody",
        accused=tuple(documents.Accused(name(accused.serial), *accused) for accused in found.accused),
        threshold=found.threshold if math.isfinite(found.threshold) else None,
        decoys=found.decoys,
        num_suspects=found.num_suspects,
        num_alignments=found.num_alignments,
        assumptions=found.assumptions,
    )
    kept = parts if found.accused else ()
    return Judged(suspect, np.asarray(found.statistics, "<f4"), np.asarray(chips, "<f8"), kept)


def _record(vault: folder.Vault, verdict: Verdict, findings: Sequence[Judged]) -> Verdict:
    with store.transaction(vault.connection):
        number = store.last_verdict(vault.connection) + 1
        compared = any(suspect.verdict in COMPARED for suspect in verdict.suspects)
        occasion = store.last_occasion(vault.connection, verdict.model) + compared
        document = documents.plain(verdict._replace(occasion=occasion))
        for kept_apart in ("number", "created", "suspects"):
            del document[kept_apart]
        rows = [
            sealing.row(
                vault.master,
                number,
                place,
                documents.text(finding.suspect),
                finding.statistics.tobytes(),
                np.concatenate([finding.chips, *finding.parts]).astype("<f8").tobytes(),
            )
            for place, finding in enumerate(findings)
        ]
        row = store.Verdict(number, verdict.model, verdict.created, documents.text(document))
        accused = sorted({accused.serial for suspect in verdict.suspects for accused in suspect.accused})
        tables = {"verdicts": [row], "findings": rows}
        folder.record(vault, "suspects traced", tables, model=verdict.model, verdict=number, accused=accused)
    return get(vault, number)


def get(vault: folder.Vault, number: int, *, everybody: bool = False) -> Verdict:
    """The verdict of this number; with ``everybody``, each suspect has every customer's serial, name and statistic.

    Raises:
      SmarkError: when there is none.
    """
    row = store.verdict(vault.connection, number)
    if row is None:
        last = store.last_verdict(vault.connection)
        some = f"verdicts 1 to {last}" if last > 1 else "verdict 1 alone"
        cause = f"This vault holds {some}." if last else "'smark trace' makes the first."
        raise _validate.fail("vault", "the number of a verdict", f"{number}, which does not exist", cause)
    verdict = documents.stored(Verdict, row.document, number=number, created=row.created, suspects=[])
    customers = store.covered_names(vault.connection, row.model, verdict.commitment.number) if everybody else {}
    serials, names = list(customers), list(customers.values())
    suspects = []
    for finding in store.findings(vault.connection, number):
        suspect = documents.stored(Suspect, sealing.unseal(vault.master, finding, "document"))
        values = np.frombuffer(sealing.unseal(vault.master, finding, "statistics") if everybody else b"", "<f4")
        if values.size:
            suspect = suspect._replace(statistics=values.astype(float).tolist(), serials=serials, customers=names)
        suspects.append(suspect)
    return verdict._replace(suspects=tuple(suspects))


def chips(vault: folder.Vault, verdict: Verdict, place: int) -> np.ndarray:
    """The chips read from a suspect of a verdict, float64; shape [0, m] when it could not be read.

    Row 0 is what the whole carrier reads. An accused suspect of a model whose carrier has pieces has a further row for
    each part that evidence may open, smallest first.
    """
    finding = store.finding(vault.connection, verdict.number or 0, place)
    return np.frombuffer(sealing.unseal(vault.master, finding, "chips"), "<f8").reshape(-1, verdict.num_chips)
