"""A vault's folder: created atomically, opened with the passphrase, and checked before anything is read from it.

The first opening compares every row of the database with the log, which takes seconds for a million customers. It then
seals the database: the file ``checked`` holds HMAC-SHA256(seal key, SHA-256 of the database). An opening that finds the
same database under the seal compares nothing. Each transaction of smark renews the digest after finding it unchanged,
so what somebody else changes between two of them breaks the seal, and the next opening compares every row again.
"""

import contextlib
import hmac
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from smark_jax import _io, _validate, keys
from smark_jax.vault import crypto, log, sealing, store

KEY_FILE, DATABASE, CHECKED = "master.key", "vault.sqlite", "checked"
MODELS, COMMITMENTS, ANSWERS = "models", "commitments", "answers"


class Vault(NamedTuple):
    """An open vault: its folder, its database and its master key; no message or repr ever shows the key."""

    folder: Path
    connection: store.Connection
    master: keys.SecretKey


def create(folder: Path, passphrase: str) -> None:
    """Creates a vault with a new master key, readable only by its owner.

    It is created under a temporary name and renamed, so that a crash leaves either a complete vault or none.

    Raises:
      SmarkError: when the passphrase is empty, or the name is taken.
    """
    got = f"{folder}, which exists already"
    cause = "Name another folder. If it is a vault of yours, use it as it is."
    there = _validate.fail("vault", "a new folder for the vault", got, cause)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise there
    master = keys.new()
    sealed = crypto.seal(master, passphrase)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    new = folder.absolute().with_name(f".{folder.name}.{secrets.token_hex(4)}.new")
    new.mkdir(mode=0o700)
    try:
        with _io.private_files():
            for name in (MODELS, COMMITMENTS, ANSWERS):
                (new / name).mkdir()
            _io.write(new / KEY_FILE, sealed, private=True)
            connection = store.connect(new / DATABASE, create=True)
            with contextlib.closing(connection):
                store.mark_sealed(connection)
                record(Vault(new, connection, master), "vault created", {}, public_key=crypto.public_key(master))
        _io.flush_folder(new)
        try:
            new.rename(folder.absolute())
        except OSError:
            raise there from None
        _io.flush_folder(folder.absolute().parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def opened(folder: Path, passphrase: str) -> Iterator[Vault]:
    """Opens the vault in a folder and checks its log, tables and commitments.

    Findings that an older version stored in plaintext are sealed (:mod:`smark_jax.vault.sealing`).

    Raises:
      SmarkError: when there is no vault, the passphrase is wrong, anything was tampered with, or the disk is full or
        not writable; the message states which.
    """
    missing = [name for name in (KEY_FILE, DATABASE) if not (folder / name).is_file()]
    if missing:
        cause = "Is the path right? Make a vault with 'smark init'; if a file was lost, restore the backup."
        raise _validate.fail("vault", f"a vault in {folder}", f"no {' and no '.join(missing)} there", cause)
    master = crypto.unseal(folder / KEY_FILE, passphrase)
    with _io.private_files(), contextlib.closing(store.connect(folder / DATABASE)) as connection:
        vault = Vault(folder, connection, master)
        with store.errors_explained(folder / DATABASE):
            _verify(vault)
            sealing.seal_plain_rows(connection, master, _log_key(vault))
            known = connection.authentic
            try:
                yield vault
            finally:
                if connection.authentic != known:  # or the seal is ours, or of a newer state that another process made
                    _seal(vault)


def _verify(vault: Vault) -> None:
    published = sorted(
        (vault.folder / COMMITMENTS).glob("*.json")
    )  # listed before the database is read, to which others may add
    with store.snapshot(vault.connection):
        found = store.digest(vault.connection)
        sealed = found is not None and hmac.compare_digest(_sealed(vault), _mac(vault, found))
        if not sealed:
            log.verify(vault.connection, _log_key(vault))
        vault.connection.authentic = found
        roots = {f"{row.model}-{row.number}": row.document for row in store.commitments(vault.connection)}
    for path in published:
        if path.stem in roots and path.read_bytes() != roots[path.stem].encode() + b"\n":
            cause = "Restore that file from your backup, or remove it: the next 'smark issue' writes it again."
            raise _validate.fail("vault", f"{path} as smark wrote it", "another content", cause)
        if path.stem not in roots and path.stem.rpartition("-")[2].isdecimal():
            cause = "The database is older than that file: restore the newest backup of the whole folder."
            raise _validate.fail("vault", f"the commitment {path.stem} in the database", "none", cause)
    if not sealed:
        _seal(vault)


def _sealed(vault: Vault) -> bytes:
    path = vault.folder / CHECKED
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(64)


def _seal(vault: Vault) -> None:
    """Seals a database that is authentic as it stands, so that the next opening need not compare its rows."""
    found = vault.connection.authentic
    if found is not None:
        with contextlib.suppress(OSError):  # on a full disk the next opening compares all rows
            _io.write(vault.folder / CHECKED, _mac(vault, found), private=True)


def _mac(vault: Vault, digest: bytes) -> bytes:
    return hmac.digest(keys.derive(vault.master, "checked").to_bytes(), digest, "sha256")


def record(vault: Vault, event: str, rows: Mapping[str, Sequence[store.Row]], **details: Any) -> int:
    """Writes rows and the log entry that vouches for them in one transaction; joins a transaction already open.

    Returns:
      The entry's number.
    """
    with contextlib.ExitStack() as stack:
        if not vault.connection.in_transaction:
            stack.enter_context(store.transaction(vault.connection))
        return log.append(vault.connection, _log_key(vault), event, rows, **details)


def _log_key(vault: Vault) -> keys.SecretKey:
    return keys.derive(vault.master, "log")
