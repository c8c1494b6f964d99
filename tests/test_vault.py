"""The vault in one process: what it keeps, what it refuses, and what it notices."""

import contextlib
import hashlib
import hmac
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import time_stamps
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from smark_jax import errors, files, vault
from smark_jax.vault import (
    _text,
    commitments,
    crypto,
    customers,
    documents,
    folder,
    issuing,
    merkle,
    models,
    store,
    timestamps,
    verdicts,
)

SECRET = "correct horse battery staple"
ROOT = Path(__file__).parent.parent
COLUMNS = ("number", "previous", "body", "mac")


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch):
    monkeypatch.setattr(crypto, "_N", 2**10)


def base(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "dense/bias": rng.normal(size=100).astype(np.float32),
        "dense/kernel": rng.normal(size=(60, 100)).astype(np.float32),
    }


@pytest.fixture
def place(tmp_path):
    vault.create(tmp_path / "vault", SECRET)
    return tmp_path / "vault"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A vault with a model, five customers, two issues, a time stamp's row and a verdict; never changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crypto, "_N", 2**10)
        out = tmp_path_factory.mktemp("full")
        vault.create(out / "vault", SECRET)
        with vault.opened(out / "vault", SECRET) as desk:
            models.add(desk, "net", base(), num_chips=64)
            issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Ada", "Grace", "王小明"]), out / "copies")
            issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Ada", "Emmy"]), out / "copies")
            customers.add(desk, ["Nobody yet"])
            rows = {"timestamps": [("net", 1, "2026-01-01T00:00:00Z", b"answer")]}
            folder.record(desk, "time stamp stored", rows)
            suspect = out / "copies" / "000001-Grace.safetensors"
            verdicts.trace(models.get(desk, "net"), [suspect, out / "absent"])
    return out


def copy_of(full: Path, tmp_path: Path) -> Path:
    shutil.copytree(full, tmp_path / "copy")
    return tmp_path / "copy" / "vault"


# The folder and its key


def test_a_new_vault_is_its_owners_only_and_nothing_else_is_left(place):
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    for path in place.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert [path.name for path in place.parent.iterdir()] == ["vault"]


def test_no_vault_is_made_over_anything(place, tmp_path):
    (tmp_path / "file").write_text("")
    for taken in (place, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"(?s)expected a new folder.*Name another folder"):
            vault.create(taken, SECRET)
    with vault.opened(place, SECRET) as desk:
        assert customers.registered(desk) == []


def test_a_crash_while_a_vault_is_made_leaves_none(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "record", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        vault.create(tmp_path / "vault", SECRET)
    assert list(tmp_path.iterdir()) == []


def test_the_key_file_opens_with_scrypt_and_chacha20_poly1305_of_other_libraries(place):
    document = json.loads((place / "master.key").read_text())
    sealed, kdf = bytes.fromhex(document.pop("ciphertext")), document["kdf"]
    stretched = hashlib.scrypt(SECRET.encode(), salt=bytes.fromhex(kdf["salt"]), n=kdf["n"], r=8, p=1, dklen=32)
    said = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    master = ChaCha20Poly1305(stretched).decrypt(bytes.fromhex(document["cipher"]["nonce"]), sealed, said)
    with vault.opened(place, SECRET) as desk:
        assert desk.master.to_bytes() == master
        for shown in (repr(desk), str(desk.master)):
            assert master.hex() not in shown


@pytest.mark.parametrize("secret", ["", "wrong", SECRET + " ", SECRET.upper()])
def test_a_wrong_passphrase_opens_nothing(place, secret):
    kind = errors.WrongPassphrase if secret else errors.SmarkError  # an empty one is refused before it is tried
    with pytest.raises(kind, match="passphrase") as error, vault.opened(place, secret):
        pass
    assert secret in ("", "wrong") or secret not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["kdf"].update(n=2**11),
        lambda d: d["kdf"].update(p=2),
        lambda d: d["kdf"].update(n=2**40),
        lambda d: d["kdf"].update(n="many"),
        lambda d: d["kdf"].update(salt="00" * 16),
        lambda d: d["cipher"].update(nonce="00" * 12),
        lambda d: d["cipher"].update(name="none"),
        lambda d: d.update(version=2),
        lambda d: d.update(ciphertext=f"{d['ciphertext'][:-2]}{int(d['ciphertext'][-2:], 16) ^ 1:02x}"),
        lambda d: d.update(ciphertext="xyz"),
        lambda d: d.pop("kdf"),
        lambda d: d.update(comment="harmless"),
    ],
)
def test_a_changed_key_file_is_noticed(place, change):
    path = place / "master.key"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"(?s)expected.*[Rr]estore"), vault.opened(place, SECRET):
        pass


