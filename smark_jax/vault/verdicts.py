"""Tracing suspects against all customers of a model, and the verdicts that the vault keeps.

Each call is one occasion: the bound alpha covers all its suspects together (and the readings that the caller says were
tried, ``tried``), not other occasions. A verdict says how many occasions there were for its model so far.
"""

import importlib.metadata
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _validate, alignment, carriers, codes, errors, extraction, files, statistics, tracing
from smark_jax._types import ApplyFn, PyTree
from smark_jax.vault import _text, commitments, folder, models, sealing, store

_WORDS_PER_BLOCK = 1 << 16
COMPARED = ("traced", "nobody")
"""Verdicts on suspects that were compared with customers; the others are no occasion."""
# Bundles say by which read-out chips were read: 1, which they did not say, had no bounds.
_READOUT = 2


class Aligner(NamedTuple):
    """How suspects are aligned: what the caller named it, the base's pure network, and example images."""

    name: str
    apply_fn: ApplyFn
    images: Any


class Reading(NamedTuple):
    """How a suspect is read; fixed before looking, or counted in ``tried``.

    Attributes:
      aligner: undo rewrites first.
      rectify: as :func:`smark_jax.extraction.extract` takes it.
      given: leaves whose place the caller states, as :func:`smark_jax.files.match_layout` takes them.
    """

    aligner: Aligner | None = None
    rectify: bool = False
    given: Mapping[str, str] = {}

    def document(self) -> dict[str, Any]:
        """The reading as verdicts and evidence state it."""
        name = self.aligner.name if self.aligner else None
        return {"align": name, "given": dict(self.given), "rectify": self.rectify, "readout": _READOUT}


class Read(NamedTuple):
    """A suspect's chips, and how they were read.

    Attributes:
      chips: float64, shape [m].
      layout: leaves that had another name or layout.
      alignment: its report.
      coverage: how many weights were read, and which were not.
      log_maps: natural logarithm of the maps that the given one was chosen from; p-values count them.
      nothing: the chips that zeros in place of all weights that were read would give: those of the base alone.
    """

    chips: np.ndarray
    layout: tuple[files.Move, ...]
    alignment: str | None
    coverage: extraction.Coverage
    log_maps: float
    nothing: np.ndarray | None = None


def read(
    leaves: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    mark: carriers.Mark,
    reading: Reading,
    control: bool = False,
) -> Read:
    """A suspect's chips: layout, alignment where it is asked for, extraction. An arbiter's reading is this one too.

    With ``control``, zeros are read in the suspect's place as well.

    Raises:
      NothingMatched: when alignment finds that it is no copy of this base.
      Undecided: when nothing can be said.
      SmarkError: when the map given is no map, or contradicts content.
    """
    spec = carriers.with_ties(mark.spec, base)
    mark = mark._replace(spec=spec)
    layout = files.match_layout(*_once(leaves, base, spec), reading.given)
    params: PyTree = files.nest(carriers.with_tied(layout.leaves, spec))
    report = None
    if reading.aligner:
        aligned = alignment.align(params, files.nest(base), reading.aligner.apply_fn, reading.aligner.images)
        params, report = _without(aligned.params, aligned.report.left_out), str(aligned.report)
    original: PyTree = files.nest({leaf.path: base[leaf.path] for leaf in spec.leaves})
    coverage = extraction.coverage(params, original, mark)
    if not coverage.read:
        expected = "weights that carry the fingerprint"
        got = f"none of the base's {coverage.weights:,} carrying weights"
        raise _validate.fail("trace", expected, got, f"{str(coverage).capitalize()}.", kind=errors.Undecided)
    chips = extraction.extract(params, original, mark, reading.rectify)
    nothing = base_alone(files.flatten(params), mark, original) if control else None
    return Read(np.asarray(chips, np.float64), layout.moves, report, coverage, layout.log_maps, nothing)


