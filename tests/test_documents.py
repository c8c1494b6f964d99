"""Documents from foreign hands, versions of algorithms, and a vault of the time before either was checked."""

import json
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pytest

from smark_jax import errors, files, vault
from smark_jax.vault import (
    bundles,
    commitments,
    customers,
    documents,
    evidence,
    issuing,
    models,
    reading,
    store,
    verdicts,
    verification,
    versions,
)

SECRET = "correct horse battery staple"


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """A folder with a vault of version 0.1.0, whose documents name no versions (tests/data/README.md)."""
    folder = tmp_path_factory.mktemp("old")
    with zipfile.ZipFile(Path(__file__).parent / "data" / "vault-2.zip") as archive:
        archive.extractall(folder)
    return folder


# A vault of 0.1.0


def test_a_vault_of_0_1_is_migrated_traced_issued_from_and_proved_by(old, tmp_path):
    place = old / "vault"
    with vault.opened(place, SECRET) as desk:
        model = models.get(desk, "net")
        assert model.settings.versions == documents.Versions("chacha20/1", "hadamard/1", "signs/1", "joint/1", None)
        stored = [verdicts.get(desk, number) for number in (1, 2, 3)]
        found = [[(s.verdict, sorted(a.customer for a in s.accused)) for s in verdict.suspects] for verdict in stored]
        assert found == [
            [("traced", ["Ada"]), ("unreadable", [])],
            [("traced", ["Ada", "Emmy"])],
            [("traced", ["Grace"])],
        ]
        again = verdicts.trace(model, [old / "mixed.safetensors"]).suspects[0]
        assert sorted(a.customer for a in again.accused) == ["Ada", "Emmy"]
        before = stored[1].suspects[0].accused
        assert [a.log10_p for a in again.accused] == pytest.approx([a.log10_p for a in before])
        issued = issuing.issue(model, customers.resolve(desk, ["Ada", "Newest"]), tmp_path / "out")
        ours, theirs = (files.read(path).leaves for path in (issued.files[0], old / "ada.safetensors"))
        for name, leaf in theirs.items():  # but for rounding, which is another machine's
            np.testing.assert_allclose(ours[name], leaf, rtol=1e-5, atol=1e-6)
        verdicts.trace(model, [issued.files[1]])
        verdicts.trace(model, [old / "ada.safetensors"])
        for number, name in ((1, "again"), (6, "later")):
            (tmp_path / name).write_bytes(evidence.export(desk, number).content)
        # The old documents stay as they are; the new commitment names what the old one meant.
        first, _, third = store.commitments(desk.connection)
        assert "versions" not in first.document
        assert json.loads(third.document)["header"]["versions"] == model.settings.versions._asdict()
    root = verification.published_root(str(place / "commitments" / "net-1.json"))
    for bundle in (old / "bundle.json", tmp_path / "again", tmp_path / "later"):
        report = verification.verify(bundle, old / "ada.safetensors", old / "base.safetensors", root=root)
        assert report.holds, report.checks
        assert [a.customer for a in report.accused] == ["Ada"]


def test_what_is_parsed_is_written_again_to_the_byte(old):
    signed = json.loads((old / "bundle.json").read_text())
    assert documents.plain(documents.parse(documents.Signed, signed)) == signed
    with vault.opened(old / "vault", SECRET) as desk:
        for row in store.commitments(desk.connection):
            assert documents.text(documents.stored(documents.Commitment, row.document)) == row.document
        text = store.model_document(desk.connection, "net")
        assert text and documents.text(documents.stored(documents.Model, text)) == text


# Versions


def test_a_new_model_and_its_commitments_name_every_version(tmp_path, key, monkeypatch):
    monkeypatch.setattr("smark_jax.vault.crypto._N", 2**10)
    vault.create(tmp_path / "vault", SECRET)
    with vault.opened(tmp_path / "vault", SECRET) as desk:
        model = models.add(desk, "net", {"kernel": np.random.default_rng(0).normal(size=(40, 60)).astype(np.float32)})
        issuing.issue(model, customers.resolve(desk, ["Ada"]), tmp_path / "out")
        text = store.model_document(desk.connection, "net") or ""
        header = commitments.latest(desk, "net").header
    assert json.loads(text)["versions"] == header.versions._asdict() == documents.Versions()._asdict()
    assert header.versions._fields == ("cipher", "carrier", "code", "decoder", "shape")


@pytest.mark.parametrize("kind", documents.Versions._fields)
def test_an_unknown_version_is_refused_and_not_guessed(old, tmp_path, kind, monkeypatch):
    newer = documents.Versions()._replace(**{kind: "quantum/9"})
    with vault.opened(old / "vault", SECRET) as desk:
        text = store.model_document(desk.connection, "net") or ""
        document = documents.text(documents.stored(documents.Model, text)._replace(versions=newer))
        monkeypatch.setattr(store, "model_document", lambda *_: document)
        with pytest.raises(ValueError, match=rf"the {kind} 'quantum/9'.*\n.*upgrade smark-jax"):
            models.get(desk, "net")
    signed = documents.parse(documents.Signed, json.loads((old / "bundle.json").read_text()))
    commitment = signed.bundle.commitment
    forged = commitment._replace(header=commitment.header._replace(versions=newer))
    (tmp_path / "commitment").write_bytes(forged.published)
    (tmp_path / "bundle").write_text(
        json.dumps(documents.plain(signed._replace(bundle=signed.bundle._replace(commitment=forged))))
    )
    for read in (lambda: bundles.read_commitment(tmp_path / "commitment"), lambda: bundles.read(tmp_path / "bundle")):
        with pytest.raises(errors.Unreadable, match=f"the {kind} 'quantum/9'.*Upgrade smark-jax"):
            read()