def test_no_vault_and_half_a_vault_say_what_to_do(tmp_path, place):
    with pytest.raises(ValueError, match="smark init"), vault.opened(tmp_path / "absent", SECRET):
        pass
    (place / "vault.sqlite").unlink()
    with pytest.raises(ValueError, match=r"no vault\.sqlite"), vault.opened(place, SECRET):
        pass


# The log and the tables


def test_the_log_is_a_chain_of_hmacs_over_all_entries(full):
    with vault.opened(full / "vault", SECRET) as desk:
        key = vault.folder._log_key(desk).to_bytes()
        rows = desk.connection.execute("SELECT * FROM log ORDER BY number").fetchall()
    before = bytes(32)
    for place, (number, previous, body, mac) in enumerate(rows, 1):
        assert (number, previous) == (place, before)
        assert mac == hmac.new(key, number.to_bytes(8, "big") + before + body.encode(), "sha256").digest()
        before = mac
    events = [json.loads(row[2])["event"] for row in rows]
    assert events[:4] == ["vault created", "model added", "customers added", "customers licensed"]
    assert events[-1] == "suspects traced"


TAMPERING = {
    "a customer's name": "UPDATE customers SET name = 'Mallory' WHERE serial = 0",
    "a customer less": "DELETE FROM customers WHERE serial = 4",
    "a customer more": "INSERT INTO customers VALUES (9, 'Mallory', 'today', 3)",
    "a customer more of a new entry": "INSERT INTO customers VALUES (9, 'Mallory', 'today', 999)",
    "a customer more of the second entry, before the first one's": "INSERT INTO customers "
    "SELECT -1, 'Mallory', 'today', max(entry) FROM customers",
    "a model's alpha": "UPDATE models SET document = replace(document, '1e-06', '0.1')",
    "a copy's hash": "UPDATE copies SET sha256 = 'ab' WHERE serial = 1",
    "a copy's customer": "UPDATE copies SET serial = 0 WHERE serial = 1",
    "a licence less": "DELETE FROM licences WHERE serial = 1",
    "a codeword's leaf": "UPDATE licences SET leaf = zeroblob(32) WHERE serial = 1",
    "a commitment's root": "UPDATE commitments SET root = 'ab' WHERE number = 1",
    "a time stamp": "UPDATE timestamps SET response = x'00'",
    "a verdict": "UPDATE verdicts SET document = replace(document, 'joint', 'other')",
    "a suspect": "UPDATE findings SET document = zeroblob(length(document)) WHERE place = 0",
    "statistics": "UPDATE findings SET statistics = zeroblob(16) WHERE place = 0",
    "a suspect less": "DELETE FROM findings WHERE place = 1",
    "two suspects exchanged": "UPDATE findings SET place = 9 - place; UPDATE findings SET place = place - 8",
    "a suspect in plain, as older versions kept them": "INSERT INTO suspects VALUES (1, 7, '', '{}', x'', x'', 9)",
    "an entry's text": "UPDATE log SET body = replace(body, 'net', 'bet') WHERE number = 4",
    "an entry's authenticator": "UPDATE log SET mac = zeroblob(32) WHERE number = 4",
    "an entry less": "DELETE FROM log WHERE number = 4",
    "the last entry less": "DELETE FROM log WHERE number = (SELECT max(number) FROM log)",
    "no entries": "DELETE FROM log",
    "an entry more": "INSERT INTO log VALUES (99, zeroblob(32), '{}', zeroblob(32))",
    "two entries exchanged": "UPDATE log SET number = CASE number WHEN 4 THEN -5 WHEN 5 THEN -4 ELSE number END;"
    "UPDATE log SET number = abs(number)",
    "another type": "UPDATE log SET body = x'00' WHERE number = 4",
}


def edit(place: Path, script: str, restore: bool = True) -> None:
    """Edits the database as somebody without the key would: past the triggers, which are put back."""
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite")) as connection, connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.executescript(script)
        for _, sql in triggers if restore else ():
            connection.execute(sql)


