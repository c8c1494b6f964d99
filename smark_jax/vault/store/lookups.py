"""The vault's queries: one function per question, and a small NamedTuple for answers of several columns."""

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from smark_jax.vault.store.schema import Connection

_NAMES_PER_QUERY = 4096
_AMONG = "serial IN (SELECT value FROM json_each(?))"


class Entry(NamedTuple):
    """An entry of the log as it is stored (:mod:`smark_jax.vault.log`)."""

    number: int
    previous: bytes
    body: str
    mac: bytes


class Probes(NamedTuple):
    """A model's probes: the SHA-256 of their pixels, and the number of classes."""

    sha256: str
    num_classes: int


class Customer(NamedTuple):
    """One customer: the serial that names the codeword, the name, and when it was registered."""

    serial: int
    name: str
    created: str


class Commitment(NamedTuple):
    """A commitment to a model: its number from 1, the root in hex, and the canonical text of its document."""

    model: str
    number: int
    root: str
    document: str


class Stamp(NamedTuple):
    """A time stamp of a commitment: the time that it states, and the authority's response."""

    time: str
    response: bytes


class Licence(NamedTuple):
    """A customer's licence of a model.

    Attributes:
      serial: the customer's serial.
      strength: the strength of the copy.
      leaf: the hash of the customer's leaf, which all later commitments cover.
      number: the number of the first commitment that covers it.
    """

    serial: int
    strength: float
    leaf: bytes
    number: int


class Copy(NamedTuple):
    """A file that was made for a customer, by its SHA-256."""

    serial: int
    sha256: str


class LicenceFile(NamedTuple):
    """A document of a customer's licence: its kind, its number among those, its digest, and details as JSON."""

    serial: int
    kind: str
    number: int
    sha256: str
    details: str


class Verdict(NamedTuple):
    """A verdict without its findings."""

    number: int
    model: str
    created: str
    document: str


class Finding(NamedTuple):
    """What a verdict found about one suspect, each of its three columns sealed (:mod:`smark_jax.vault.sealing`)."""

    verdict: int
    place: int
    document: bytes
    statistics: bytes
    chips: bytes


class PlainFinding(NamedTuple):
    """A finding as older versions stored it, in plaintext."""

    verdict: int
    place: int
    document: str
    statistics: bytes
    chips: bytes


# The log


def entries(connection: Connection) -> Iterator[Entry]:
    """All entries of the log in order."""
    return map(Entry._make, connection.execute("SELECT number, previous, body, mac FROM log ORDER BY number"))


def last_entry(connection: Connection) -> Entry | None:
    """The newest entry of the log."""
    query = "SELECT number, previous, body, mac FROM log ORDER BY number DESC LIMIT 1"
    row = connection.execute(query).fetchone()
    return Entry(*row) if row else None


def add_entry(connection: Connection, entry: Entry) -> None:
    """Writes an entry of the log."""
    connection.execute("INSERT INTO log VALUES (?, ?, ?, ?)", entry)


# Models and customers


def model_names(connection: Connection) -> list[str]:
    """The models' names in the order in which they were added."""
    return [name for (name,) in connection.execute("SELECT name FROM models ORDER BY rowid")]


def model_document(connection: Connection, name: str) -> str | None:
    """A model's document; None when there is no such model."""
    row = connection.execute("SELECT document FROM models WHERE name = ?", (name,)).fetchone()
    return row[0] if row else None


def draft(connection: Connection, model: str) -> str | None:
    """The document of a model's draft; None when it has none."""
    row = connection.execute("SELECT document FROM drafts WHERE model = ?", (model,)).fetchone()
    return row[0] if row else None


def draw(connection: Connection, model: str) -> str | None:
    """The document of the draw that followed a model's draft; None when there was none."""
    row = connection.execute("SELECT document FROM draws WHERE model = ?", (model,)).fetchone()
    return row[0] if row else None


