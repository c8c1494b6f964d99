"""The vault's log: every change, in order, each entry authenticated together with all before it.

Entry n holds the authenticator of entry n - 1, what happened as JSON, and

    mac_n = HMAC-SHA256(log key, n || mac_{n-1} || body),

n as eight bytes, big-endian. Without the master key no entry can be changed, inserted or removed but at the end. A
vault that was rolled back as a whole to an older state is whole: only the commitments that were published tell.

An entry may name tables that it ``"replaces"``: earlier entries' rows in them are gone, after they were verified. That
is how rows which older versions kept in plain were sealed (:mod:`smark_jax.vault.sealing`).
"""

import hmac
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from smark_jax import _validate, errors, keys
from smark_jax.vault import _text, database

_START = bytes(32)


class Entry(NamedTuple):
    """One entry: its number from 1, and what happened (``"event"``, ``"time"``, ``"rows"`` and details)."""

    number: int
    body: dict[str, Any]


def append(
    connection: sqlite3.Connection,
    key: keys.SecretKey,
    event: str,
    rows: Mapping[str, Sequence[database.Row]],
    **details: Any,
) -> int:
    """Writes an entry and the rows it vouches for; inside a transaction.

    Args:
      connection: the database, in a transaction.
      key: the log key.
      event: what happened, in a few words.
      rows: for each table the new rows, in the order of ``database.TABLES``.
      **details: more about it, of what JSON can hold.

    Returns:
      The entry's number.

    Raises:
      SmarkError: when the log's last entry is not authentic.
    """
    last = connection.execute("SELECT number, previous, body, mac FROM log ORDER BY number DESC LIMIT 1").fetchone()
    if last is not None and not hmac.compare_digest(_mac(key, *last[:3]), last[3]):
        raise _tampered(f"entry {last[0]} is not authentic")
    number, previous = (last[0] + 1, last[3]) if last else (1, _START)
    body = database.canonical({"event": event, "time": _text.now(), "rows": database.summary(rows), **details})
    mac = _mac(key, number, previous, body)
    connection.execute("INSERT INTO log VALUES (?, ?, ?, ?)", (number, previous, body, mac))
    for table, some in rows.items():
        database.insert(connection, table, some, number)
    return number


def verify(connection: sqlite3.Connection, key: keys.SecretKey) -> None:
    """Checks every entry of the log, and that the tables hold what it says.

    Raises:
      SmarkError: saying what differs, and what to do.
    """
    said, previous, count = {}, _START, 0
    for number, before, body, mac in connection.execute("SELECT number, previous, body, mac FROM log ORDER BY number"):
        count += 1
        if number != count:
            raise _tampered(f"entry {count} is missing")
        authentic = isinstance(body, str) and isinstance(before, bytes) and isinstance(mac, bytes)
        if not authentic or before != previous or not hmac.compare_digest(_mac(key, number, before, body), mac):
            raise _tampered(f"entry {number} is not authentic")
        document, previous = json.loads(body), mac
        for table in document.get("replaces", ()):
            for rows in said.values():
                rows.pop(table, None)
        said[number] = document["rows"]
    if not count:
        raise _tampered("it is empty")
    database.verify(connection, said)


def entries(connection: sqlite3.Connection) -> Iterator[Entry]:
    """All entries in order."""
    for number, body in connection.execute("SELECT number, body FROM log ORDER BY number"):
        yield Entry(number, json.loads(body))


def _mac(key: keys.SecretKey, number: int, previous: bytes, body: str) -> bytes:
    return hmac.digest(key.to_bytes(), number.to_bytes(8, "big") + previous + body.encode(), "sha256")


def _tampered(what: str) -> errors.Tampered:
    cause = "Somebody or something changed it outside smark: restore the vault's folder from your backup."
    return _validate.fail(
        "vault", "the log as smark wrote it", f"a tampered or damaged log ({what})", cause, kind=errors.Tampered
    )
