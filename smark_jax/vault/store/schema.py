"""The database file: its tables, its migrations, its transactions, and what sqlite's errors mean."""

import contextlib
import hashlib
import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from smark_jax import _validate, errors


class Connection(sqlite3.Connection):
    """A connection to the database.

    Attributes:
      authentic: the :func:`digest` of the database when every row in it was last known to be one that the log vouches
        for; None when that is not known.
    """

    authentic: bytes | None = None


# One script per version; a database of version n has run the first n. Never change a released script: add another.
MIGRATIONS = (
    """
CREATE TABLE log (
  number INTEGER PRIMARY KEY, previous BLOB NOT NULL, body TEXT NOT NULL, mac BLOB NOT NULL);
CREATE TABLE models (
  name TEXT PRIMARY KEY, document TEXT NOT NULL, entry INTEGER NOT NULL REFERENCES log);
CREATE TABLE probes (
  model TEXT PRIMARY KEY REFERENCES models, sha256 TEXT NOT NULL, num_classes INTEGER NOT NULL,
  entry INTEGER NOT NULL REFERENCES log);
CREATE TABLE customers (
  serial INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, created TEXT NOT NULL,
  entry INTEGER NOT NULL REFERENCES log);
CREATE TABLE commitments (
  model TEXT NOT NULL REFERENCES models, number INTEGER NOT NULL, root TEXT NOT NULL, document TEXT NOT NULL,
  entry INTEGER NOT NULL REFERENCES log, PRIMARY KEY (model, number));
CREATE TABLE timestamps (
  model TEXT NOT NULL, number INTEGER NOT NULL, time TEXT NOT NULL, response BLOB NOT NULL,
  entry INTEGER NOT NULL REFERENCES log, FOREIGN KEY (model, number) REFERENCES commitments);
CREATE TABLE licences (
  model TEXT NOT NULL REFERENCES models, serial INTEGER NOT NULL REFERENCES customers, strength REAL NOT NULL,
  leaf BLOB NOT NULL, number INTEGER NOT NULL, entry INTEGER NOT NULL REFERENCES log,
  PRIMARY KEY (model, serial), FOREIGN KEY (model, number) REFERENCES commitments);
CREATE TABLE copies (
  model TEXT NOT NULL, serial INTEGER NOT NULL, sha256 TEXT NOT NULL, content TEXT NOT NULL, created TEXT NOT NULL,
  entry INTEGER NOT NULL REFERENCES log,
  PRIMARY KEY (model, serial, sha256), FOREIGN KEY (model, serial) REFERENCES licences);
CREATE INDEX copies_by_hash ON copies (sha256);
CREATE TABLE verdicts (
  number INTEGER PRIMARY KEY, model TEXT NOT NULL REFERENCES models, created TEXT NOT NULL, document TEXT NOT NULL,
  entry INTEGER NOT NULL REFERENCES log);
CREATE TABLE suspects (
  verdict INTEGER NOT NULL REFERENCES verdicts, place INTEGER NOT NULL, sha256 TEXT NOT NULL, document TEXT NOT NULL,
  statistics BLOB NOT NULL, chips BLOB NOT NULL, entry INTEGER NOT NULL REFERENCES log,
  PRIMARY KEY (verdict, place));
""",
    # Replaces "suspects", which held plaintext: smark_jax.vault.sealing moves its rows here, sealed.
    """
CREATE TABLE findings (
  verdict INTEGER NOT NULL REFERENCES verdicts, place INTEGER NOT NULL, document BLOB NOT NULL,
  statistics BLOB NOT NULL, chips BLOB NOT NULL, entry INTEGER NOT NULL REFERENCES log,
  PRIMARY KEY (verdict, place));
""",
    # Models and commitments now name the versions of their algorithms. The new number keeps out older versions of
    # smark, which would ignore those names.
    "",
    # Offers, requests and challenges of licences, whose documents lie in the folder "licences".
    """
CREATE TABLE licence_files (
  model TEXT NOT NULL, serial INTEGER NOT NULL, kind TEXT NOT NULL, number INTEGER NOT NULL, sha256 TEXT NOT NULL,
  details TEXT NOT NULL, entry INTEGER NOT NULL REFERENCES log,
  PRIMARY KEY (model, serial, kind, number), FOREIGN KEY (model, serial) REFERENCES licences);
""",
    # A draft of a model's words, and what they were drawn with. The number keeps out versions that would ignore both.
    """
CREATE TABLE drafts (
  model TEXT PRIMARY KEY REFERENCES models, document TEXT NOT NULL, entry INTEGER NOT NULL REFERENCES log);
CREATE TABLE draws (
  model TEXT PRIMARY KEY REFERENCES drafts, document TEXT NOT NULL, entry INTEGER NOT NULL REFERENCES log);
""",
)
TABLES = {
    "models": ("name", "document"),
    "probes": ("model", "sha256", "num_classes"),
    "customers": ("serial", "name", "created"),
    "commitments": ("model", "number", "root", "document"),
    "timestamps": ("model", "number", "time", "response"),
    "licences": ("model", "serial", "strength", "leaf", "number"),
    "copies": ("model", "serial", "sha256", "content", "created"),
    "licence_files": ("model", "serial", "kind", "number", "sha256", "details"),
    "verdicts": ("number", "model", "created", "document"),
    "suspects": ("verdict", "place", "sha256", "document", "statistics", "chips"),
    "findings": ("verdict", "place", "document", "statistics", "chips"),
    "drafts": ("model", "document"),
    "draws": ("model", "document"),
}
"""The columns of each table in order, without the entry that every row names."""
SEALED = 0x736D6B32
"""The application_id of a database file without a plaintext row from before findings were sealed."""
_SECONDS_TO_WAIT = 60.0
_UNWRITABLE = "Is the disk mounted read-only? Make the folder writable for you, or copy it to a disk that is."
_NO_ROOM = "Free some space on that disk, and run this again: nothing was half written."
_IN_USE = "Wait until the other smark that uses this vault has ended, and run this again."
# Advice for sqlite errors whose cause lies outside the database, by error code. All other errors mean damage.
_ADVICE = {
    sqlite3.SQLITE_PERM: _UNWRITABLE,
    sqlite3.SQLITE_READONLY: _UNWRITABLE,
    sqlite3.SQLITE_CANTOPEN: _UNWRITABLE,
    sqlite3.SQLITE_FULL: _NO_ROOM,
    sqlite3.SQLITE_IOERR: f"Is the disk full, or no longer connected? {_NO_ROOM}",
    sqlite3.SQLITE_BUSY: _IN_USE,
    sqlite3.SQLITE_LOCKED: _IN_USE,
    sqlite3.SQLITE_CONSTRAINT: "Another smark process may have written the same data in the meantime: run this again.",
    sqlite3.SQLITE_NOMEM: "End other programs to free memory, and run this again.",
}