def test_a_second_algorithm_is_one_entry_and_the_first_stays(old, monkeypatch):
    """A carrier that is the first one's with chips in another order; copies of old models are read by the old one."""
    drawn = []

    def turned(key, spec, shape, num_chips):
        drawn.append(num_chips)
        return versions.CARRIERS["hadamard/1"](key, spec, shape, num_chips)

    monkeypatch.setitem(versions.CARRIERS, "turned/1", turned)
    assert versions.unknown(documents.Versions(carrier="turned/1")) is None
    assert versions.unknown(documents.Versions(carrier="x" * 5_000)) == f"the carrier '{'x' * 40}'"
    with vault.opened(old / "vault", SECRET) as desk:
        model = models.get(desk, "net")
        model.mark  # noqa: B018
        assert drawn == []
        new = models.OpenModel(desk, model.settings._replace(versions=documents.Versions(carrier="turned/1")))
        assert new.mark.num_chips == 64 == drawn[0]


def test_a_database_of_a_newer_version_names_the_upgrade(old, tmp_path):
    (tmp_path / "vault.sqlite").write_bytes((old / "vault" / "vault.sqlite").read_bytes())
    connection = sqlite3.connect(tmp_path / "vault.sqlite")
    connection.execute(f"PRAGMA user_version = {len(store.MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(ValueError, match="Upgrade smark-jax"):
        store.connect(tmp_path / "vault.sqlite")


def test_a_bundle_of_a_newer_format_names_the_upgrade(old, tmp_path):
    signed = json.loads((old / "bundle.json").read_text())
    signed["bundle"]["version"] = 2
    (tmp_path / "bundle").write_text(json.dumps(signed))
    with pytest.raises(errors.Unreadable, match="Upgrade smark-jax"):
        bundles.read(tmp_path / "bundle")


# Parsing


BROKEN = {
    "bundle.created": lambda b: b.pop("created"),
    "bundle.verdict.number": lambda b: b["verdict"].update(number=True),
    "bundle.num_suspects": lambda b: b.update(num_suspects=-1),
    "bundle.num_alignments": lambda b: b.update(num_alignments=2**63),
    "bundle.accused.share": lambda b: b["accused"][0].update(share="1"),
    "bundle.accused.statistic": lambda b: b["accused"][0].update(statistic=1e300),
    "bundle.opened.index": lambda b: b["opened"][0].pop("index"),
    "bundle.opened.leaf": lambda b: b["opened"][0].update(leaf=[]),
    "bundle.opened.leaf.salt": lambda b: b["opened"][0]["leaf"].update(salt="ab"),
    "bundle.commitment.root": lambda b: b["commitment"].update(root="X" * 64),
    "bundle.commitment.header_path": lambda b: b["commitment"].update(header_path="ab"),
    "bundle.commitment.header.previous": lambda b: b["commitment"]["header"].update(previous=0),
    "bundle.suspect.reading.given": lambda b: b["suspect"]["reading"].update(given={"a": 1}),
    "bundle.suspect.reading.rectify": lambda b: b["suspect"]["reading"].update(rectify=None),
    "bundle.suspect.log_maps": lambda b: b["suspect"].update(log_maps=None),
    "bundle.spec": lambda b: b["spec"][0].pop(),
}


@pytest.mark.parametrize("field", BROKEN)
def test_a_field_that_is_missing_or_of_another_kind_is_named(old, field):
    signed = json.loads((old / "bundle.json").read_text())
    BROKEN[field](signed["bundle"])
    with pytest.raises(documents.Wrong, match=f"^field '{field}' is missing or invalid$"):
        documents.parse(documents.Signed, signed)


def test_an_unknown_field_and_what_is_no_object_are_named(old):
    signed = json.loads((old / "bundle.json").read_text())
    signed["bundle"]["suspect"]["shape"] = "fisher/1"
    with pytest.raises(
        documents.Wrong, match=r"^field 'bundle.suspect.shape' is unknown to this version of smark-jax$"
    ):
        documents.parse(documents.Signed, signed)
    for nothing in ([], None, "bundle", 3):
        with pytest.raises(documents.Wrong, match="content"):
            documents.parse(documents.Signed, nothing)


def test_a_document_of_a_newer_vault_asks_for_an_upgrade():
    with pytest.raises(
        ValueError, match=r"a reading as this version writes it, .*'mood' is unknown.*\n.*upgrade smark-jax"
    ):
        documents.stored(documents.Reading, '{"align":null,"given":{},"rectify":false,"mood":"good"}')
    assert reading.Reading().document == documents.Reading(None, {}, False, 3)
