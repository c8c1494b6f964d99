"""Renders a verdict document as an HTML page."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _foreign, _validate
from smark_jax.report import chart, words

with _validate.needs("report", "report"):
    import jinja2
    import markupsafe

_ALL_ROWS = 60  # the table lists all customers if there are at most this many
_TOP_ROWS = 20  # how many of the largest statistics it lists otherwise
_MOVES = 400  # the most rows of a layout table
_KINDS = {
    "traced": "traced",
    "nobody": "with nobody accused",
    "not a copy": "not a copy of the base",
    "undecided": "undecided",
    "unreadable": "could not be read",
}

_REQUIRED = ("number", "created", "model", "num_customers", "alpha", "base_sha256", "suspects")
_REQUIRED_OF_SUSPECT = ("file", "verdict")


class Row(NamedTuple):
    """A customer in the table of statistics."""

    customer: str
    serial: int
    statistic: float
    accused: bool


class Suspect(NamedTuple):
    """A suspect as the template shows it.

    Attributes:
      document: the suspect's part of the verdict document.
      name: the file's name without folders, or the whole address of a service.
      verdict: ``"traced"``, ``"nobody"``, ``"not a copy"``, ``"undecided"`` or ``"unreadable"``.
      accused: the accusations, most significant first.
      weakest: the largest of their log10 p-values; 0 when nobody is accused.
      picture: inline SVG; None when statistics were not kept.
      binned: whether the picture is a histogram.
      rows: the rows of the table of statistics, largest absolute value first.
      complete: whether the table lists every customer.
      error: what went wrong and what to do about it, line by line.
      alignment: what was undone before reading, line by line.
      moves: the assignment of layers that were moved or renamed; at most the first 400.
      compared: whether it was compared with the customers.
      left_out: leaves with weights that were not read; at most the first 400.
    """

    document: Mapping[str, Any]
    name: str
    verdict: str
    accused: list[Mapping[str, Any]]
    weakest: float
    picture: markupsafe.Markup | None
    binned: bool
    rows: list[Row]
    complete: bool
    error: list[str]
    alignment: list[str]
    moves: list[Mapping[str, str]]
    compared: bool
    left_out: list[Mapping[str, Any]]


def render(document: Mapping[str, Any]) -> str:
    """Renders the report of a verdict as one self-contained HTML file.

    Args:
      document: the verdict document that ``smark trace`` stores. Statistics may be lists or arrays; beyond 2,000
        customers they are drawn as a histogram with the accused, so that the file stays small.

    Returns:
      The page as text; write it as UTF-8.

    Raises:
      SmarkError: when the document lacks a required field, or a suspect's verdict has an unknown name.

    Examples:
      >>> from smark_jax import report
      >>> suspect = {"file": "leak.safetensors", "verdict": "unreadable", "error": "The file is empty."}
      >>> page = report.render({"number": 1, "created": "2026-11-25T18:00:00Z", "model": "digits", "alpha": 1e-6,
      ...                       "num_customers": 20, "base_sha256": "ab" * 32, "suspects": [suspect]})
      >>> "The suspect file could not be read" in page
      True
    """
    _require("verdict document", document, _REQUIRED)
    for part in document["suspects"]:
        _require("suspect", part, _REQUIRED_OF_SUSPECT)
    if not document["suspects"]:
        raise _validate.fail("report", "at least one suspect", "none", "Trace a suspect first: smark trace.")
    names = _names(document["suspects"])
    suspects = [_suspect(part, name) for part, name in zip(document["suspects"], names, strict=True)]
    return _template().render(document=document, suspects=suspects, headline=_headline(suspects))


def _require(what: str, part: Mapping[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in part]
    if missing:
        cause = "Is it a verdict of smark trace, of this version?"
        raise _validate.fail("report", f"a {what} with {', '.join(names)}", f"one without {', '.join(missing)}", cause)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("smark_jax.report", "."),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["newline"] = markupsafe.Markup("\n")
    environment.filters |= {
        "one_in": words.one_in,
        "spelt_out": words.spelt_out,
        "at_most": words.at_most,
        "number": words.number,
        "date": words.date,
        "count": words.count,
        "log10": math.log10,
        "exp10": lambda value: words.power(math.ceil(value / math.log(10))),
    }
    return environment.get_template("page.html")


def _shown(value: Any) -> Any:
    """Cleans every value that the template inserts into the page, so that no place in it can forget to."""
    return value if isinstance(value, markupsafe.Markup) or not isinstance(value, str) else _foreign.clean(value)


def _names(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each suspect: the file name without folders, if that is unique."""
    files = [str(part["file"]) for part in parts]
    short = [
        file if part.get("read") == "answers" else PurePath(file).name or file
        for part, file in zip(parts, files, strict=True)
    ]
    return [name if short.count(name) == 1 else file for name, file in zip(short, files, strict=True)]