def connect(path: Path, *, create: bool = False) -> Connection:
    """Opens the database and migrates an older one to the current version.

    Raises:
      SmarkError: when there is no database, or it is newer, damaged or of another schema.
    """
    mode = "rwc" if create else "rw"
    with errors_explained(path):
        # Autocommit mode: only `transaction` and `snapshot` begin and end transactions.
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={mode}",
            timeout=_SECONDS_TO_WAIT,
            isolation_level=None,
            uri=True,
            factory=Connection,
        )
        with contextlib.ExitStack() as unless_opened:
            unless_opened.callback(connection.close)
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            _migrate(connection)
            if _schema(connection) != _expected_schema():
                raise tampered("its tables and triggers are not those that smark made")
            unless_opened.pop_all()
    return connection


@contextlib.contextmanager
def errors_explained(path: Path) -> Iterator[None]:
    """Translates sqlite's errors into ours: a full or read-only disk is not tampering.

    Raises:
      SmarkError: stating the file, what is wrong with it and what to do.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        advice = _ADVICE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)  # the higher bits tell variants apart
        if advice is None:
            raise tampered(str(error)) from error
        expected = f"to read and write the database {path} and files beside it"
        kind = errors.InUse if advice == _IN_USE else errors.SmarkError
        raise _validate.fail("vault", expected, f"sqlite's refusal: {error}", advice, kind=kind) from error


def _migrate(connection: Connection) -> None:
    if _version(connection) == len(MIGRATIONS):
        return
    with transaction(connection):
        version = _version(connection)  # read again, now that nobody else can write
        if version > len(MIGRATIONS):
            cause = "Upgrade smark-jax; a newer one wrote this vault."
            raise _validate.fail("vault", f"a database of version {len(MIGRATIONS)}", f"version {version}", cause)
        for script in MIGRATIONS[version:]:
            for statement in filter(str.strip, script.split(";\n")):
                connection.execute(statement)
        _forbid_changes(connection)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")


def _forbid_changes(connection: Connection) -> None:
    for table, act in itertools.product(("log", *TABLES), ("UPDATE", "DELETE")):
        connection.execute(
            f"CREATE TRIGGER IF NOT EXISTS {table}_no_{act.lower()} BEFORE {act} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, 'a vault only grows'); END"
        )


def clear(connection: Connection, table: str) -> None:
    """Removes all rows of a table after other rows replaced them; call it inside a transaction."""
    connection.execute(f"DROP TRIGGER {table}_no_delete")
    connection.execute(f"DELETE FROM {table}")
    _forbid_changes(connection)


def rebuild(connection: Connection) -> bool:
    """Rewrites the file, so that no bytes of removed rows remain in it or in the write-ahead log beside it.

    Returns:
      Whether it succeeded: while another process reads, the write-ahead log cannot be truncated.
    """
    connection.execute("VACUUM")
    (busy, *_) = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


def _version(connection: Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _schema(connection: Connection) -> set[tuple[str, str, str | None]]:
    return set(connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall())


def _expected_schema() -> set[tuple[str, str, str | None]]:
    memory = sqlite3.connect(":memory:", isolation_level=None, factory=Connection)
    with contextlib.closing(memory) as connection:
        _migrate(connection)
        return _schema(connection)


@contextlib.contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """Commits all changes or none. It takes the write lock at once, so that values read inside stay valid.

    A database that was authentic before is so afterwards, unless somebody else has changed it since. Its digest is
    taken while the lock is held: right after the commit, somebody else may write.
    """
    with _between(connection, "BEGIN IMMEDIATE"):
        if connection.authentic is not None and connection.authentic != digest(connection):
            connection.authentic = None
        yield
        after = digest(connection) if connection.authentic is not None else None
    connection.authentic = after


def digest(connection: Connection) -> bytes | None:
    """The SHA-256 of all pages of the database as this connection sees them; None where sqlite was built without that.

    Call it inside a transaction or snapshot. It reads through sqlite, as closing the file by other means would drop
    this process's locks on it, and takes the size of the database in memory. What sqlite itself notes in the file's
    header at a commit does not count: how many there were, and its own version.
    """
    if not hasattr(connection, "serialize"):
        return None
    pages = memoryview(connection.serialize())
    found = hashlib.sha256()
    for part in (slice(24), slice(28, 92), slice(100, None)):
        found.update(pages[part])
    return found.digest()


@contextlib.contextmanager
def snapshot(connection: Connection) -> Iterator[None]:
    """Reads one consistent state of the database, even while others write."""
    with _between(connection, "BEGIN"):
        yield


@contextlib.contextmanager
def _between(connection: Connection, begin: str) -> Iterator[None]:
    connection.execute(begin)
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # on a full disk sqlite has rolled back by itself
            connection.execute("ROLLBACK")
        raise


def is_sealed(connection: Connection) -> bool:
    """Whether the file is marked as free of plaintext findings (:mod:`smark_jax.vault.sealing`)."""
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    return kind == SEALED


def mark_sealed(connection: Connection) -> None:
    """Marks the database as free of plaintext findings."""
    connection.execute(f"PRAGMA application_id = {SEALED}")


def overwrite_removed(connection: Connection) -> None:
    """Makes sqlite overwrite removed rows with zeros from now on."""
    connection.execute("PRAGMA secure_delete = ON")


def tampered(what: str) -> errors.Tampered:
    """The error for a database that sqlite or the log finds damaged; the caller raises it."""
    cause = "Somebody or something changed it outside smark: restore the vault's folder from your backup."
    return _validate.fail(
        "vault",
        "the database as smark wrote it",
        f"a tampered or damaged database ({what})",
        cause,
        kind=errors.Tampered,
    )
