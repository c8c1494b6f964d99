"""Verdicts: what tracing found about each suspect."""

from typing import NamedTuple

from smark_jax import extraction, files, tracing
from smark_jax._documents import MISSING, Hash, Missing


class Reading(NamedTuple):
    """How suspects were read (:class:`smark_jax.vault.verdicts.Reading`)."""

    align: str | None
    given: dict[str, str]
    rectify: bool
    readout: int | Missing = MISSING


class Accused(NamedTuple):
    """An accused customer (:class:`smark_jax.tracing.Accusation`)."""

    customer: str
    serial: int
    statistic: float
    p_value: float
    log10_p: float
    share: float


class Coverage(NamedTuple):
    """How many weights of a suspect were read (:class:`smark_jax.extraction.Coverage`)."""

    weights: int
    read: int
    bounded: int
    bound: float


class Answers(NamedTuple):
    """What a suspect was asked: how many of all probes, from when to when, and how many each target had seen before."""

    asked: int
    of: int
    from_: str
    to: str
    seen_before: dict[str, int]


class Suspect(NamedTuple):
    """One suspect of a verdict.

    Attributes:
      file: its path, or the address or command that answered.
      sha256: of the file; null when it could not be read.
      content: hash of its leaves; null when there are none.
      format: of the file, or ``"answers"``.
      read: ``"weights"`` or ``"answers"``.
      verdict: ``"traced"``, ``"nobody"``, ``"not a copy"``, ``"undecided"`` or ``"unreadable"``.
      error: why it was not compared with customers.
      accused: the accused, most significant first.
      foreign: tensors that were left out because they do not hold real numbers.
      layout: leaves that had another name or layout.
      alignment: the alignment report.
      coverage: how many weights were read.
      left_out: the weights that were not read.
      log_maps: natural logarithm of the number of leaf maps that the given one was chosen from.
      answers: what was asked.
      notes: what a reader of the verdict must know.
      threshold: the absolute T at which a customer acting alone is accused; null when nobody can be.
      decoys: the statistics of codewords that nobody received.
      num_suspects: how many suspects were examined together.
      num_alignments: how many readings were tried.
      assumptions: what the bound assumes, in words.
      statistics: T of every customer. It is stored apart, as are ``serials`` and ``customers``.
      serials: the serials of those customers, in the same order.
      customers: their names.
    """

    file: str
    sha256: Hash | None
    content: Hash | None
    format: str | None
    read: str
    verdict: str
    error: str | None
    accused: tuple[Accused, ...]
    foreign: tuple[str, ...] | Missing = MISSING
    layout: tuple[files.Move, ...] | Missing = MISSING
    alignment: str | Missing | None = MISSING
    coverage: Coverage | Missing = MISSING
    left_out: tuple[extraction.LeftOut, ...] | Missing = MISSING
    log_maps: float | Missing = MISSING
    answers: Answers | Missing = MISSING
    notes: tuple[str, ...] | Missing = MISSING
    threshold: float | Missing | None = MISSING
    decoys: tracing.Decoys | Missing = MISSING
    num_suspects: int | Missing = MISSING
    num_alignments: int | Missing = MISSING
    assumptions: str | Missing = MISSING
    statistics: list[float] | Missing = MISSING
    serials: list[int] | Missing = MISSING
    customers: list[str] | Missing = MISSING


class CommitmentNamed(NamedTuple):
    """Which commitment a verdict was reached under."""

    number: int
    root: Hash
    created: str


class Verdict(NamedTuple):
    """A verdict; its number and occasion are null when no suspect could be read, so that it was not kept."""

    number: int | None
    created: str
    smark_version: str
    model: str
    num_customers: int
    num_chips: int
    alpha: float
    decoder: str
    base_sha256: Hash
    strength: float
    commitment: CommitmentNamed
    reading: Reading
    occasion: int | None
    suspects: tuple[Suspect, ...]