def _once(
    leaves: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], spec: carriers.Spec
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Suspect and base for :func:`files.match_layout`, which cannot tell the two places of one tied tensor apart.

    Where the suspect has other names, both have each tied tensor once.
    """
    leaves = carriers.with_tied(leaves, spec)
    tied = {name for leaf in spec.leaves for name in leaf.tied}
    if tied <= leaves.keys():
        return leaves, dict(base)
    sizes = {base[name].size for name in tied}
    first: dict[tuple[str, bytes], str] = {}
    for name, leaf in leaves.items():
        if leaf.size in sizes:
            first.setdefault((str((leaf.shape, leaf.dtype)), leaf.tobytes()), name)
    once = set(first.values())
    kept = {name: leaf for name, leaf in leaves.items() if leaf.size not in sizes or name in once}
    return kept, {name: leaf for name, leaf in base.items() if name not in tied}


def base_alone(like: Mapping[str, np.ndarray], mark: carriers.Mark, original: PyTree | None = None) -> np.ndarray:
    """The chips that zeros in place of these weights would give, float64, shape [m]: those of the base alone.

    Args:
      like: leaves; what is NaN or infinite in them is left out here too.
      mark: the model's mark.
      original: the base; ``like`` itself by default.
    """
    with np.errstate(invalid="ignore"):  # NaN stays NaN, and what is infinite becomes it
        zeros = files.nest({name: leaf * 0 for name, leaf in like.items()})
    original = files.nest({leaf.path: like[leaf.path] for leaf in mark.spec.leaves}) if original is None else original
    return np.asarray(extraction.extract(zeros, original, mark), np.float64)


def _without(params: PyTree, names: Sequence[str]) -> PyTree:
    return files.nest({name: leaf for name, leaf in files.flatten(params).items() if name not in names})


def trace(
    vault: folder.Vault,
    name: str,
    suspects: Sequence[Path],
    reading: Reading | None = None,
    *,
    alpha: float | None = None,
    tried: int = 1,
    on_suspect: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Traces suspects against everybody who was issued a copy, and keeps the verdict.

    Args:
      vault: an open vault.
      name: of the model.
      suspects: files of weights. One that cannot be read does not stop the others, and is no suspect: where none can
        be read, no verdict is kept and no occasion counted.
      reading: how to read them.
      alpha: level; the committed one by default. Evidence is judged at the committed one whatever this is.
      tried: readings of these suspects that were tried on other occasions and this one; p-values count them.
      on_suspect: called with what is done next.

    Returns:
      The verdict document, as :func:`get` has it; its number is None where none was kept. A suspect's ``verdict`` is
      ``"traced"`` or ``"nobody"`` where it was compared with the customers; otherwise ``"not a copy"`` (alignment found
      it to be none of this base), ``"undecided"`` (it was read, and nothing can be said of it) or ``"unreadable"``.

    Raises:
      SmarkError: when there are no suspects, no such model, no copy of it was issued, or the map given is no map of a
        suspect's leaves or contradicts their content.
    """
    _validate.positive("trace", "the number of suspects", len(suspects))
    reading = reading or Reading()
    model = models.get(vault, name)
    committed(vault, name)
    base, mark = models.base(vault, model), models.mark(vault, model)
    rows, chips = [], []
    needed = _needed(vault, model, model.alpha if alpha is None else alpha)
    for path in suspects:
        on_suspect(f"reading {path.name}")
        row: dict[str, Any] = {"file": str(path), "sha256": None, "content": None, "format": None, "read": "weights"}
        try:
            weights = files.read(path, strict=False)
        except errors.Unreadable as error:
            rows.append({**row, **_not_compared("unreadable", error)})
            continue
        row |= {"sha256": weights.sha256, "content": files.content_hash(weights.leaves), "format": weights.format}
        row |= {"foreign": list(weights.foreign)}
        try:
            found = read(weights.leaves, base, mark, reading)
            _enough(found.coverage, needed)
        except errors.NothingMatched as error:
            rows.append({**row, **_not_compared("not a copy", error)})
        except errors.Undecided as error:
            rows.append({**row, **_not_compared("undecided", error)})
        else:
            chips.append(found.chips)
            rows.append({**row, **_described(found)})
    return judge(vault, model, rows, chips, reading, alpha=alpha, tried=tried, on_suspect=on_suspect)


def _not_compared(verdict: str, error: errors.SmarkError) -> dict[str, Any]:
    return {"verdict": verdict, "error": error.desk, "accused": []}


