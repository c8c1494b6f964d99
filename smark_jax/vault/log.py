"""The vault's log: every change, in order, each entry authenticated together with all before it.

Entry n holds the authenticator of entry n - 1, what happened as JSON, and

    mac_n = HMAC-SHA256(log key, n || mac_{n-1} || body),

with n as eight bytes, big-endian. Without the master key nobody can change, insert or remove an entry, except to cut
entries off at the end. A vault rolled back as a whole to an older state passes every check here; only published
commitments reveal the rollback.

An entry may list tables that it ``"replaces"``: the rows that earlier entries wrote there were verified and then
removed. Rows that older versions stored in plaintext were sealed this way (:mod:`smark_jax.vault.sealing`).
"""

import hmac
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from smark_jax import _documents, _validate, errors, keys
from smark_jax.vault import store

_START = bytes(32)


class Entry(NamedTuple):
    """One entry.

    Attributes:
      number: from 1.
      event: what happened, in a few words.
      time: when.
      rows: what it vouches for in each table.
      details: what else the event states, as :func:`append` was given it.
    """

    number: int
    event: str
    time: str
    rows: Mapping[str, store.Summary]
    details: Mapping[str, Any]


def append(
    connection: store.Connection,
    key: keys.SecretKey,
    event: str,
    rows: Mapping[str, Sequence[store.Row]],
    **details: Any,
) -> int:
    """Writes an entry and the rows it vouches for; call it inside a transaction.

    Args:
      connection: the database, in a transaction.
      key: the log key.
      event: what happened, in a few words.
      rows: the new rows of each table, in the order of ``store.TABLES``.
      **details: further JSON-serialisable details.

    Returns:
      The entry's number.

    Raises:
      SmarkError: when the log's last entry is not authentic.
    """
    last = store.last_entry(connection)
    if last is not None and not hmac.compare_digest(_mac(key, *last[:3]), last.mac):
        raise _tampered(f"entry {last.number} is not authentic")
    number, previous = (last.number + 1, last.mac) if last else (1, _START)
    body = _documents.canonical(
        {"event": event, "time": _documents.now(), "rows": store.summary(rows), **details}
    ).decode()
    store.add_entry(connection, store.Entry(number, previous, body, _mac(key, number, previous, body)))
    for table, some in rows.items():
        store.insert(connection, table, some, number)
    return number


def verify(connection: store.Connection, key: keys.SecretKey) -> None:
    """Checks every entry of the log, and that the tables hold exactly the rows it vouches for.

    Raises:
      SmarkError: stating what differs, and what to do.
    """
    said, previous, count = {}, _START, 0
    for number, before, body, mac in store.entries(connection):
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
        said[number] = _rows(document["rows"])
    if not count:
        raise _tampered("it is empty")
    store.verify(connection, said)


def entries(connection: store.Connection, event: str, model: str) -> Iterator[Entry]:
    """The entries of this event that concern this model, in order."""
    for entry in store.entries(connection):
        body = json.loads(entry.body)
        if body.pop("event") == event and body.get("model") == model:
            yield Entry(entry.number, event, body.pop("time"), _rows(body.pop("rows")), body)


def _rows(said: Mapping[str, Mapping[str, Any]]) -> dict[str, store.Summary]:
    return {table: store.Summary(**summary) for table, summary in said.items()}


def _mac(key: keys.SecretKey, number: int, previous: bytes, body: str) -> bytes:
    return hmac.digest(key.to_bytes(), number.to_bytes(8, "big") + previous + body.encode(), "sha256")


def _tampered(what: str) -> errors.Tampered:
    cause = "Somebody or something changed it outside smark: restore the vault's folder from your backup."
    return _validate.fail(
        "vault", "the log as smark wrote it", f"a tampered or damaged log ({what})", cause, kind=errors.Tampered
    )
