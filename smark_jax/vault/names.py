"""Reads customers' names from a CSV file. A name gets its codeword for good, so an ambiguous file is refused."""

import codecs
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from smark_jax import _validate, errors
from smark_jax.vault import _text

_DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
# Lower-case headings: those of a column of customers' names, and those of other columns in customer tables.
_OF_NAMES = frozenset(
    "client|clients|cliente|client name|company|company name|customer|customers|customer name|firma|full name|fullname|"
    "kunde|kunden|kundenname|licensee|name|names|nom|nombre|organisation|organization|客户|顧客|お客様".split("|")
)
_OF_OTHERS = frozenset(
    "#|account|address|adresse|city|contact|country|date|datum|e-mail|email|first name|id|kundennummer|land|last name|"
    "mail|nachname|no|no.|notes|number|nr|nr.|ort|phone|plz|serial|stadt|strasse|street|surname|telefon|tel|url|user|"
    "username|vorname|website|zip".split("|")
)
_BEGINNINGS = ("client", "company", "customer", "firma", "kunde", "licens")
_SHOWN = 10
_WHERE = "--column NAME-or-NUMBER says which"


class Names(NamedTuple):
    """The names that a file would register.

    Attributes:
      names: in the order of the file.
      source: a sentence that states the file, the column, the number of names, the first and the last.
    """

    names: list[str]
    source: str


class _Row(NamedTuple):
    line: int
    cells: list[str]


def from_csv(path: Path, column: str | None = None, heading: bool | None = None) -> Names:
    """Reads the customers' names from a CSV file in UTF-8 or UTF-16; registers nothing.

    The delimiter is whichever of comma, semicolon, tab and bar cuts every line into the same number of cells. Blank
    lines are skipped.

    Args:
      path: of the file.
      column: which column has the names, by its heading or by its number from 1. If a file has several columns and this
        is omitted, exactly one heading must identify the names.
      heading: whether the first line is a heading; if omitted, the line itself must make that clear.

    Raises:
      SmarkError: when the delimiter, the column or the first line is ambiguous, or when names are bad or repeated; it
        lists those with their line numbers.
    """
    # Excel may write an extra first line that names the delimiter: sep=;
    delimiter, rows = _table(path, re.sub(r'\A"?sep=[,;|\t]"?[\r\n]+', "\n", _decoded(path)))
    if not rows:
        raise _validate.fail("customers", f"at least one name in {path}", "none", "Write one name per line.")
    place, has_heading = _column(path, delimiter, rows, column, heading)
    names = _names(path, rows[has_heading:], place)
    ends = f"{names[0]!r}" if len(names) == 1 else f"{names[0]!r} to {names[-1]!r}"
    of = f"the column {rows[0].cells[place].strip()!r}" if has_heading else f"column {place + 1}, without a heading"
    between = f", cut at {_DELIMITERS[delimiter]}" if delimiter else ""
    number = "1 customer" if len(names) == 1 else f"{len(names):,} customers"
    return Names(names, f"{path}: {number}, {ends}, from {of}{between}.")


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        cause = "It may be in Latin-1 or Windows-1252: save it as 'CSV UTF-8'."
        raise _validate.fail(
            "customers", f"a CSV file in UTF-8 in {path}", f"other bytes in line {line}", cause
        ) from None
    if "\0" in text:
        cause = "Save the table as 'CSV UTF-8'."
        raise _validate.fail("customers", f"a CSV file in UTF-8 in {path}", "UTF-16 without a mark, or no text", cause)
    return text