def _described(found: Read) -> dict[str, Any]:
    """How a suspect was read, as verdicts state it."""
    left_out = [left._asdict() for left in found.coverage.left_out]
    return {
        "error": None,
        "layout": [move._asdict() for move in found.layout],
        "alignment": found.alignment,
        "coverage": {name: getattr(found.coverage, name) for name in ("weights", "read", "bounded", "bound")},
        "left_out": left_out,
        "log_maps": found.log_maps,
    }


def _needed(vault: folder.Vault, model: models.Model, alpha: float) -> int:
    """How many carrying weights must be left for anybody to be accused, were the suspect the only one."""
    _validate.probability("trace", "alpha", alpha)
    customers = len(_serials(vault, model.name, committed(vault, model.name)))
    threshold = statistics.threshold(np.ones(model.num_chips), math.log(alpha) - math.log(customers))
    return extraction.least_weights(model.num_chips, threshold)


def _enough(coverage: extraction.Coverage, needed: int) -> None:
    if coverage.read < needed:
        expected = f"at least {needed:,} carrying weights (with fewer, an intact copy would accuse nobody)"
        got = f"{coverage.read:,} of {coverage.weights:,}"
        raise _validate.fail("trace", expected, got, f"{str(coverage).capitalize()}.", kind=errors.Undecided)


def maps_in_words(log_maps: float) -> str:
    """How many maps of leaves a given one was chosen from."""
    number = f"{round(math.exp(log_maps)):,}" if log_maps < math.log(1e6) else f"10^{log_maps / math.log(10):.1f}"
    return f"the map given is one of {number} that content would allow: p-values count them all"


def committed(vault: folder.Vault, name: str) -> commitments.Commitment:
    """The newest commitment to a model, whose customers are those that a suspect is compared with.

    Raises:
      SmarkError: when no copy was issued.
    """
    commitment = commitments.latest(vault, name)
    if commitment is None:
        raise _validate.fail("trace", f"a model with customers, not {name}", "one without", "Run 'smark issue' first.")
    return commitment


