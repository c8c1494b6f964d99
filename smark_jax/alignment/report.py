"""The result of alignment: the aligned suspect and a report, or the reason why there is none."""

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from smark_jax import _validate, errors
from smark_jax._types import PyTree

Refusal = TypeVar("Refusal", errors.NothingMatched, errors.Undecided)


class SpaceReport(NamedTuple):
    """The alignment of one set of interchangeable channels.

    Attributes:
      places: path and axis of its entries, as ``"path[axis]"``.
      units: of the base.
      suspect_units: of the suspect.
      matched: how many of the base's units were found.
      moved: how many of these were found at another place.
    """

    places: tuple[str, ...]
    units: int
    suspect_units: int
    matched: int
    moved: int


class Report(NamedTuple):
    """The findings of an alignment.

    Attributes:
      spaces: each set of interchangeable channels.
      similarity: cosine between the aligned suspect's kernels and the base's, weighted by size; 1 for the base itself.
      similarities: the same for each kernel.
      alike: the kernels that resemble the base's as a copy's do: more than those of other networks, and than by chance.
      scale_range: smallest and largest factor that was removed from a channel's weights.
      from_base: uninformative leaves, replaced by the base's: they read as unchanged.
      renamed: the suspect's name of each leaf whose name differs.
      unfollowed: operations that the pass over the network could not follow; channels that they touch were left alone.
      left_out: leaves that the suspect lacks, or has in a shape that no width explains; the base's take their place.
      changed: what was done to leaves that the suspect has in another form, such as fused projections, in words.
      merged: those of ``left_out`` that counted as merged into kernels: gains as ones, shifts as zeros.
    """

    spaces: tuple[SpaceReport, ...]
    similarity: float
    similarities: Mapping[str, float]
    alike: tuple[str, ...]
    scale_range: tuple[float, float]
    from_base: tuple[str, ...]
    renamed: Mapping[str, str]
    unfollowed: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    changed: Mapping[str, str] = {}
    merged: tuple[str, ...] = ()

    def __str__(self) -> str:
        units, theirs = sum(s.units for s in self.spaces), sum(s.suspect_units for s in self.spaces)
        matched, moved = sum(s.matched for s in self.spaces), sum(s.moved for s in self.spaces)
        lines = [
            f"{matched} of {units} channels matched, {moved} of them moved, {theirs - matched} others left out; "
            f"similarity {self.similarity:.3f}; scales {self.scale_range[0]:.3g} to {self.scale_range[1]:.3g}"
        ]
        lines += [f"renamed: {theirs} is {ours}" for ours, theirs in self.renamed.items()]
        lines += [f"in another form: {path} ({change})" for path, change in self.changed.items()]
        lines += [f"taken from the base: {', '.join(self.from_base)}"] if self.from_base else []
        lines += [f"merged into kernels: {', '.join(self.merged)}"] if self.merged else []
        gone = [path for path in self.left_out if path not in self.merged]
        lines += [f"left out: {', '.join(gone)}"] if gone else []
        lines += [f"not followed: {', '.join(self.unfollowed)}"] if self.unfollowed else []
        return "\n".join(lines)


class Alignment(NamedTuple):
    """An aligned suspect.

    Attributes:
      params: the suspect's weights in the base's structure, order and scale.
      report: the findings.
    """

    params: PyTree
    report: Report


def undecided(expected: str, got: str, cause: str, attempt: Alignment | None = None) -> errors.Undecided:
    """An error that says why alignment could not decide; ``attempt`` is the best alignment found."""
    return refused(errors.Undecided, expected, got, cause, attempt)


def refused(kind: type[Refusal], expected: str, got: str, cause: str, attempt: Alignment | None) -> Refusal:
    """An error of alignment; ``attempt`` is the best alignment found."""
    refusal = _validate.fail("align", expected, got, cause, kind=kind)
    refusal.attempt = attempt
    return refusal