def probes(connection: Connection, model: str) -> Probes | None:
    """A model's probes; None when it has none."""
    row = connection.execute("SELECT sha256, num_classes FROM probes WHERE model = ?", (model,)).fetchone()
    return Probes(*row) if row else None


def customers(connection: Connection, first: int) -> list[Customer]:
    """All customers from serial ``first`` on, in the order of their serials."""
    query = "SELECT serial, name, created FROM customers WHERE serial >= ? ORDER BY serial"
    return list(map(Customer._make, connection.execute(query, (first,))))


def named(connection: Connection, names: Sequence[str]) -> dict[str, Customer]:
    """Those of the customers with these names who are registered, by name."""
    query = "SELECT serial, name, created FROM customers WHERE name IN (SELECT value FROM json_each(?))"
    parts = (names[start : start + _NAMES_PER_QUERY] for start in range(0, len(names), _NAMES_PER_QUERY))
    rows = (row for part in parts for row in connection.execute(query, (json.dumps(part),)))
    return {customer.name: customer for customer in map(Customer._make, rows)}


def num_customers(connection: Connection) -> int:
    """How many customers are registered."""
    return connection.execute("SELECT count(*) FROM customers").fetchone()[0]


def name(connection: Connection, serial: int) -> str:
    """The name of a customer."""
    return connection.execute("SELECT name FROM customers WHERE serial = ?", (serial,)).fetchone()[0]


# Licences and copies


def licences(connection: Connection, model: str, serials: Sequence[int]) -> dict[int, Licence]:
    """Those of a model's licences that these customers hold, by serial."""
    query = f"SELECT serial, strength, leaf, number FROM licences WHERE model = ? AND {_AMONG}"
    found = map(Licence._make, connection.execute(query, (model, json.dumps(serials))))
    return {licence.serial: licence for licence in found}


def leaves(connection: Connection, model: str, number: int = 2**63 - 1) -> dict[int, bytes]:
    """The hashed leaves that a model's commitment of this number covers, by default all, by serial and in order."""
    query = "SELECT serial, leaf FROM licences WHERE model = ? AND number <= ? ORDER BY serial"
    return dict(connection.execute(query, (model, number)))


def covered(connection: Connection, model: str, number: int) -> Sequence[int]:
    """The serials that a model's commitment of this number covers, in order; a range where they are 0 to N - 1."""
    where, about = "FROM licences WHERE model = ? AND number <= ?", (model, number)
    count, last = connection.execute(f"SELECT count(*), max(serial) {where}", about).fetchone()
    if count and last == count - 1:  # serials are distinct, and none is below zero
        return range(count)
    return [serial for (serial,) in connection.execute(f"SELECT serial {where} ORDER BY serial", about)]


def covered_names(connection: Connection, model: str, number: int) -> dict[int, str]:
    """The names of the customers that a model's commitment of this number covers, by serial, in order."""
    query = (
        "SELECT serial, name FROM licences JOIN customers USING (serial) WHERE model = ? AND number <= ? "
        "ORDER BY serial"
    )
    return dict(connection.execute(query, (model, number)))


def licensed_models(connection: Connection) -> dict[int, list[str]]:
    """The models for which each customer has a licence, by serial and in the order of the models' names."""
    found: dict[int, list[str]] = {}
    for serial, model in connection.execute("SELECT serial, model FROM licences ORDER BY model"):
        found.setdefault(serial, []).append(model)
    return found


def copies(connection: Connection, model: str, serials: Sequence[int]) -> list[Copy]:
    """The files that were made of a model for these customers."""
    query = f"SELECT serial, sha256 FROM copies WHERE model = ? AND {_AMONG}"
    return list(map(Copy._make, connection.execute(query, (model, json.dumps(serials)))))


