"""Writes rows that a log entry vouches for, and compares all rows with what the log says."""

import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from smark_jax.vault.store.schema import TABLES, Connection, tampered

Row = Sequence[Any]


class Summary(NamedTuple):
    """What a log entry states about its rows in one table: their number, and their SHA-256."""

    rows: int
    sha256: str


_ROWS_PER_HASH = 4096


def insert(connection: Connection, table: str, rows: Iterable[Row], entry: int) -> None:
    """Adds rows that this log entry vouches for."""
    columns = TABLES[table]
    marks = "?, " * len(columns)
    statement = f"INSERT INTO {table} ({', '.join(columns)}, entry) VALUES ({marks}{entry:d})"
    connection.executemany(statement, rows)


def summary(rows: Mapping[str, Sequence[Row]]) -> dict[str, Summary]:
    """What a log entry states about its rows, by table."""
    return {table: _summary(some) for table, some in rows.items() if len(some)}


def _summary(rows: Iterable[Row], width: int | None = None) -> Summary:
    """The number and the SHA-256 of rows, of which the first ``width`` values count."""
    digest, count = hashlib.sha256(), 0
    rows = iter(rows)
    while some := list(itertools.islice(rows, _ROWS_PER_HASH)):
        text = json.dumps([row[:width] for row in some], separators=(",", ":"), default=_hashed)
        digest.update(text.encode())
        count += len(some)
    return Summary(count, digest.hexdigest())


def _hashed(value: Any) -> dict[str, str]:
    if not isinstance(value, bytes):
        raise TypeError(f"a row holds a {type(value).__name__}")
    return {"sha256": hashlib.sha256(value).hexdigest()}


def verify(connection: Connection, said: Mapping[int, Mapping[str, Summary]]) -> None:
    """Compares all rows of all tables with the summaries in the log, and indices with their tables.

    Args:
      connection: the database.
      said: the summary of each entry's rows, by the entry's number; without rows that later entries replaced.

    Raises:
      SmarkError: naming the table, and the entry with which its rows disagree.
    """
    # Queries may read names and numbers from an index alone, so the indices must be intact too.
    (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if state != "ok":
        raise tampered(state)
    for table, columns in TABLES.items():
        expected = {number: tables[table] for number, tables in said.items() if table in tables}
        # Tables only grow, so entries follow each other in the order of rows, and sqlite need not sort.
        cursor = connection.execute(f"SELECT {', '.join(columns)}, entry FROM {table} ORDER BY rowid")
        found: dict[Any, Summary] = {}
        for entry, rows in itertools.groupby(cursor, operator.itemgetter(-1)):
            if entry in found:
                raise tampered(f"table {table} has rows of log entry {entry} among those of others")
            found[entry] = _summary(rows, len(columns))
        for entry in sorted(expected.keys() | found.keys(), key=str):
            if expected.get(entry) != found.get(entry):
                rows, should = (some[entry].rows if entry in some else 0 for some in (found, expected))
                raise tampered(f"table {table} has {rows} rows of log entry {entry}, and the log says {should} others")
