"""A stolen vault gives no codeword away; a vault of an older version, which kept findings in plain, is sealed."""

import contextlib
import json
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from smark_jax import codes, errors, vault
from smark_jax.vault import evidence, models, sealing, store, verdicts, verification

SECRET = "correct horse battery staple"
CHIPS, NAMES = 64, ["Ada", "Grace", "Emmy", "王小明"]


@pytest.fixture
def old(tmp_path) -> Path:
    """A folder with a vault of database version 1 and models (tests/data/README.md)."""
    with zipfile.ZipFile(Path(__file__).parent / "data" / "vault-1.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


# The thief has the files of a vault and no passphrase.


def stolen(place: Path) -> bytes:
    """All that the database's files hold, the write-ahead log included."""
    return b"".join(path.read_bytes() for path in sorted(place.glob("vault.sqlite*")))


def words_found(content: bytes, words: np.ndarray) -> set[str]:
    """Whose codeword is somewhere in the bytes as the signs of doubles, at any offset, as a lone leaker's chips are."""
    found = set()
    for offset in range(8):
        numbers = np.frombuffer(content, "<f8", (len(content) - offset) // 8, offset)
        signs = np.where(np.signbit(numbers), np.float32(-1), np.float32(1))
        windows = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(signs, CHIPS))
        near = np.abs(windows @ words.T.astype(np.float32)).max(axis=0) > 0.9 * CHIPS
        found |= {name for name, is_near in zip(NAMES, near, strict=True) if is_near}
    return found


def words_solved(place: Path, words: np.ndarray) -> set[str]:
    """Whose codeword follows from all chips and statistics: <y, b> = |y| T, b in [-1, 1], the least sum of deviations.

    Not all equations hold, since the statistic of a customer who was tested is one on a residual.
    """
    rows = []
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite")) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in {"suspects", "findings"} & set(tables):
            rows += connection.execute(f"SELECT chips, statistics FROM {table}").fetchall()
    numbers = []
    for chips, statistics in rows:
        surplus = len(chips) - 8 * CHIPS  # a nonce and a tag, should it be sealed
        if surplus in (0, 28) and len(statistics) - surplus == 4 * len(NAMES):
            cut = slice(12, -16) if surplus else slice(None)
            numbers.append((np.frombuffer(chips[cut], "<f8"), np.frombuffer(statistics[cut], "<f4")))
    with np.errstate(all="ignore"):
        y = np.nan_to_num(np.stack([chips for chips, _ in numbers]), posinf=0, neginf=0)
        y /= np.abs(y).max(axis=1, keepdims=True)
        statistics = np.nan_to_num(np.stack([t for _, t in numbers]).astype(np.float64), posinf=0, neginf=0)
        y /= np.linalg.norm(y, axis=1, keepdims=True)
    found = set()
    for name, word, t in zip(NAMES, words, statistics.T, strict=True):
        cost, slack = np.repeat([0.0, 1.0], [CHIPS, len(y)]), np.eye(len(y))
        limits = [(-1, 1)] * CHIPS + [(0, None)] * len(y)
        inequalities = np.block([[y, -slack], [-y, -slack]])
        solution = optimize.linprog(cost, inequalities, np.concatenate([t, -t]), bounds=limits).x
        if solution is not None and np.mean(np.sign(solution[:CHIPS]) == word) > 0.9:
            found.add(name)
    return found


def codewords(desk: vault.Vault) -> np.ndarray:
    return np.asarray(codes.codebook(models.code_key(desk, "net"), range(len(NAMES)), CHIPS, version=1))


def test_a_thief_with_an_old_backup_reads_traced_and_solves_uninvolved_customers_codewords_and_with_a_new_one_none(old):
    before, place = stolen(old / "vault"), old / "vault"
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite")) as connection:
        (plain,) = connection.execute("SELECT count(*) FROM suspects").fetchone()
    assert plain == 52
    old_place = old / "backup"
    old_place.mkdir()
    (old_place / "vault.sqlite").write_bytes((place / "vault.sqlite").read_bytes())
    with vault.opened(place, SECRET) as desk:
        words = codewords(desk)
        assert words_found(stolen(place), words) == set()
        verdicts.trace(models.get(desk, "net"), [old / "ada.safetensors", old / "mixed.safetensors"])
        while_open = stolen(place)
    # On the old files both attacks succeed, against Ada and Emmy who were traced and against the two who were not.
    assert "Ada" in words_found(before, words)
    assert words_solved(old_place, words) == set(NAMES)
    assert words_found(while_open, words) == words_found(stolen(place), words) == set()
    assert words_solved(place, words) == set()


def test_what_findings_say_is_not_in_the_file(old):
    """Names of the accused are in the log; statistics, p-values, layouts and files' names are not in the database."""
    assert b"log10_p" in stolen(old / "vault")
    with vault.opened(old / "vault", SECRET) as desk:
        verdicts.trace(models.get(desk, "net"), [old / "ada.safetensors"])
        for content in (b"log10_p", b"share", b"ada.safetensors"):
            assert content not in stolen(old / "vault")


# A vault of an older version


def plain_rows(place: Path) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite")) as connection:
        return connection.execute("SELECT * FROM suspects ORDER BY entry, rowid").fetchall()


def test_an_old_vault_opens_traces_exports_and_verifies(old):
    rows = plain_rows(old / "vault")
    with vault.opened(old / "vault", SECRET) as desk:
        # Byte for byte what was there: so the entries that wrote it in plain vouch for what was sealed.
        for verdict, place, _, document, statistics, chips, _ in rows:
            finding = store.finding(desk.connection, verdict, place)
            unsealed = [sealing.unseal(desk.master, finding, column) for column in ("document", "statistics", "chips")]
            assert unsealed == [document.encode(), statistics, chips]
        assert [len(verdicts.get(desk, number).suspects) for number in (1, 2, 3, 4)] == [1, 2, 48, 1]
        document = verdicts.trace(models.get(desk, "net"), [old / "mixed.safetensors"])
        assert {a.customer for a in document.suspects[0].accused} == {"Ada", "Emmy"}
        (old / "new.json").write_bytes(evidence.export(desk, 2).content)
    with vault.opened(old / "vault", SECRET) as desk:
        assert desk.connection.execute("SELECT count(*) FROM suspects").fetchone() == (0,)
        assert verdicts.get(desk, 5) == document
    root = verification.published_root(str(old / "vault" / "commitments" / "net-1.json"))
    for bundle in ("bundle.json", "new.json"):
        report = verification.verify(old / bundle, old / "ada.safetensors", old / "base.safetensors", root=root)
        assert report.holds, report.checks
        assert [a.customer for a in report.accused] == ["Ada"]


def test_an_old_vault_that_was_tampered_with_is_not_sealed(old):
    place = old / "vault"
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite", isolation_level=None)) as connection:
        (trigger,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'suspects_no_update'").fetchone()
        connection.execute("DROP TRIGGER suspects_no_update")
        connection.execute("UPDATE suspects SET document = replace(document, 'Ada', 'Eve') WHERE verdict = 1")
        connection.execute(trigger)
    with pytest.raises(errors.Tampered, match="tampered or damaged"), vault.opened(place, SECRET):
        pass
    assert len(plain_rows(place)) == 52


def test_a_plain_row_that_comes_back_after_sealing_is_noticed(old):
    rows, place = plain_rows(old / "vault"), old / "vault"
    with vault.opened(place, SECRET):
        pass
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite", isolation_level=None)) as connection:
        connection.execute("INSERT INTO suspects VALUES (?, ?, ?, ?, ?, ?, ?)", rows[0])
    with pytest.raises(ValueError, match="table suspects has 1 rows"), vault.opened(place, SECRET):
        pass


def test_sealing_that_is_killed_or_kept_from_the_file_goes_on_at_the_next_opening(old, monkeypatch):
    place = old / "vault"
    with monkeypatch.context() as patch:
        patch.setattr(store, "rebuild", lambda connection: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), vault.opened(place, SECRET):
            pass
    sealed = "PRAGMA application_id"
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite", isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM log").fetchone()
        # The checkpoint waits for readers as long as for writers.
        monkeypatch.setattr(store.schema, "_SECONDS_TO_WAIT", 0.2)
        with vault.opened(place, SECRET) as desk:
            assert desk.connection.execute(sealed).fetchone() == (0,)
        reader.execute("COMMIT")
    with vault.opened(place, SECRET) as desk:
        assert desk.connection.execute(sealed).fetchone() == (store.SEALED,)
        assert words_found(stolen(place), codewords(desk)) == set()


def test_a_sealed_finding_opens_in_its_place_and_under_its_key_only(key):
    finding = sealing.row(key, 1, 0, json.dumps({}), b"statistics", b"chips")
    assert sealing.unseal(key, finding, "statistics") == b"statistics"
    assert sealing.row(key, 1, 0, json.dumps({}), b"statistics", b"chips").statistics != finding.statistics
    for column, changed in (
        ("chips", {"verdict": 2}),
        ("chips", {"place": 1}),
        ("chips", {"chips": finding.statistics}),
        ("document", {"document": finding.document[:-1]}),
        ("chips", {"chips": b""}),
    ):
        with pytest.raises(ValueError, match="a finding that this vault sealed"):
            sealing.unseal(key, finding._replace(**changed), column)
