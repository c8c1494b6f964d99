"""Licences between people who do not keep to the order of things: customers who dodge, owners who forge."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import terminal
from terminal import smark

from smark_jax import embedding, files, keys, licence, vault
from smark_jax.licence import documents, group, segments
from smark_jax.vault import bundles, licensing, models, wallets

CHOICES, PARTS = 512, 4


@pytest.fixture(scope="module")
def offered(tmp_path_factory):
    """A vault with offers to three customers, and wallets; nobody has requested anything."""
    folder = tmp_path_factory.mktemp("licence")
    base = {"a/kernel": np.random.default_rng(0).normal(size=(128, 200)).astype(np.float32)}
    files.write(folder / "base.safetensors", base)
    smark(folder, "init", "vault")
    smark(folder, "add-model", "vault", "net", "base.safetensors")
    for name in ("ada", "bob", "arbiter"):
        smark(folder, "licence", "init", name)
    about = ("--choices", CHOICES, "--parts", PARTS, "--out", "offers")
    smark(folder, "licence", "offer", "vault", "net", "Ada", "Bob", "Cleo", *about)
    return folder


@pytest.fixture
def desk(offered, tmp_path):
    shutil.copytree(offered, tmp_path / "desk")
    return tmp_path / "desk"


def offer(folder, name="000000-Ada"):
    return documents.loads(licence.SignedOffer, (folder / f"offers/{name}.offer").read_bytes(), "offer")


def sent(folder, name, file):
    (folder / name).write_bytes(documents.dumps(file))
    return name


def signed(made, who, **fields):
    """A request whose customer changed some of its fields, and signed it."""
    plain = made.request.request._replace(**fields)
    return made.request._replace(request=plain, signature=documents.sign(who.signing, plain))


ADA, EVE, ARBITER = (licence.Identity(keys.new()) for _ in range(3))


def test_a_customer_cannot_make_its_conviction_dear(desk):
    """Each p-value pays for the attempt's number, which the customer states."""
    request = licence.request(offer(desk), ADA, 2**62).request
    name = sent(desk, "dear.request", documents.RequestFile(request))
    assert "attempt" in smark(desk, "issue", "vault", "net", "--request", name, "--out", "packages", code=1)


def test_two_requests_of_a_customer_are_not_served_at_once(desk):
    """The second would be served and not noted: nobody would ask for the word in its copy."""
    names = [
        sent(desk, f"{i}.request", documents.RequestFile(licence.request(offer(desk), who).request))
        for i, who in enumerate((ADA, ADA, EVE))
    ]
    for one, other in ((0, 1), (0, 2)):
        both = ("--request", names[one], "--request", names[other])
        refused = smark(desk, "issue", "vault", "net", *both, "--out", "packages", code=1)
        assert "one request of each customer" in refused and not list((desk / "packages").glob("*"))


@pytest.mark.parametrize("what", ["created", "pieces"])
def test_a_request_cannot_make_the_evidence_too_large(desk, what):
    """Bundles hold the request and the sealed parts; one of more than 16 MiB is not read."""
    made = licence.request(offer(desk), ADA, arbiter=ARBITER.public)
    request, pieces = made.request, made.pieces
    if what == "created":
        request = signed(made, ADA, created="2026" * (1 << 20))
    else:
        pieces = (bytes(10_000), *pieces[1:])
        deposit = documents.Deposit(ARBITER.public, tuple(map(documents.sha256, pieces)))
        request = signed(made, ADA, deposit=deposit)
    name = sent(desk, "long.request", documents.RequestFile(request, tuple(piece.hex() for piece in pieces)))
    smark(desk, "issue", "vault", "net", "--request", name, "--out", "packages", code=1)


@pytest.fixture(scope="module")
def served(offered, tmp_path_factory):
    """Ada and Bob have copies, and deposited their words with one arbiter; both are accused of one suspect."""
    folder = tmp_path_factory.mktemp("served") / "desk"
    shutil.copytree(offered, folder)
    leaves = []
    for name, file in (("ada", "000000-Ada"), ("bob", "000001-Bob")):
        deposit = ("--deposit", "arbiter/public.json")
        smark(folder, "licence", "request", name, f"offers/{file}.offer", "--out", f"{name}.request", *deposit)
        smark(folder, "issue", "vault", "net", "--request", f"{name}.request", "--out", "packages")
        smark(folder, "licence", "open", name, f"packages/{file}.package", "--out", f"{name}.safetensors")
        leaves.append(files.read(folder / f"{name}.safetensors").leaves["a/kernel"])
    files.write(folder / "mixed.safetensors", {"a/kernel": (leaves[0] + leaves[1]) / 2})
    smark(folder, "trace", "vault", "net", "mixed.safetensors")
    smark(folder, "evidence", "export", "vault", 1, "--out", "evidence.json")
    return folder


