"""Reads a suspect's chips, for the owner and again for an arbiter: layout, alignment, extraction."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _validate, carriers, errors, extraction, files
from smark_jax._types import ApplyFn, PyTree
from smark_jax.vault import documents

# Bundles state the number of the read-out. Number 1, which older bundles leave unstated, had no bounds, and number 2
# matched fewer layouts, and no folded or fused leaves.
READOUT = 3


class Aligner(NamedTuple):
    """How suspects are aligned: the caller's name for the aligner, the base's pure network, and example images."""

    name: str
    apply_fn: ApplyFn
    images: Any


class Reading(NamedTuple):
    """How a suspect is read. Decide on it before tracing, or count every reading in ``tried``.

    Attributes:
      aligner: how to undo rewrites first; None leaves them.
      rectify: as in :func:`smark_jax.extraction.extract`; for models without a shape.
      given: leaves whose place the caller states, as in :func:`smark_jax.files.match_layout`.
    """

    aligner: Aligner | None = None
    rectify: bool = False
    given: Mapping[str, str] = {}

    @property
    def document(self) -> documents.Reading:
        """The reading as verdicts and evidence state it."""
        name = self.aligner.name if self.aligner else None
        return documents.Reading(name, dict(self.given), self.rectify, READOUT)


class Read(NamedTuple):
    """A suspect's chips, and how they were read.

    Attributes:
      chips: float64, shape [m].
      layout: leaves that had another name or layout.
      alignment: the alignment report.
      coverage: how many weights were read, and which were not.
      log_maps: natural logarithm of the number of maps that the given one was chosen from; p-values count them.
      nothing: the chips of the base alone, read from zeros in place of all weights that were read.
      parts: the chips that each requested part of the carrier reads.
      leaves: the weights that were read, by the base's names.
    """

    chips: np.ndarray
    layout: tuple[files.Move, ...]
    alignment: str | None
    coverage: extraction.Coverage
    log_maps: float
    nothing: np.ndarray | None
    parts: tuple[np.ndarray, ...]
    leaves: Mapping[str, np.ndarray]


def read(
    leaves: Mapping[str, np.ndarray],
    base: Mapping[str, np.ndarray],
    mark: carriers.Mark,
    reading: Reading,
    control: bool = False,
    parts: Iterable[carriers.Carrier] = (),
) -> Read:
    """Reads a suspect's chips: layout, alignment if requested, extraction. Arbiters use it too.

    With ``control``, zeros in place of the suspect are read as well. The suspect is also read with each of ``parts`` in
    place of the mark's carrier.

    Raises:
      NothingMatched: when alignment finds that the suspect is no copy of this base.
      Undecided: when the suspect allows no conclusion.
      SmarkError: when the given map names leaves that do not exist, or contradicts content.
    """
    spec = carriers.with_ties(mark.spec, base)
    mark = mark._replace(spec=spec)
    layout = files.match_layout(carriers.with_tied(leaves, spec), base, reading.given)
    found, report = carriers.with_tied(layout.leaves, spec), None
    params: PyTree = files.nest(found)
    if reading.aligner:  # which reads forms that content alone does not show
        from smark_jax import alignment  # here and not above: most suspects are read without

        params = files.nest({**{name: leaves[name] for name in layout.unused if name in leaves}, **found})
        aligned = alignment.align(params, files.nest(base), reading.aligner.apply_fn, reading.aligner.images)
        params, report = _without(aligned.params, aligned.report.left_out), str(aligned.report)
    original: PyTree = files.nest({leaf.path: base[leaf.path] for leaf in spec.leaves})
    coverage = extraction.coverage(params, original, mark)
    if not coverage.read:
        expected = "weights that carry the fingerprint"
        got = f"none of the base's {coverage.weights:,} carrying weights"
        raise _validate.fail("trace", expected, got, f"{str(coverage).capitalize()}.", kind=errors.Undecided)
    every = [mark.carrier, *parts]
    chips, *shares = map(_wide, extraction.extract_parts(params, original, mark, every, reading.rectify))
    read = files.flatten(params)
    nothing = base_alone(read, mark, original) if control else None
    return Read(chips, layout.moves, report, coverage, layout.log_maps, nothing, tuple(shares), read)


def _wide(chips: Any) -> np.ndarray:
    return np.asarray(chips, np.float64)


def base_alone(like: Mapping[str, np.ndarray], mark: carriers.Mark, original: PyTree | None = None) -> np.ndarray:
    """The chips of the base alone, read from zeros in place of these weights: float64, shape [m].

    Args:
      like: leaves; entries that are NaN or infinite in them are left out here too.
      mark: the model's mark.
      original: the base; ``like`` itself by default.
    """
    with np.errstate(invalid="ignore"):  # times 0, NaN stays NaN and infinity becomes NaN
        zeros = files.nest({name: leaf * 0 for name, leaf in like.items()})
    original = files.nest({leaf.path: like[leaf.path] for leaf in mark.spec.leaves}) if original is None else original
    return np.asarray(extraction.extract(zeros, original, mark), np.float64)


def _without(params: PyTree, names: Sequence[str]) -> PyTree:
    return files.nest({name: leaf for name, leaf in files.flatten(params).items() if name not in names})


def maps_in_words(log_maps: float) -> str:
    """States how many leaf maps the given one was chosen from."""
    number = f"{round(math.exp(log_maps)):,}" if log_maps < math.log(1e6) else f"10^{log_maps / math.log(10):.1f}"
    return f"the map given is one of {number} that content would allow: p-values count them all"
