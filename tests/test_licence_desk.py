"""Licences from offer to conviction, as commands: owner, customer and arbiter each with files of their own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import terminal
from terminal import smark

from smark_jax import embedding, errors, files, keys, licence, vault
from smark_jax.licence import documents, group, packages, requests, segments
from smark_jax.vault import bundles, crypto, models, store, wallets

CHOICES, PARTS = 512, 4


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A vault with an offer to Ada, her request with a deposit, and her package; Bob has a wallet of his own."""
    folder = tmp_path_factory.mktemp("licence")
    rng = np.random.default_rng(0)
    base = {"a/kernel": rng.normal(size=(128, 200)).astype(np.float32), "b/bias": np.ones(30, np.float32)}
    files.write(folder / "base.safetensors", base)
    smark(folder, "init", "vault")
    smark(folder, "add-model", "vault", "net", "base.safetensors")
    for name in ("ada", "bob", "arbiter"):
        smark(folder, "licence", "init", name)
    about = ("--choices", CHOICES, "--parts", PARTS, "--out", "offers")
    smark(folder, "licence", "offer", "vault", "net", "Ada", "Bob", *about)
    deposit = ("--deposit", "arbiter/public.json")
    smark(folder, "licence", "request", "ada", "offers/000000-Ada.offer", "--out", "ada.request", *deposit)
    smark(folder, "issue", "vault", "net", "--request", "ada.request", "--out", "packages")
    smark(folder, "licence", "open", "ada", "packages/000000-Ada.package", "--out", "copy.safetensors")
    copy = files.read(folder / "copy.safetensors").leaves
    pruned = {name: np.where(abs(leaf) < 0.1, 0, leaf) for name, leaf in copy.items()}
    files.write(folder / "leaked.safetensors", pruned)
    smark(folder, "trace", "vault", "net", "leaked.safetensors")
    shutil.copytree(folder / "vault", folder / "before")
    smark(folder, "evidence", "export", "vault", 1, "--out", "evidence.json")
    smark(folder, "licence", "answer", "ada", "evidence.json", "--out", "ada.answer")
    return folder


def verify(folder, *answers, bundle="evidence.json", suspect="leaked.safetensors", code=0):
    options = [part for answer in answers for part in ("--answer", answer)]
    ran = smark(folder, "evidence", "verify", bundle, suspect, "base.safetensors", *options, "--json", code=code)
    return json.loads(ran[ran.index("{") :].splitlines()[0])


def test_accused_is_convicted_by_what_the_owner_does_not_know(desk):
    found = verify(desk, "ada.answer")
    (one,) = found["convicted"]
    assert found["holds"] and one["customer"] == "Ada" and one["fraction"] == 1 / PARTS
    assert one["statistic"] > 0.9 * np.sqrt(CHOICES / PARTS) and one["log10_p"] < -20
    assert any("compare it with the licence contract" in statement for statement in found["statements"])


def test_arbiter_answers_from_the_deposit(desk):
    smark(desk, "licence", "answer", "arbiter", "evidence.json", "--out", "arbiter.answer")
    (one,) = verify(desk, "arbiter.answer")["convicted"]
    assert one["opened_by"] == "arbiter"
    assert one["statistic"] == pytest.approx(verify(desk, "ada.answer")["convicted"][0]["statistic"])


def test_without_an_answer_the_report_says_what_is_missing(desk):
    found = verify(desk)
    assert found["holds"] and not found["convicted"]
    assert any("A refusal proves nothing by itself" in statement for statement in found["statements"])


def test_owner_cannot_frame_with_the_codeword_that_it_knows(desk):
    """The same forgery convicts always where there is no licence: the first accusation holds."""
    with vault.opened(desk / "vault", terminal.SECRET) as opened:
        model = models.get(opened, "net")
        forged = embedding.embed(dict(model.base), model.mark, model.words([0])[0])
        files.write(desk / "forged.safetensors", {name: np.asarray(leaf) for name, leaf in forged.items()})
    smark(desk, "trace", "vault", "net", "forged.safetensors")
    smark(desk, "evidence", "export", "vault", 2, "--out", "forged.json")
    smark(desk, "licence", "answer", "ada", "forged.json", "--out", "forged.answer")
    alone = verify(desk, bundle="forged.json", suspect="forged.safetensors")
    assert alone["holds"] and alone["accused"][0]["customer"] == "Ada"
    answered = verify(desk, "forged.answer", bundle="forged.json", suspect="forged.safetensors", code=1)
    assert not answered["holds"] and not answered["convicted"]
    (check,) = (check for check in answered["checks"] if check["name"] == "secret word of 'Ada'")
    assert "does not carry it" in check["detail"]