@pytest.mark.parametrize("what", TAMPERING)
def test_whatever_is_changed_in_the_database_is_noticed(full, tmp_path, what):
    place = copy_of(full, tmp_path)
    with vault.opened(place, SECRET):  # negative control
        pass
    edit(place, TAMPERING[what])
    with (
        pytest.raises(errors.Tampered, match=r"(?s)tampered or damaged (database|log).*backup"),
        vault.opened(place, SECRET),
    ):
        pass


def compared(monkeypatch, place, act=lambda desk: None) -> bool:
    """Whether an opening of the vault, in which ``act`` happens, compares every row with the log."""
    calls = []
    monkeypatch.setattr(store, "verify", lambda *args: calls.append(verify(*args)))
    verify = store.rows.verify
    with vault.opened(place, SECRET) as desk:
        act(desk)
    return bool(calls)


def test_a_database_under_its_seal_is_not_compared_again(full, tmp_path, monkeypatch):
    place = copy_of(full, tmp_path)
    (place / "checked").unlink(missing_ok=True)
    assert compared(monkeypatch, place)
    assert not compared(monkeypatch, place, lambda desk: customers.add(desk, ["Edsger"]))
    assert not compared(monkeypatch, place)  # though a customer was added
    (place / "checked").write_bytes(bytes(32))
    assert compared(monkeypatch, place)
    assert not compared(monkeypatch, place)


def test_a_seal_is_not_replaced_by_that_of_an_older_state(full, tmp_path, monkeypatch):
    place = copy_of(full, tmp_path)
    with vault.opened(place, SECRET), vault.opened(place, SECRET) as other:
        customers.add(other, ["Edsger"])
    assert not compared(monkeypatch, place)


@pytest.mark.parametrize("then", ("nothing", "another transaction"))
def test_what_is_changed_beside_an_open_vault_is_noticed_afterwards(full, tmp_path, then):
    place = copy_of(full, tmp_path)
    with vault.opened(place, SECRET):
        pass  # now it is sealed
    with vault.opened(place, SECRET) as desk:
        customers.add(desk, ["Edsger"])
        edit(place, TAMPERING["a customer's name"])
        if then != "nothing":
            customers.add(desk, ["Barbara"])
    with pytest.raises(errors.Tampered, match="customers"), vault.opened(place, SECRET):
        pass


def test_what_is_changed_right_after_a_commit_is_not_sealed(full, tmp_path):
    place = copy_of(full, tmp_path)
    seen: list[str] = []

    def wait_for_the_commit(statement: str) -> None:
        if seen[-1:] == ["COMMIT"] and seen.count("COMMIT") == 1:
            edit(place, TAMPERING["a customer's name"])
        seen.append(statement)

    with vault.opened(place, SECRET) as desk:
        desk.connection.set_trace_callback(wait_for_the_commit)
        customers.add(desk, ["Edsger"])
        desk.connection.execute("SELECT 1")
        desk.connection.set_trace_callback(None)
    assert "COMMIT" in seen
    with pytest.raises(errors.Tampered, match="customers"), vault.opened(place, SECRET):
        pass


def test_the_seal_of_another_vault_says_nothing(full, tmp_path, monkeypatch):
    place, other = copy_of(full, tmp_path), tmp_path / "other"
    vault.create(other, SECRET)
    for one in (place, other):
        with vault.opened(one, SECRET):
            pass
    for name in ("vault.sqlite", "checked"):  # a database that is authentic under the other key
        (place / name).write_bytes((other / name).read_bytes())
    with pytest.raises(errors.Tampered, match="not authentic"), vault.opened(place, SECRET):
        pass


def test_another_schema_and_other_bytes_are_noticed(full, tmp_path):
    place = copy_of(full, tmp_path)
    edit(place, "", restore=False)
    with pytest.raises(ValueError, match="not those that smark made"), vault.opened(place, SECRET):
        pass
    (place / "vault.sqlite").write_bytes(b"SQLite format 3\0" + bytes(4096))
    with pytest.raises(errors.Tampered, match="tampered or damaged database"), vault.opened(place, SECRET):
        pass