def forged(folder, name, change):
    """A bundle whose owner changed the challenges, and signed it."""
    found = bundles.read(folder / "evidence.json").bundle
    with vault.opened(folder / "vault", terminal.SECRET) as opened:
        content = bundles.signed(found._replace(licences=tuple(change(found.licences))), opened.master)
    (folder / name).write_bytes(content)
    return name


def verify(folder, bundle, suspect, *answers, code=0):
    options = [part for answer in answers for part in ("--answer", answer)]
    ran = smark(folder, "evidence", "verify", bundle, suspect, "base.safetensors", *options, "--json", code=code)
    return json.loads(ran[ran.index("{") :].splitlines()[0])


@pytest.fixture
def accused(served, tmp_path):
    shutil.copytree(served, tmp_path / "desk")
    return tmp_path / "desk"


def test_a_false_deposit_does_not_stop_the_arbiters_other_answers(accused):
    """Otherwise a friend of the accused, or a second request of its own, would keep the arbiter from answering."""
    found = bundles.read(accused / "evidence.json").bundle
    (bob,) = (one for one in found.licences or () if one.request.offer.offer.customer == "Bob")
    made = licence.request(bob.request.offer, EVE)
    arbiter = documents.loads(documents.Arbiter, (accused / "arbiter/public.json").read_bytes(), "arbiter")
    deposit = documents.Deposit(arbiter, (documents.sha256(b"nothing"),) * PARTS)
    request = signed(made, EVE, deposit=deposit)
    parts = tuple(licence.order(found.suspect.content, request)[:1])
    false = bob._replace(request=request, parts=parts, pieces=(b"nothing".hex(),))
    bundle = forged(accused, "two.json", lambda asked: (false, *(one for one in asked if one != bob)))
    said = smark(accused, "licence", "answer", "arbiter", bundle, "--out", "arbiter.answer")
    assert "Bob" in said and "a deposit that opens" in said
    (one,) = verify(accused, bundle, "mixed.safetensors", "arbiter.answer")["convicted"]
    assert one["customer"] == "Ada"


def test_a_bundle_asks_for_each_word_once(accused):
    """With other keys for the same part an owner would have several tries at one word."""

    def change(challenges):
        key = keys.new().to_bytes().hex()
        (ada,) = (one for one in challenges if one.request.offer.offer.customer == "Ada")
        return *challenges, ada._replace(keys=(key,))

    bundle = forged(accused, "twice.json", change)
    refused = smark(accused, "licence", "answer", "ada", bundle, "--out", "ada.answer", code=1)
    assert "each word once" in refused and not (accused / "ada.answer").exists()
    found = verify(accused, bundle, "mixed.safetensors", code=1)
    assert any("twice" in check["detail"] for check in found["checks"] if not check["holds"])
    smark(accused, "licence", "answer", "ada", "evidence.json", "--out", "ada.answer")  # nothing was noted as opened


def test_a_customer_has_one_key(accused):
    """An owner adds a request that it made itself in the accused's name, and answers it."""

    def change(challenges):
        with vault.opened(accused / "vault", terminal.SECRET) as opened:
            model = models.get(opened, "net")
            key = licensing._key(model, 0)
        own = licence.request(challenges[0].request.offer, EVE)
        about = bundles.read(accused / "evidence.json").bundle.suspect.content
        part = licence.order(about, own.request)[0]
        secret = segments.part_keys(key, documents.digest(own.request.request), PARTS)[part]
        return *challenges, licence.Challenge(own.request, (part,), (secret.to_bytes().hex(),), (), ())

    found = verify(accused, forged(accused, "keys.json", change), "mixed.safetensors", code=1)
    assert any("another key" in check["detail"] for check in found["checks"] if not check["holds"])


def test_the_report_does_not_say_that_a_wrong_word_was_not_answered(accused):
    with vault.opened(accused / "vault", terminal.SECRET) as opened:
        model = models.get(opened, "net")
        copy = embedding.embed(dict(model.base), model.mark, model.words([0])[0])
        files.write(accused / "forged.safetensors", {name: np.asarray(leaf) for name, leaf in copy.items()})
    smark(accused, "trace", "vault", "net", "forged.safetensors")
    smark(accused, "evidence", "export", "vault", 2, "--out", "forged.json")
    smark(accused, "licence", "answer", "ada", "forged.json", "--out", "ada.answer")
    said = " ".join(verify(accused, "forged.json", "forged.safetensors", "ada.answer", code=1)["statements"])
    assert "no answer is here" not in said


def test_a_copy_can_be_opened_from_a_package_made_again(accused):
    """Whoever has lost both gets the same package but for its time; it tells the owner nothing new."""
    before = (accused / "ada.safetensors").read_bytes()
    (accused / "packages/000000-Ada.package").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smark_jax._documents.now", lambda: "2030-01-01T00:00:00Z")
        smark(accused, "issue", "vault", "net", "--request", "ada.request", "--out", "packages")
    smark(accused, "licence", "open", "ada", "packages/000000-Ada.package", "--out", "again.safetensors")
    assert (accused / "again.safetensors").read_bytes() == before