def test_wallet_opens_a_part_for_one_bundle(desk, tmp_path):
    """The owner goes back to a backup from before the first dispute, and asks for the same part again."""
    shutil.copytree(desk / "before", tmp_path / "vault")
    asked = bundles.read(desk / "evidence.json").bundle.licences
    assert asked
    rng, leaves = np.random.default_rng(1), files.read(desk / "leaked.safetensors").leaves
    while True:
        suspect = {name: leaf + rng.normal(size=leaf.shape).astype(np.float32) * 1e-4 for name, leaf in leaves.items()}
        if licence.order(files.content_hash(suspect), asked[0].request)[0] == asked[0].parts[0]:
            break
    files.write(tmp_path / "other.safetensors", suspect)
    smark(tmp_path, "trace", "vault", "net", "other.safetensors")
    smark(tmp_path, "evidence", "export", "vault", 2, "--out", "again.json")
    refused = smark(tmp_path, "licence", "answer", desk / "ada", "again.json", "--out", "again.answer", code=1)
    assert "which was opened for the bundle" in refused and not (tmp_path / "again.answer").exists()
    answered = verify(
        desk, "ada.answer", bundle=tmp_path / "again.json", suspect=tmp_path / "other.safetensors", code=1
    )
    assert any("one to another bundle" in check["detail"] for check in answered["checks"] if not check["holds"])


def test_export_of_the_same_dispute_gives_the_same_bundle(desk):
    smark(desk, "evidence", "export", "vault", 1, "--out", "again.json")
    assert (desk / "again.json").read_bytes() == (desk / "evidence.json").read_bytes()


def test_strangers_cannot_answer(desk):
    refused = smark(desk, "licence", "answer", "bob", "evidence.json", "--out", "bob.answer", code=1)
    assert "asks something of this wallet" in refused