def test_damage_inside_the_file_is_noticed(full, tmp_path):
    place = copy_of(full, tmp_path)
    path = place / "vault.sqlite"
    content = bytearray(path.read_bytes())
    where = content.rindex(b"Grace")
    content[where : where + 5] = b"Grade"
    path.write_bytes(content)
    with pytest.raises(errors.Tampered, match="tampered or damaged database"), vault.opened(place, SECRET):
        pass


def test_rows_are_never_changed_nor_removed(full, tmp_path):
    with vault.opened(copy_of(full, tmp_path), SECRET) as desk:
        for table in ("log", *store.TABLES):
            for statement in (f"DELETE FROM {table}", f"UPDATE {table} SET rowid = rowid"):
                if desk.connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,):
                    continue
                with pytest.raises(sqlite3.DatabaseError, match="only grows"):
                    desk.connection.execute(statement)


def test_a_rolled_back_database_is_told_by_a_newer_commitment(full, tmp_path):
    place = copy_of(full, tmp_path)
    before = tmp_path / "before.sqlite"
    shutil.copy(place / "vault.sqlite", before)
    with vault.opened(place, SECRET) as desk:
        issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Newest"]), tmp_path / "out")
    for path in place.glob("vault.sqlite*"):
        path.unlink()
    shutil.copy(before, place / "vault.sqlite")
    with pytest.raises(ValueError, match="older than that file"), vault.opened(place, SECRET):
        pass


def test_a_newer_database_is_refused_and_an_empty_one_brought_up_to_date(place, tmp_path):
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite")) as connection:
        connection.execute(f"PRAGMA user_version = {len(store.MIGRATIONS) + 1}")
    with pytest.raises(ValueError, match="Upgrade smark-jax"), vault.opened(place, SECRET):
        pass
    with contextlib.closing(store.connect(tmp_path / "new.sqlite", create=True)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(store.MIGRATIONS),)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


def test_every_connection_is_closed_also_where_the_database_is_refused(full, tmp_path, monkeypatch):
    """Python 3.13 warns of a connection that is left open, and warnings are errors here. The count holds on all."""
    made, closed = [], []

    class Counted(store.Connection):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

        def close(self):
            closed.append(self)
            super().close()

    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kwargs: connect(*args, **kwargs | {"factory": Counted}))
    place = copy_of(full, tmp_path)
    with vault.opened(place, SECRET):
        pass
    with pytest.raises(ZeroDivisionError), vault.opened(place, SECRET):
        raise ZeroDivisionError
    for script, restore in ((TAMPERING["a verdict"], True), ("", False), ("PRAGMA user_version = 99", True)):
        edit(place, script, restore)
        with pytest.raises(ValueError), vault.opened(place, SECRET):
            pass
    (place / "vault.sqlite").write_bytes(bytes(4096))
    with pytest.raises(ValueError), vault.opened(place, SECRET):
        pass
    assert len(made) > 6
    assert set(map(id, made)) == set(map(id, closed))


def test_all_or_nothing(place):
    with vault.opened(place, SECRET) as desk:
        before = desk.connection.execute("SELECT count(*) FROM log").fetchone()
        with pytest.raises(ZeroDivisionError), store.transaction(desk.connection):
            folder.record(desk, "customers added", {"customers": [(0, "Ada", "now")]})
            raise ZeroDivisionError
        assert desk.connection.execute("SELECT count(*) FROM log").fetchone() == before
        assert customers.registered(desk) == []
    with vault.opened(place, SECRET):
        pass


# What is wrong with the machine is no tampering.


def refused(place: Path, advice: str):
    return pytest.raises(ValueError, match=rf"(?s)^(?!.*tampered).*{place}/vault\.sqlite.*sqlite's refusal.*{advice}")