def _table(path: Path, text: str) -> tuple[str, list[_Row]]:
    """The delimiter, empty when there is only one column, and the rows that are not blank."""
    cut: dict[str, list[_Row]] = {}
    errors = []
    for delimiter in [one for one in _DELIMITERS if one in text] or list(_DELIMITERS)[:1]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            cut[delimiter] = [_Row(reader.line_num, row) for row in reader if "".join(row).strip()]
        except csv.Error as error:
            errors.append(f"{error} in line {reader.line_num}")
    if not cut:
        cause = "Save it as 'CSV UTF-8'. Is a quote left open?"
        raise _validate.fail("customers", f"a CSV file in {path}", errors[0], cause)
    widths = {delimiter: {len(row.cells) for row in rows} for delimiter, rows in cut.items()}
    even = [delimiter for delimiter, found in widths.items() if len(found) == 1 and found != {1}]
    if len(even) == 1:
        return even[0], cut[even[0]]
    if even:
        got = f"one that {' and '.join(_DELIMITERS[delimiter] for delimiter in even)} cut evenly"
        cause = "Put quotes around cells that hold such characters, or save the names alone."
        raise _validate.fail("customers", f"one delimiter in {path}", got, cause)
    for delimiter in (delimiter for delimiter, found in widths.items() if len(found) > 1):
        usual = len(cut[delimiter][0].cells)
        odd = next(row for row in cut[delimiter] if len(row.cells) != usual)
        got = f"{usual} in line {cut[delimiter][0].line} and {len(odd.cells)} in line {odd.line}"
        cause = f'Put quotes around names that hold {_DELIMITERS[delimiter]}, as in "Lovelace{delimiter} Ada".'
        raise _validate.fail("customers", f"the same number of cells in each line of {path}", got, cause)
    return "", next(iter(cut.values()))


def _column(
    path: Path, delimiter: str, rows: Sequence[_Row], column: str | None, heading: bool | None
) -> tuple[int, bool]:
    """Which column has the names, and whether the first line is a heading."""
    first = [cell.strip() for cell in rows[0].cells]
    low = [cell.lower() for cell in first]
    listed = ", ".join(f"{place} {cell!r}" for place, cell in enumerate(first, 1))
    if column is not None:
        named = [place for place, cell in enumerate(low) if cell == column.strip().lower()]
        if len(named) == 1 and heading is not False:
            return named[0], True
        if not column.isdecimal() or not 1 <= int(column) <= len(first):
            raise _validate.fail("customers", f"one column {column!r} in {path}", f"the columns {listed}", f"{_WHERE}.")
        place = int(column) - 1
    elif len(first) == 1:
        place = 0
    else:
        named = [place for place, cell in enumerate(low) if cell in _OF_NAMES]
        if len(named) == 1 and heading is not False:
            return named[0], True
        cut = f", cut at {_DELIMITERS[delimiter]}"
        expected = f"one column of customers' names in {path}"
        raise _validate.fail("customers", expected, f"the columns {listed}{cut}", f"{_WHERE} it is.")
    if heading is not None:
        return place, heading
    if low[place] in _OF_NAMES:
        return place, True
    words = {word for cell in low for word in (cell, *re.split(r"[\W_]+", cell))}
    if _OF_NAMES.union(_OF_OTHERS).intersection(words) or low[place].startswith(_BEGINNINGS):
        cause = "Say --heading if it is one, or --no-heading if it is a customer."
        raise _validate.fail("customers", f"a customer in the first line of {path}", f"{listed}, like a heading", cause)
    return place, False


def _names(path: Path, rows: Sequence[_Row], place: int) -> list[str]:
    names: dict[str, int] = {}
    problems = []
    for row in rows:
        try:
            name = _text.customer_name(row.cells[place])
        except errors.SmarkError as error:
            problems.append(f"line {row.line}: {error.desk.splitlines()[0]}")
            continue
        if name in names:
            problems.append(f"line {row.line}: {name!r} is already in line {names[name]}")
        names.setdefault(name, row.line)
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        got = "; ".join(problems[:_SHOWN]) + more
        raise _validate.fail("customers", f"a name of its own in each row of {path}", got, "Nothing was imported.")
    if not names:
        raise _validate.fail("customers", f"at least one name in {path}", "a heading alone", "Write one name per line.")
    return list(names)