def spoiled(folder: Path, content: bytes, segment: int, variant: int) -> bytes:
    """A package in which the owner garbled one variant of one segment, and which it signed again."""
    signed, start = packages._head(content, "package")
    request = documents.loads(documents.RequestFile, (folder / "bob.request").read_bytes(), "request").request.request
    (leaf,) = signed.package.leaves
    found = segments.draw(requests.seed(request), leaf.held, CHOICES, PARTS)
    sizes = 4 * np.bincount(found.members, minlength=CHOICES) + 16
    place = start + sum(size + 16 for size in signed.package.pieces)
    place += int(2 * sizes[:segment].sum() + variant * sizes[segment])
    body = content[start:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    with vault.opened(folder / "vault", terminal.SECRET) as opened:
        package = signed.package._replace(body=documents.sha256(body))
        signature = documents.sign(crypto.signing_key(opened.master), package)
    head = documents.dumps(documents.SignedPackage(package, signature))
    return packages._MAGIC + len(head).to_bytes(4, "big") + head + body


def test_damaged_package_costs_a_new_word_and_tells_nothing(desk, tmp_path):
    smark(desk, "licence", "request", "bob", "offers/000001-Bob.offer", "--out", "bob.request")
    smark(desk, "issue", "vault", "net", "--request", "bob.request", "--out", "packages")
    package = desk / "packages/000001-Bob.package"
    texts, damaged, bad = [], desk, desk
    for segment, variant in ((0, 0), (0, 1), (7, 0), (7, 1)):
        wallet, sent = (tmp_path / f"{kind}-{segment}-{variant}" for kind in ("bob", "package"))
        shutil.copytree(desk / "bob", wallet)
        sent.write_bytes(spoiled(desk, package.read_bytes(), segment, variant))
        ran = terminal.run("licence", "open", wallet, sent, "--out", f"{sent}.safetensors", folder=tmp_path)
        assert Path(f"{sent}.safetensors").exists() == (not ran.code)
        if ran.code:  # the customer chose this variant
            texts.append(ran.err)
            damaged, bad = wallet, sent
    assert len(texts) == 2 and len(set(texts)) == 1 and "expected a whole package" in texts[0]
    again = smark(tmp_path, "licence", "open", damaged, package, "--out", "whole.safetensors", code=1)
    assert "one package for each request" in again
    smark(tmp_path, "licence", "complain", damaged, bad, "--out", "second.request")
    smark(desk, "issue", "vault", "net", "--request", tmp_path / "second.request", "--out", tmp_path)
    smark(tmp_path, "licence", "open", damaged, "000001-Bob.package", "--out", "copy.safetensors")
    with wallets.opened(damaged, terminal.SECRET) as wallet:
        first, second = wallets.held(wallet)
    assert (first.state, second.state) == (wallets.DAMAGED, wallets.RECEIVED)
    assert second.request.request.attempt == 2 and first.bits != second.bits
    old = smark(desk, "issue", "vault", "net", "--request", "bob.request", "--out", "packages", code=1)
    assert "attempt 2 or a later one" in old
    # A copy of the first word, kept although the second was asked for: both words are asked of the accused.
    leaked = tmp_path / "first.safetensors"
    licence.unpack(package.read_bytes(), first.request, first.secrets, "package", lambda _: leaked)
    smark(tmp_path, "trace", desk / "vault", "net", leaked)
    with vault.opened(desk / "vault", terminal.SECRET) as opened:
        number = store.last_verdict(opened.connection)
    smark(tmp_path, "evidence", "export", desk / "vault", number, "--out", "both.json")
    smark(tmp_path, "licence", "answer", damaged, "both.json", "--out", "both.answer")
    shutil.copy(desk / "base.safetensors", tmp_path)
    found = verify(tmp_path, "both.answer", bundle="both.json", suspect=leaked)
    assert len(bundles.read(tmp_path / "both.json").bundle.licences or ()) == 2
    assert found["holds"] and found["convicted"][0]["customer"] == "Bob"


def test_other_customers_request_and_package_are_refused(desk, tmp_path):
    smark(tmp_path, "licence", "init", "eve")
    smark(tmp_path, "licence", "request", "eve", desk / "offers/000000-Ada.offer", "--out", "eve.request")
    refused = smark(desk, "issue", "vault", "net", "--request", tmp_path / "eve.request", "--out", "packages", code=1)
    assert "the key that signed the first request" in refused
    package = desk / "packages/000000-Ada.package"
    refused = smark(tmp_path, "licence", "open", "eve", package, "--out", "eve.safetensors", code=1)
    assert "a package for a request of this wallet" in refused
    other = smark(desk, "licence", "open", "ada", "packages/000000-Ada.package", "--out", "copy.npz", code=1)
    assert "a name that ends with .safetensors" in other


def test_more_disputes_than_parts_are_refused(desk, tmp_path):
    shutil.copytree(desk / "before", tmp_path / "vault")
    refused = smark(tmp_path, "evidence", "export", "vault", 1, "--parts", PARTS + 1, "--out", "all.json", code=1)
    assert f"{PARTS} left" in refused
    smark(tmp_path, "evidence", "export", "vault", 1, "--parts", PARTS, "--out", "all.json")
    smark(tmp_path, "trace", "vault", "net", desk / "leaked.safetensors")
    refused = smark(tmp_path, "evidence", "export", "vault", 2, "--out", "more.json", code=1)
    assert "0 left" in refused
    smark(tmp_path, "evidence", "export", "vault", 2, "--parts", 0, "--out", "more.json")
    assert not bundles.read(tmp_path / "more.json").bundle.licences


def offered(owner: licence.Identity, customer: str) -> documents.SignedOffer:
    point = group.times_base(licence.scalar(keys.new())).hex()
    return licence.sign_offer(
        licence.Offer("2026-11-28T00:00:00Z", "net", customer, 0, 1, "00" * 32, owner.public.identity, point, 64, 1),
        owner.signing,
    )


def test_words_that_brought_no_copy_count_under_any_offer(tmp_path):
    """Otherwise an owner would spoil packages under one offer after the other, and no attempt would be paid for."""
    owner, other = licence.Identity(keys.new()), licence.Identity(keys.new())
    wallet = wallets.create(tmp_path / "wallet", "a sentence that nobody guesses")
    first = offered(owner, "Ada")
    assert wallets.request(wallet, first).request.request.attempt == 1
    assert wallets.request(wallet, first) == wallets.request(wallet, first)
    assert wallets.request(wallet, offered(other, "Ada")).request.request.attempt == 1
    attempts = [wallets.request(wallet, offered(owner, "Ada")).request.request.attempt for _ in range(7)]
    assert attempts == [2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(errors.SmarkError, match="at most 8 attempts"):
        wallets.request(wallet, offered(owner, "Ada"))


def test_an_offer_keeps_its_numbers(desk):
    refused = smark(desk, "licence", "offer", "vault", "net", "Ada", "--out", "offers", code=1)
    assert f"the {CHOICES} choices in {PARTS} parts of Ada's offer" in refused and "4,096 choices in 8 parts" in refused
    before = (desk / "offers/000000-Ada.offer").read_bytes()
    smark(desk, "licence", "offer", "vault", "net", "Ada", "--choices", CHOICES, "--parts", PARTS, "--out", "offers")
    assert (desk / "offers/000000-Ada.offer").read_bytes() == before


def test_a_wallet_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("smark_jax._io.os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            wallets.create(tmp_path / "wallet", terminal.SECRET)
    assert not list(tmp_path.iterdir())
    wallets.create(tmp_path / "wallet", terminal.SECRET)
    with wallets.opened(tmp_path / "wallet", terminal.SECRET) as wallet:
        assert not wallets.held(wallet)