def licence_files(connection: Connection, model: str, serial: int) -> list[LicenceFile]:
    """The documents of a customer's licence of a model, by kind and number."""
    query = (
        "SELECT serial, kind, number, sha256, details FROM licence_files WHERE model = ? AND serial = ? "
        "ORDER BY kind, number"
    )
    return list(map(LicenceFile._make, connection.execute(query, (model, serial))))


def offered(connection: Connection, model: str) -> set[int]:
    """Serials of the customers who were offered a licence of a model."""
    query = "SELECT DISTINCT serial FROM licence_files WHERE model = ? AND kind = 'offer'"
    return {serial for (serial,) in connection.execute(query, (model,))}


def model_of_copy(connection: Connection, sha256: str, but: str) -> str | None:
    """A model other than ``but`` of which this file is a copy; None when there is none."""
    query = "SELECT model FROM copies WHERE sha256 = ? AND model <> ?"
    row = connection.execute(query, (sha256, but)).fetchone()
    return row[0] if row else None


# Commitments

_COMMITMENT = "SELECT model, number, root, document FROM commitments"


def commitments(connection: Connection) -> list[Commitment]:
    """All commitments."""
    return list(map(Commitment._make, connection.execute(_COMMITMENT)))


def latest_commitment(connection: Connection, model: str) -> Commitment | None:
    """A model's newest commitment; None before the first issue."""
    row = connection.execute(f"{_COMMITMENT} WHERE model = ? ORDER BY number DESC LIMIT 1", (model,)).fetchone()
    return Commitment(*row) if row else None


def commitment(connection: Connection, model: str, number: int) -> Commitment | None:
    """A model's commitment of this number; None when there is none."""
    row = connection.execute(f"{_COMMITMENT} WHERE model = ? AND number = ?", (model, number)).fetchone()
    return Commitment(*row) if row else None


def stamps(connection: Connection, model: str, number: int) -> list[Stamp]:
    """The time stamps of a commitment."""
    query = "SELECT time, response FROM timestamps WHERE model = ? AND number = ?"
    return list(map(Stamp._make, connection.execute(query, (model, number))))


# Verdicts


def last_verdict(connection: Connection) -> int:
    """The number of the newest verdict; 0 before the first."""
    (last,) = connection.execute("SELECT max(number) FROM verdicts").fetchone()
    return last or 0


def last_occasion(connection: Connection, model: str) -> int:
    """How many occasions of tracing a model there have been."""
    query = "SELECT max(json_extract(document, '$.occasion')) FROM verdicts WHERE model = ?"
    (last,) = connection.execute(query, (model,)).fetchone()
    return last or 0


def verdict(connection: Connection, number: int) -> Verdict | None:
    """The verdict of this number; None when there is none."""
    query = "SELECT number, model, created, document FROM verdicts WHERE number = ?"
    row = connection.execute(query, (number,)).fetchone()
    return Verdict(*row) if row else None


def verdict_numbers(connection: Connection, model: str) -> list[int]:
    """The numbers of a model's verdicts in order."""
    query = "SELECT number FROM verdicts WHERE model = ? ORDER BY number"
    return [number for (number,) in connection.execute(query, (model,))]


_FINDING = "SELECT verdict, place, document, statistics, chips FROM"


def findings(connection: Connection, number: int) -> Iterator[Finding]:
    """The findings on a verdict's suspects, in order; yielded one at a time, since statistics are large."""
    return map(Finding._make, connection.execute(f"{_FINDING} findings WHERE verdict = ? ORDER BY place", (number,)))


def finding(connection: Connection, number: int, place: int) -> Finding:
    """The finding on the suspect at this place, from 0, in a verdict; it must exist."""
    query = f"{_FINDING} findings WHERE verdict = ? AND place = ?"
    return Finding(*connection.execute(query, (number, place)).fetchone())


def plain_findings(connection: Connection) -> list[PlainFinding]:
    """All rows that older versions kept in plain."""
    return list(map(PlainFinding._make, connection.execute(f"{_FINDING} suspects ORDER BY verdict, place")))