def judge(
    vault: folder.Vault,
    model: models.Model,
    rows: Sequence[dict[str, Any]],
    chips: Sequence[np.ndarray],
    reading: Reading,
    *,
    alpha: float | None,
    tried: int,
    asked: np.ndarray | None = None,
    on_suspect: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Verdicts on what was read, and their record.

    ``rows`` describe the suspects; those not yet judged have chips. Where only some chips were ``asked`` for, these are
    compared with the same part of the codewords.
    """
    commitment = committed(vault, model.name)
    serials = _serials(vault, model.name, commitment)
    names = {customer.serial: customer.name for customer in store.customers(vault.connection)}
    level = model.alpha if alpha is None else alpha
    on_suspect(f"comparing with {len(serials):,} customers")
    found: list[tracing.Verdict] = []
    if chips:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the decoys' alarm, which the document states
            log_maps = [row.get("log_maps", 0.0) for row in rows if "verdict" not in row]
            found = list(_trace(vault, model, np.stack(chips), serials, level, tried, log_maps, asked))
    judged = zip(found, chips, strict=True)
    documents, blobs = [], []
    for row in rows:
        if "verdict" in row:
            documents.append(row)
            blobs.append((b"", b""))
            continue
        verdict, soft = next(judged)
        documents.append({**row, **_findings(verdict, names)})
        blobs.append((np.asarray(verdict.statistics, "<f4").tobytes(), np.asarray(soft, "<f8").tobytes()))
    head = {
        "smark_version": importlib.metadata.version("smark-jax"),
        "model": model.name,
        "num_customers": len(serials),
        "num_chips": model.num_chips,
        "alpha": level,
        "decoder": models.DECODER,
        "base_sha256": model.base,
        "strength": model.strength,
        "commitment": {
            "number": commitment.number,
            "root": commitment.root,
            "created": commitment.header["created"],
        },
        "reading": reading.document(),
    }
    if all(row["verdict"] == "unreadable" for row in documents):
        return {"number": None, "created": _text.now(), **head, "occasion": None, "suspects": documents}
    return _record(vault, head, documents, blobs)


def _serials(vault: folder.Vault, name: str, commitment: commitments.Commitment) -> list[int]:
    """The customers whom a commitment covers."""
    return store.covered(vault.connection, name, commitment.number)


def _trace(
    vault: folder.Vault,
    model: models.Model,
    chips: np.ndarray,
    serials: list[int],
    alpha: float,
    tried: int,
    log_maps: Sequence[float],
    asked: np.ndarray | None,
) -> tuple[tracing.Verdict, ...]:
    key = models.code_key(vault, model.name)
    counts = {"num_alignments": tried, "log_maps": log_maps}
    if asked is None and serials == list(range(len(serials))):
        book = codes.Codebook(key, len(serials), model.num_chips)
        return tracing.trace_batch(chips, book, alpha, models.DECODER, **counts)
    columns = slice(None) if asked is None else asked
    blocks = (serials[start : start + _WORDS_PER_BLOCK] for start in range(0, len(serials), _WORDS_PER_BLOCK))
    words = np.concatenate([np.asarray(codes.codebook(key, some, model.num_chips))[:, columns] for some in blocks])
    return tracing.trace_batch(chips[:, columns], words, alpha, models.DECODER, serials=serials, **counts)


def _findings(verdict: tracing.Verdict, names: Mapping[int, str]) -> dict[str, Any]:
    return {
        "verdict": "traced" if verdict.accused else "nobody",
        "accused": [{"customer": names[accused.serial], **accused._asdict()} for accused in verdict.accused],
        "threshold": verdict.threshold if math.isfinite(verdict.threshold) else None,
        "decoys": verdict.decoys._asdict(),
        "num_suspects": verdict.num_suspects,
        "num_alignments": verdict.num_alignments,
        "assumptions": verdict.assumptions,
    }


def _record(
    vault: folder.Vault, head: dict[str, Any], suspects: Sequence[dict[str, Any]], blobs: Sequence[tuple[bytes, bytes]]
) -> dict[str, Any]:
    created = _text.now()
    with store.transaction(vault.connection):
        number = store.last_verdict(vault.connection) + 1
        compared = any(row["verdict"] in COMPARED for row in suspects)
        occasion = store.last_occasion(vault.connection, head["model"]) + compared
        document = _text.canonical({**head, "occasion": occasion}).decode()
        rows = [
            sealing.row(vault.master, number, place, _text.canonical(row).decode(), *some)
            for place, (row, some) in enumerate(zip(suspects, blobs, strict=True))
        ]
        tables = {"verdicts": [(number, head["model"], created, document)], "findings": rows}
        accused = sorted({accused["serial"] for row in suspects for accused in row["accused"]})
        folder.record(vault, "suspects traced", tables, model=head["model"], verdict=number, accused=accused)
    return get(vault, number)


def get(vault: folder.Vault, number: int) -> dict[str, Any]:
    """The verdict document of this number, with every customer's statistic.

    Raises:
      SmarkError: when there is none.
    """
    row = store.verdict(vault.connection, number)
    if row is None:
        last = store.last_verdict(vault.connection)
        cause = f"Verdicts 1 to {last} are there." if last else "'smark trace' makes the first."
        raise _validate.fail("vault", "the number of a verdict", f"{number}, which there is not", cause)
    head = json.loads(row.document)
    customers = store.covered_names(vault.connection, row.model, head["commitment"]["number"])
    who = {"serials": list(customers), "customers": list(customers.values())}
    suspects = []
    for finding in store.findings(vault.connection, number):
        suspect = json.loads(sealing.unseal(vault.master, finding, "document"))
        values = sealing.unseal(vault.master, finding, "statistics")
        if values:
            suspect |= {"statistics": np.frombuffer(values, "<f4").astype(float).tolist(), **who}
        suspects.append(suspect)
    return {"number": number, "created": row.created, **head, "suspects": suspects}


def chips(vault: folder.Vault, number: int, place: int) -> np.ndarray:
    """The chips that a suspect of a verdict read, float64, shape [m]; empty when it could not be read."""
    finding = store.finding(vault.connection, number, place)
    return np.frombuffer(sealing.unseal(vault.master, finding, "chips"), "<f8")