@contextlib.contextmanager
def not_root():
    """As a user for whom permissions count."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_read_only_folder_is_not_reported_as_tampering(full):
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to other users
        shutil.copytree(full / "vault", place := Path(name) / "vault")
        for path in (Path(name), place, *place.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        with not_root(), refused(place, "mounted read-only"), vault.opened(place, SECRET):
            pass
        for path in (place, *(path for path in place.rglob("*") if path.is_dir())):
            path.chmod(0o755)


def test_a_full_disk_is_not_reported_as_tampering(place):
    with refused(place, "Free some space"), vault.opened(place, SECRET) as desk:
        desk.connection.execute("PRAGMA max_page_count = 1")  # no more than there are
        customers.add(desk, [f"{'x' * 150} {i}" for i in range(1000)])
    with vault.opened(place, SECRET) as desk:
        assert customers.registered(desk) == []


def test_a_locked_database_is_not_reported_as_tampering(place, monkeypatch):
    monkeypatch.setattr(store.schema, "_SECONDS_TO_WAIT", 0.1)
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with refused(place, "other smark .* has ended"), vault.opened(place, SECRET) as desk:
            customers.add(desk, ["Ada"])
        other.execute("ROLLBACK")


def test_an_index_that_names_other_customers_than_its_table_is_noticed(full, tmp_path):
    """A query for name and serial is answered from the index of names alone, which no hash of rows covers."""
    place = copy_of(full, tmp_path)
    with contextlib.closing(sqlite3.connect(place / "vault.sqlite")) as connection:
        question = "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_customers_1'"
        (page,) = connection.execute(question).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
    content = bytearray((place / "vault.sqlite").read_bytes())
    part = slice((page - 1) * size, page * size)
    content[part] = content[part].replace(b"Grace", b"Grade")
    (place / "vault.sqlite").write_bytes(content)
    with pytest.raises(errors.Tampered, match="tampered or damaged database"), vault.opened(place, SECRET):
        pass


def test_two_processes_at_once_lose_nothing(place):
    code = """
import sys
from pathlib import Path
from smark_jax import vault
from smark_jax.vault import customers
with vault.opened(Path(sys.argv[1]), sys.argv[2]) as desk:
    for i in range(40):
        customers.add(desk, [f"{sys.argv[3]} {i}"])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(place), SECRET, name], env=environment) for name in "ab"
    ]
    assert [process.wait(120) for process in running] == [0, 0]
    with vault.opened(place, SECRET) as desk:
        listed = customers.registered(desk)
    assert [customer.serial for customer in listed] == list(range(80))
    assert {customer.name for customer in listed} == {f"{name} {i}" for name in "ab" for i in range(40)}


# Customers


def test_names_of_any_script_and_their_files():
    assert _text.customer_name("  Zoe\u0308 ") == "Zo\u00eb"  # composed, stripped
    assert _text.customer_name("علی\u200cرضا") == "علی\u200cرضا"
    for bad in ("", "  ", "a\nb", "a\x00b", "a\u202eb", "a\u200bb", "x" * 201):
        with pytest.raises(ValueError, match="customer: expected a name"):
            _text.customer_name(bad)
    assert _text.file_name(7, "../../etc/passwd", ".safetensors") == "000007-etc-passwd.safetensors"
    assert _text.file_name(7, "王小明 & Söhne", ".safetensors") == "000007-王小明-Söhne.safetensors"
    assert _text.file_name(7, "///", ".safetensors") == "000007.safetensors"
    assert _text.file_name(7, "Ada", "") == "000007-Ada"  # a folder
    assert len(_text.file_name(7, "王" * 200, ".safetensors").encode()) < 255


def test_customers_are_registered_all_or_none(place):
    with vault.opened(place, SECRET) as desk:
        customers.add(desk, ["Ada"])
        with pytest.raises(ValueError, match="registered ones: 'Ada'"):
            customers.add(desk, ["Grace", "Ada"])
        with pytest.raises(ValueError, match="'Emmy' twice"):
            customers.add(desk, ["Emmy", "Emmy "])
        assert [customer.name for customer in customers.registered(desk)] == ["Ada"]


# Models and copies


def test_a_model_is_added_once_and_its_base_is_checked(place):
    with vault.opened(place, SECRET) as desk:
        added = models.add(desk, "net", base(), num_chips=64, strength=0.05, match="kernel")
        assert models.get(desk, "net") == added
        assert [leaf.path for leaf in added.settings.spec.leaves] == ["dense/kernel"]
        np.testing.assert_array_equal(models.get(desk, "net").base["dense/kernel"], base()["dense/kernel"])
        with pytest.raises(ValueError, match="another name"):
            models.add(desk, "net", base(1))
        for name in ("../net", "", "a b", ".net", "x" * 65):
            with pytest.raises(ValueError, match="model: expected a name"):
                models.add(desk, name, base())
        with pytest.raises(ValueError, match="expected fewer chips"):
            models.add(desk, "small", base(), num_chips=10**6)
        with pytest.raises(ValueError, match="Models in this vault: net"):
            models.get(desk, "bet")
        (path,) = (place / "models").glob("*.safetensors")
        files.write(path, base(1))
        with pytest.raises(ValueError, match="another content"):
            models.get(desk, "net").base  # noqa: B018


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