def _suspect(part: Mapping[str, Any], name: str) -> Suspect:
    if part["verdict"] not in _KINDS:
        expected = f"a verdict of {', '.join(map(repr, _KINDS))}"
        raise _validate.fail("report", expected, repr(part["verdict"]), "Was it written by another version?")
    accused = sorted(part.get("accused") or [], key=lambda accusation: accusation["log10_p"])
    values = np.asarray(part["statistics"] if part.get("statistics") is not None else [], np.float64)
    serials = np.asarray(part["serials"] if part.get("serials") is not None else [], np.int64)
    customers = part["customers"] if part.get("customers") is not None else []
    known = 0 < len(values) == len(serials) == len(customers) and bool(np.isfinite(values).all())
    is_accused = np.isin(serials, [accusation["serial"] for accusation in accused])
    moves: list[Mapping[str, str]] = list(part.get("layout") or [])
    return Suspect(
        document=part,
        name=name,
        verdict=part["verdict"],
        accused=accused,
        weakest=max((accusation["log10_p"] for accusation in accused), default=0.0),
        picture=_picture(part, values, is_accused, customers) if known else None,
        binned=len(values) > chart.MAX_DOTS,
        rows=_rows(values, serials, customers, is_accused) if known else [],
        complete=len(values) <= _ALL_ROWS,
        error=[line for line in str(part.get("error") or "").split("\n") if line.strip()],
        alignment=str(part["alignment"]).split("\n") if part.get("alignment") else [],
        moves=moves[:_MOVES],
        compared=part["verdict"] in ("traced", "nobody"),
        left_out=list(part.get("left_out") or [])[:_MOVES],
    )


def _picture(part: Mapping[str, Any], values: np.ndarray, is_accused: np.ndarray, customers: Any) -> markupsafe.Markup:
    threshold = _threshold(part)
    names = [str(customers[place]) for place in np.flatnonzero(is_accused).tolist()]
    reached = f"{int(is_accused.sum()):,} accused" if is_accused.any() else "nobody accused"
    others = values[~is_accused]
    rest = (
        f"; the others lie between {words.number(others.min())} and {words.number(others.max())}" if others.size else ""
    )
    description = (
        f"Statistics of {words.count(len(values), 'customer')}, threshold {words.number(threshold)}: {reached}{rest}."
    )
    # chart.statistics has escaped all text in the picture.
    return markupsafe.Markup(chart.statistics(values, is_accused, names, threshold, description))


def _threshold(part: Mapping[str, Any]) -> float:
    """The threshold; infinite when the document has none, since JSON has no infinity."""
    return float(part["threshold"]) if part.get("threshold") is not None else math.inf


def _rows(values: np.ndarray, serials: np.ndarray, customers: Any, is_accused: np.ndarray) -> list[Row]:
    number = len(values) if len(values) <= _ALL_ROWS else _TOP_ROWS
    size = np.abs(values)
    near = np.argpartition(-size, number - 1)[:number] if number < len(values) else np.arange(number)
    chosen = np.union1d(near, np.flatnonzero(is_accused))
    return [
        Row(str(customers[place]), int(serials[place]), float(values[place]), bool(is_accused[place]))
        for place in chosen[np.lexsort((serials[chosen], -size[chosen]))].tolist()
    ]


def _headline(suspects: list[Suspect]) -> str:
    """The verdict in one line of plain words."""
    if len(suspects) == 1:
        (suspect,) = suspects
        if suspect.verdict == "unreadable":
            return "The suspect file could not be read"
        if suspect.verdict == "not a copy":
            return "The suspect is not a copy of this base model"
        if suspect.verdict == "undecided":
            return "Nothing can be said of the suspect"
        if not suspect.accused:
            return "No customer is accused"
        names = [str(accusation["customer"]) for accusation in suspect.accused]
        who = words.listed(names) if len(names) <= 3 else words.count(len(names), "customer")
        return f"The suspect is traced to {who}"
    number = {kind: sum(suspect.verdict == kind for suspect in suspects) for kind in _KINDS}
    told = (f"{number[kind]} {text}" for kind, text in _KINDS.items() if number[kind])
    return f"{len(suspects)} suspects: {', '.join(told)}"
