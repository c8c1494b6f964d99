"""Seals the findings of verdicts: a database stolen without the passphrase reveals no codeword.

A lone leaker's chips *are* its codeword. Each verdict's statistics give one linear equation in each customer's
codeword, and about 190 verdicts suffice to solve for it. So each suspect's document, statistics and chips are encrypted
under a key derived from the master key (ChaCha20-Poly1305, RFC 8439, with a random nonce) and bound to their verdict,
place and column.

Older versions stored them in plaintext. The first time this version opens such a vault, it verifies those rows, seals
them and rewrites the file, so that no plaintext bytes remain in it. Earlier backups still hold them.
"""

from cryptography.exceptions import InvalidTag

from smark_jax import _documents, _validate, keys
from smark_jax.vault import log, store

_COLUMNS = ("document", "statistics", "chips")


def row(
    master: keys.SecretKey, verdict: int, place: int, document: str, statistics: bytes, chips: bytes
) -> store.Finding:
    """A row of the table ``findings``."""
    plain = zip(_COLUMNS, (document.encode(), statistics, chips), strict=True)
    key = keys.derive(master, "findings")
    sealed = (keys.seal(key, content, _about(verdict, place, column)) for column, content in plain)
    return store.Finding(verdict, place, *sealed)


def unseal(master: keys.SecretKey, finding: store.Finding, column: str) -> bytes:
    """The plaintext of one column of ``findings``: ``"document"``, ``"statistics"`` or ``"chips"``.

    Raises:
      SmarkError: when it was sealed with another key, or for another verdict, place or column.
    """
    try:
        about = _about(finding.verdict, finding.place, column)
        return keys.unseal(keys.derive(master, "findings"), getattr(finding, column), about)
    except InvalidTag:
        got = f"other bytes ({column} of suspect {finding.place + 1} of verdict {finding.verdict})"
        cause = "Restore the vault's folder from your backup."
        raise _validate.fail("vault", "a finding that this vault sealed", got, cause) from None


def _about(verdict: int, place: int, column: str) -> bytes:
    return _documents.canonical(["smark finding v1", verdict, place, column])


def seal_plain_rows(connection: store.Connection, master: keys.SecretKey, log_key: keys.SecretKey) -> None:
    """Seals rows that an older version stored in plaintext and removes the plaintext from the file.

    Does nothing when there are no such rows. If the process dies midway, every row is either plain or sealed, and the
    next opening continues.

    Raises:
      SmarkError: when the rows are not those that the log vouches for.
    """
    if store.is_sealed(connection) and not store.plain_findings(connection):
        return
    store.overwrite_removed(connection)
    with store.transaction(connection):
        rows = [row(master, *found) for found in store.plain_findings(connection)]
        if rows:
            log.verify(connection, log_key)  # otherwise the log would vouch for a tampered row
            log.append(connection, log_key, "findings sealed", {"findings": rows}, replaces=["suspects"])
            store.clear(connection, "suspects")
    if store.rebuild(connection):
        store.mark_sealed(connection)