def known(desk: vault.Vault) -> set[str]:
    return {sha256 for (sha256,) in desk.connection.execute("SELECT sha256 FROM copies")}


def test_copies_are_the_same_again_whoever_else_is_issued(place, tmp_path):
    with vault.opened(place, SECRET) as desk:
        models.add(desk, "net", base(), num_chips=64)
        first = issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Ada", "Grace"]), tmp_path / "a")
        assert (first.new, first.written, first.commitment.number) == (2, 2, 1)
        everybody = customers.resolve(desk, [f"c {i}" for i in range(40)] + ["Ada", "Grace"])
        second = issuing.issue(models.get(desk, "net"), everybody, tmp_path / "b")
        assert (second.new, second.written, second.commitment.number) == (40, 42, 2)
        a, b = hashes(tmp_path / "a"), hashes(tmp_path / "b")
        assert len(a) == 2
        assert len(set(b.values())) == 42
        assert all(b[name] == sha256 for name, sha256 in a.items())
        assert known(desk) == set(b.values())
        again = issuing.issue(models.get(desk, "net"), everybody, tmp_path / "b")
        assert (again.new, again.written, again.commitment) == (0, 0, second.commitment)
        (tmp_path / "b" / "000000-Ada.safetensors").write_bytes(b"damaged")
        (tmp_path / "b" / "000001-Grace.safetensors").unlink()
        assert issuing.issue(models.get(desk, "net"), everybody, tmp_path / "b").written == 2
        assert hashes(tmp_path / "b") == b
        assert len(known(desk)) == 42
        with pytest.raises(ValueError, match=r"expected strength 0\.05"):
            issuing.issue(models.get(desk, "net"), everybody[:1], tmp_path / "c", strength=0.05)