def test_a_customer_with_an_offer_gets_no_copy_without_a_word(desk):
    """Its leak would name the customer, whose word would then show that it was not its copy."""
    refused = smark(desk, "issue", "vault", "net", "Ada", "Dora", "--out", "copies", code=1)
    assert "'Ada'" in refused and "--request" in refused and not (desk / "copies").exists()
    smark(desk, "issue", "vault", "net", "Dora", "--out", "copies")
    said = smark(desk, "issue", "vault", "net", "--all", "--out", "copies")
    assert [path.name for path in (desk / "copies").iterdir()] == ["000003-Dora.safetensors"]
    assert "3 customers" in said and "--request" in said
    assert "Dora" in smark(desk, "licence", "offer", "vault", "net", "Dora", "--out", "offers", "--choices", CHOICES)


def test_the_same_dispute_is_not_exported_under_another_commitment(accused):
    """It would be the first bundle, and not hold against that commitment alone."""
    smark(accused, "issue", "vault", "net", "Dora", "--out", "copies")
    smark(accused, "trace", "vault", "net", "ada.safetensors")
    smark(accused, "evidence", "export", "vault", 2, "--out", "first.json")
    refused = smark(accused, "evidence", "export", "vault", 2, "--commitment", 2, "--out", "again.json", code=1)
    assert "the commitments from 1" in refused
    smark(accused, "evidence", "export", "vault", 2, "--out", "again.json")
    assert (accused / "first.json").read_bytes() == (accused / "again.json").read_bytes()


def test_evidence_that_nobody_could_read_is_not_exported(accused):
    """Many long words together: none of them is noted as asked for."""
    smark(accused, "trace", "vault", "net", "mixed.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bundles, "LARGEST", 40_000)
        refused = smark(accused, "evidence", "export", "vault", 2, "--out", "large.json", code=1)
        assert "at most 40,000 bytes" in refused and "--parts 0" in refused
        smark(accused, "evidence", "export", "vault", 2, "--parts", 0, "--out", "large.json")
    smark(accused, "evidence", "export", "vault", 2, "--parts", 2, "--out", "large.json")


def test_a_disk_that_is_full_at_any_write_loses_nothing(served, tmp_path):
    """Each step again after a failure gives what it would have given; a noted part is opened for its bundle."""
    steps = (
        ("licence", "offer", "vault", "net", "Dora", "--choices", CHOICES, "--parts", PARTS, "--out", "offers"),
        ("licence", "request", "cleo", "offers/000002-Cleo.offer", "--out", "cleo.request"),
        ("issue", "vault", "net", "--request", "cleo.request", "--out", "packages"),
        ("licence", "open", "cleo", "packages/000002-Cleo.package", "--out", "cleo.safetensors"),
        ("trace", "vault", "net", "cleo.safetensors"),
        ("evidence", "export", "vault", 2, "--out", "cleo.json"),
        ("licence", "answer", "cleo", "cleo.json", "--out", "cleo.answer"),
    )
    folder, true, failed = tmp_path / "desk", os.fsync, 0
    shutil.copytree(served, folder)
    smark(folder, "licence", "init", "cleo")
    for step in steps:
        for number in range(100):
            left = number

            def fsync(handle):
                nonlocal left
                left -= 1
                if left == -1:
                    raise OSError(errno.ENOSPC, "No space left on device")
                true(handle)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "fsync", fsync)
                ran = terminal.run(*step, folder=folder)
            if not ran.code:
                break
            failed += 1
            assert "Traceback" not in ran.err and "No space" in ran.err.replace("\n", " "), ran.err
        else:
            pytest.fail("never whole")
    assert failed >= len(steps)
    (one,) = verify(folder, "cleo.json", "cleo.safetensors", "cleo.answer")["convicted"]
    assert one["customer"] == "Cleo" and not list(folder.rglob("*.part"))


def test_a_second_licence_of_the_same_model_is_another_attempt(tmp_path):
    """Packages that open to something useless, each under a new offer, would give an owner more tries."""
    wallet, attempts = wallets.create(tmp_path / "wallet", "a sentence that nobody guesses"), []
    for model in ("net", "net", "net", "other"):
        point = group.times_base(licence.scalar(keys.new())).hex()
        offer = licence.Offer("", model, "Ada", 0, 1, "00" * 32, EVE.public.identity, point, 64, 1)
        made = wallets.request(wallet, licence.sign_offer(offer, EVE.signing))
        wallets._write(wallet, made._replace(state=wallets.RECEIVED))
        attempts.append(made.request.request.attempt)
    assert attempts == [1, 2, 3, 1]