def test_no_copy_has_its_name_before_the_vault_knows_its_hash(place, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with vault.opened(place, SECRET) as desk:
        models.add(desk, "net", base(), num_chips=64)
        chosen = customers.resolve(desk, [f"c {i}" for i in range(3)])
        record = folder.record

        def dies(desk, event, rows, **details):
            if event == "copies made":
                raise KeyboardInterrupt
            return record(desk, event, rows, **details)

        monkeypatch.setattr(folder, "record", dies)
        with pytest.raises(KeyboardInterrupt):
            issuing.issue(models.get(desk, "net"), chosen, out)
        assert hashes(out) == {}
        assert len(list(out.iterdir())) == 3
        (out / "..000002-c-2.safetensors.issuing.0123.part").write_text("what a kill in the middle of a write leaves")
        monkeypatch.setattr(folder, "record", record)
        replace, left = Path.replace, [2]

        def dies_later(self, target):
            if Path(target).parent == out and self.name.endswith(".issuing"):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", dies_later)
        with pytest.raises(KeyboardInterrupt):
            issuing.issue(models.get(desk, "net"), chosen, out)
        assert len(hashes(out)) == 2
        assert set(hashes(out).values()) <= known(desk)
        monkeypatch.setattr(Path, "replace", replace)
        assert issuing.issue(models.get(desk, "net"), chosen, out).written == 1
        assert set(hashes(out).values()) == known(desk)
        assert [path for path in out.iterdir() if path.suffix != ".safetensors"] == []


# Commitments


def reference_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there, over hashed leaves."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + reference_root(leaves[:k]) + reference_root(leaves[k:])).digest()


@pytest.mark.parametrize("size", range(1, 18))
def test_merkle_trees_are_those_of_rfc_6962(size):
    leaves = [merkle.leaf_hash(bytes([i])) for i in range(size)]
    assert leaves[0] == hashlib.sha256(b"\x00\x00").digest()
    root = merkle.root(leaves)
    assert root == reference_root(leaves)
    for index, path in enumerate(merkle.paths(leaves, range(size))):
        assert merkle.root_of_path(leaves[index], index, size, path) == root
        assert merkle.root_of_path(leaves[index], index, size, [*path, bytes(32)]) is None
        assert merkle.root_of_path(bytes(32), index, size, path) != root
        for other in range(size + 1):
            if other != index:
                assert merkle.root_of_path(leaves[index], other, size, path) != root
        if path:
            assert merkle.root_of_path(leaves[index], index, size, path[:-1]) is None
            assert merkle.root_of_path(leaves[index], index, size, [bytes(32), *path[1:]]) != root


def test_a_commitment_covers_every_customer_and_the_settings(full):
    with vault.opened(full / "vault", SECRET) as desk:
        newest = commitments.latest(desk, "net")
        model = models.get(desk, "net")
        opened = commitments.open_leaves(model, customers.registered(desk)[:4])
        first = commitments.get(desk, "net", 1)
        carrier_key = models.carrier_key(desk, "net").to_bytes()
        with pytest.raises(ValueError, match="newest is number 2"):
            commitments.get(desk, "net", 3)
    header = newest.header
    canonical = lambda value: json.dumps(value, sort_keys=True, separators=(",", ":")).encode()  # noqa: E731
    leaves = [hashlib.sha256(b"\0header " + canonical(documents.plain(header))).digest()]
    leaves += [hashlib.sha256(b"\0customer " + canonical(documents.plain(leaf))).digest() for leaf in opened]
    assert reference_root(leaves).hex() == newest.root
    assert (header.customers, header.previous) == (4, first.root)
    assert header.carrier_key == hashlib.sha256(carrier_key).hexdigest()
    assert header.base == files.content_hash(base())
    assert len({leaf.salt for leaf in opened}) == 4
    written = (full / "vault" / "commitments" / "net-2.json").read_bytes()
    assert written == newest.published
    for leaf in opened:
        assert leaf.word.encode() not in written


def test_a_changed_commitment_file_is_noticed_and_a_lost_one_written_again(full, tmp_path):
    place = copy_of(full, tmp_path)
    path = place / "commitments" / "net-1.json"
    original = path.read_bytes()
    path.write_bytes(original.replace(b'"customers":3', b'"customers":2'))
    with pytest.raises(ValueError, match="another content"), vault.opened(place, SECRET):
        pass
    path.unlink()
    with vault.opened(place, SECRET) as desk:
        issuing.issue(models.get(desk, "net"), customers.registered(desk)[:1], tmp_path / "out")
    assert path.read_bytes() == original


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl as a time-stamp authority")
def test_a_time_stamp_of_an_authority_is_kept_and_one_about_something_else_refused(full, tmp_path):
    time_stamps.authority(tmp_path)
    with vault.opened(copy_of(full, tmp_path), SECRET) as desk:
        commitment = commitments.get(desk, "net", 2)
        answer = time_stamps.stamp(tmp_path, timestamps.request(commitment))
        time = timestamps.add(desk, commitment, answer)
        assert timestamps.stored(desk, commitment) == [(time, answer)]
        (tmp_path / "published").write_bytes(commitment.published)
        arguments = ["-in", "answer.tsr", "-CAfile", "tsa.pem", "-data", "published"]
        done = subprocess.run(["openssl", "ts", "-verify", *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert "Verification: OK" in done.stdout, done.stderr
        with pytest.raises(ValueError, match="about another text"):
            timestamps.add(desk, commitments.get(desk, "net", 1), answer)
        for bad in (b"", answer[:100], b"nonsense"):
            with pytest.raises(ValueError, match="granted RFC 3161 response"):
                timestamps.add(desk, commitment, bad)


# Verdicts


def test_a_verdict_document_is_complete_and_kept(full):
    with vault.opened(full / "vault", SECRET) as desk:
        document = verdicts.get(desk, 1, everybody=True)
        with pytest.raises(ValueError, match="This vault holds verdict 1 alone"):
            verdicts.get(desk, 2)
    written = documents.plain(document)
    assert json.loads(json.dumps(written, allow_nan=False)) == written
    assert (document.number, document.num_customers, document.alpha) == (1, 4, 1e-6)
    assert document.commitment.number == 2
    traced, absent = document.suspects
    assert (traced.verdict, absent.verdict) == ("traced", "unreadable")
    assert "cannot be opened" in absent.error
    assert [accused.customer for accused in traced.accused] == ["Grace"]
    assert traced.customers == ["Ada", "Grace", "王小明", "Emmy"]
    assert len(traced.statistics) == 4
    assert traced.sha256 == hashlib.sha256((full / "copies" / "000001-Grace.safetensors").read_bytes()).hexdigest()


def test_only_those_with_a_copy_are_compared_and_each_is_found(place, tmp_path):
    with vault.opened(place, SECRET) as desk:
        models.add(desk, "net", base(), num_chips=64)
        everybody = customers.add(desk, [f"c {i}" for i in range(9)])
        with pytest.raises(ValueError, match="Run 'smark issue' first"):
            verdicts.trace(models.get(desk, "net"), [tmp_path / "x"])
        issued = issuing.issue(models.get(desk, "net"), everybody[2::3], tmp_path / "out")  # serials 2, 5, 8: not dense
        files.write(tmp_path / "base", base())
        files.write(tmp_path / "other", {name: leaf[..., :50] for name, leaf in base().items()})
        nan = {name: leaf * np.float32("nan") for name, leaf in base().items()}
        files.write(tmp_path / "nan", nan)
        suspects = [*issued.files, tmp_path / "base", tmp_path / "nan", tmp_path / "other"]
        document = verdicts.trace(models.get(desk, "net"), suspects)
        found = [[a.serial for a in suspect.accused] for suspect in document.suspects]
        assert found == [[2], [5], [8], [], [], []]
        assert [suspect.verdict for suspect in document.suspects[3:]] == ["nobody", "undecided", "undecided"]
        assert document.num_customers == 3
        assert document.suspects[0].num_suspects == 4
        assert verdicts.get(desk, 1, everybody=True).suspects[0].serials == [2, 5, 8]
        again = verdicts.trace(models.get(desk, "net"), suspects[:1], tried=2)
        assert (again.number, again.occasion) == (2, 2)
        first, second = document.suspects[0].accused[0], again.suspects[0].accused[0]
        assert second.log10_p == pytest.approx(first.log10_p - np.log10(2))  # 2 readings of 1, not 1 of 4
    with vault.opened(place, SECRET):
        pass


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl as a time-stamp authority")
def test_a_time_stamp_with_two_certificates_in_any_order_is_taken_as_it_came(full, tmp_path):
    time_stamps.authority(tmp_path, second_certificate=True)
    with vault.opened(copy_of(full, tmp_path), SECRET) as desk:
        commitment = commitments.get(desk, "net", 2)
        answer = time_stamps.stamp(tmp_path, timestamps.request(commitment))
        time = timestamps.add(desk, commitment, answer)
        assert timestamps.stored(desk, commitment) == [(time, answer)]
        # What the stamp is about is read from the answer, sorted or not.
        with pytest.raises(ValueError, match="about another text"):
            timestamps.check(b"another text", answer)
        (tmp_path / "published").write_bytes(commitment.published)
    (tmp_path / "kept.tsr").write_bytes(answer)
    verified = ["openssl", "ts", "-verify", "-in", "kept.tsr", "-data", "published", "-CAfile", "tsa.pem"]
    done = subprocess.run(verified, cwd=tmp_path, capture_output=True, text=True)
    assert "Verification: OK" in done.stdout, done.stderr


def test_sets_are_sorted_and_nothing_else_of_a_response_changes():
    element = lambda tag, content: bytes([tag, len(content)]) + content  # noqa: E731
    one, two, three = element(2, b"\x01"), element(2, b"\x02"), element(4, b"b\x31\x04\x02\x01")
    for tag in (0x31, 0xA0):
        unsorted = element(0x30, three + element(tag, two + one) + one)
        assert timestamps._with_sorted_sets(unsorted) == element(0x30, three + element(tag, one + two) + one)
    as_they_are = (
        element(0x30, two + one),  # a sequence has its order
        element(0x04, element(0x31, two + one)),  # a string of bytes
        element(0x31, two + one)[:-1],
        b"\x31\x80" + two + one + b"\0\0",
        b"\x1f\x81\x01\x00",
        b"\x31",
        b"",
        b"\x31\x85\xff\xff\xff\xff\xff",
    )
    deep = two + one
    for _ in range(60):
        deep = b"\x31\x82" + len(deep).to_bytes(2, "big") + deep
    for content in (*as_they_are, deep):
        assert timestamps._with_sorted_sets(content) == content
