"""Drafts and draws: own words that are committed to first, and a public value that comes later and draws the codewords.

The references are hashlib and cryptography's ChaCha20, by hand; a chosen word is the negative control of the claim.
"""

import contextlib
import hashlib
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import terminal
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from stress.fuzz import evidence as fuzz
from time_stamps import authority, stamp

from smark_jax import codes, embedding, errors, files, keys, statistics, vault
from smark_jax.vault import (
    bundles,
    commitments,
    crypto,
    customers,
    documents,
    drafts,
    evidence,
    issuing,
    models,
    ranges,
    reading,
    shapes,
    timestamps,
    verdicts,
    verification,
)

SECRET = terminal.SECRET
NAMES = ["Grace", "Ada", "Emmy", "Linus"]
HEX = "8f" * 32
BEACON = f"drand round 123: {HEX}"
OPENSSL = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl as a time-stamp authority")


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"kernel": rng.normal(size=(100, 200)).astype(np.float32), "bias": rng.normal(size=200).astype(np.float32)}


def stream(key: bytes, serial: int, num_chips: int) -> bytes:
    """Word of version 2 by hand: ChaCha20 of OpenSSL, block by block; a bit of 1 for a chip of -1, first bit first."""
    blocks = b""
    for k in range(-(-num_chips // 512)):
        nonce = serial.to_bytes(4, "little") + k.to_bytes(4, "little") + bytes(4) + bytes([0, 0, 0, 128])
        blocks += Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(64))
    bits = [blocks[i // 8] >> i % 8 & 1 for i in range(num_chips)]
    bits += [0] * (-num_chips % 8)
    return bytes(int("".join(map(str, bits[i : i + 8])), 2) for i in range(0, len(bits), 8))


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def root_by_hand(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1 << (len(leaves) - 1).bit_length() - 1
    return hashlib.sha256(b"\1" + root_by_hand(leaves[:k]) + root_by_hand(leaves[k:])).digest()


class Case(NamedTuple):
    """What an arbiter gets, and the vault it came from."""

    folder: Path
    bundle: Path
    suspect: Path
    base: Path
    root: str

    def verify(self, **changed: Any) -> verification.Report:
        paths = {name: changed.pop(name, getattr(self, name)) for name in ("bundle", "suspect", "base")}
        return verification.verify(**paths, **{"root": self.root, **changed})

    def forge(self, path: Path, change: Any) -> verification.Report:
        """The bundle as an owner who cheats would sign it."""
        content = json.loads(self.bundle.read_text())["bundle"]
        change(content)
        path.write_bytes(bundles.signed(content, crypto.unseal(self.folder / "vault" / "master.key", SECRET)))
        return self.verify(bundle=path)


def failing(report: verification.Report) -> set[str]:
    return {check.name for check in report.checks if not check.holds}


@contextlib.contextmanager
def new_vault(folder: Path, base: dict[str, np.ndarray]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crypto, "_N", 2**10)
        patch.setattr(keys, "new", lambda: keys.from_bytes(hashlib.sha256(b"a master key").digest()))
        vault.create(folder / "vault", SECRET)
        with vault.opened(folder / "vault", SECRET) as desk:
            made = shapes.from_weights(base, models.choose(base))
            yield models.add(desk, "net", base, made=made)


@pytest.fixture(scope="module", params=["beacon", pytest.param("token", marks=OPENSSL)])
def case(request, tmp_path_factory):
    """Four customers with drawn words; Ada's copy was pruned a little."""
    folder = tmp_path_factory.mktemp("drawn")
    base = weights(0)
    with new_vault(folder, base) as model:
        draft = drafts.draft(model, 100)
        draw = drafts.by_beacon(BEACON)
        if request.param == "token":
            authority(folder)
            draw = drafts.by_token(model, stamp(folder, timestamps.request(draft)))
        drafts.record(model, draw)
        issued = issuing.issue(model, customers.resolve(model.vault, NAMES), folder / "copies")
        if request.param == "token":
            first = commitments.get(model.vault, "net", 1)
            timestamps.add(model.vault, first, stamp(folder, timestamps.request(first)))
        leaked = files.read(issued.files[1]).leaves
        files.write(folder / "base", base)
        files.write(folder / "suspect", {name: np.where(abs(w) < 0.1, 0, w) for name, w in leaked.items()})
        verdicts.trace(model, [folder / "suspect"])
        exported = evidence.export(model.vault, 1)
        assert exported.shape is not None
        shapes.write(folder, exported.shape)
        (folder / "bundle").write_bytes(exported.content)
        root = commitments.latest(model.vault, "net").root
    return Case(folder, folder / "bundle", folder / "suspect", folder / "base", root)


# Derivation, by hand


@pytest.mark.parametrize("num_chips", [304, 600])
def test_a_draft_is_the_root_by_hand_over_own_words_by_hand(tmp_path, num_chips):
    with new_vault(tmp_path, weights(0)) as model:
        model = models.add(
            model.vault,
            "long",
            weights(1),
            num_chips=num_chips,
            made=shapes.from_weights(weights(1), models.choose(weights(1))),
        )
        draft = drafts.draft(model, 11)
        code, master = models.code_key(model.vault, "long").to_bytes(), model.vault.master
        salts = keys.derive(master, "long", "own salts").to_bytes()
        leaves = [b"\0draft " + documents.canonical(draft.header)]
        for serial in range(11):
            salt = Cipher(algorithms.ChaCha20(salts, serial.to_bytes(4, "little") + bytes(12)), mode=None)
            salt = salt.encryptor().update(bytes(32))
            leaves.append(b"\0own word " + salt + serial.to_bytes(8, "big") + stream(code, serial, num_chips))
        assert draft.root == root_by_hand([hashlib.sha256(leaf).digest() for leaf in leaves]).hex()
        assert draft.header.code_key == hashlib.sha256(code).hexdigest()
        assert draft.header.base == files.content_hash(weights(1))

        before = model.words(range(5))
        drafts.record(model, drafts.by_beacon(BEACON))
        public = hashlib.sha256(bytes.fromhex(HEX)).digest()
        issued = [xor(stream(code, s, num_chips), stream(public, s, num_chips)) for s in (0, 3, 10)]
        assert [w.tobytes() for w in np.packbits(model.words([0, 3, 10]) < 0, axis=1)] == issued
        assert np.mean(before == model.words(range(5))) < 0.6  # the issued words are others
        np.testing.assert_array_equal(model.own_words(range(5)), before)
        np.testing.assert_array_equal(model.book(11).words(np.arange(5)), model.words(range(5)))
        assert json.loads(draft.published) == documents.plain(draft)


def test_drafts_are_made_in_passes_of_any_size(tmp_path, monkeypatch):
    with new_vault(tmp_path, weights(0)) as model:
        whole = list(drafts._leaves(model, 50))
        monkeypatch.setattr(drafts, "_SERIALS_PER_PASS", 7)
        assert list(drafts._leaves(model, 50)) == whole


# Evidence of drawn words


def test_evidence_of_drawn_words_holds_and_says_what_is_trusted(case):
    report = case.verify()
    assert report.holds, report.checks
    assert [accused.customer for accused in report.accused] == ["Ada"]
    checked = {check.name: check.detail for check in report.checks}
    assert {"draft", "public value", "drawn words"} <= checked.keys()
    said = " ".join(report.statements)
    assert "drawn at random, and neither chosen" not in said
    assert "tried no other drafts and values" in said
    if "token" in case.bundle.read_text().partition('"drawn"')[2]:
        assert "openssl ts -verify" in said
        assert "time stamp of the draft" in checked["public value"]
    else:
        assert "'drand' published this value as its round '123', after the draft" in said
    assert "without a look at codewords" not in said  # base and shape were fixed before anybody knew one


def test_the_opened_word_is_own_xor_public_by_hand(case):
    content = json.loads(case.bundle.read_text())["bundle"]
    (opened,) = content["opened"]
    key = hashlib.sha256(bytes.fromhex(content["drawn"]["draw"]["value"])).digest()
    public = stream(key, opened["leaf"]["serial"], 304)
    assert xor(bytes.fromhex(opened["own"]["word"]), public).hex() == opened["leaf"]["word"]
    assert content["commitment"]["header"]["draw"] == {
        "root": content["drawn"]["draft"]["root"],
        "value": key.hex(),
    }


def changed(text: str) -> str:
    return f"{int(text[:2], 16) ^ 1:02x}{text[2:]}"


def own(bundle: dict[str, Any]) -> dict[str, Any]:
    return bundle["opened"][0]["own"]


def both(bundle: dict[str, Any]) -> None:
    """Another own word, and the codeword that then follows: what an owner wants who chooses after V is known."""
    bundle["opened"][0]["leaf"] |= {"word": changed(bundle["opened"][0]["leaf"]["word"])}
    own(bundle)["word"] = changed(own(bundle)["word"])


def draft_of(bundle: dict[str, Any]) -> dict[str, Any]:
    return bundle["drawn"]["draft"]


def draw_of(bundle: dict[str, Any]) -> dict[str, Any]:
    return bundle["drawn"]["draw"]


FORGERIES = {
    "another own word": (lambda b: own(b).update(word=changed(own(b)["word"])), "drawn words"),
    "a shorter own word": (lambda b: own(b).update(word=own(b)["word"][2:]), "drawn words"),
    "another salt": (lambda b: own(b).update(salt=changed(own(b)["salt"])), "drawn words"),
    "another path": (lambda b: own(b)["path"].__setitem__(0, "11" * 32), "drawn words"),
    "a path cut short": (lambda b: own(b)["path"].pop(), "drawn words"),
    "another serial": (lambda b: b["opened"][0]["leaf"].update(serial=2), "drawn words"),
    "a serial beyond": (lambda b: b["opened"][0]["leaf"].update(serial=100), "drawn words"),
    "no own word": (lambda b: b["opened"][0].pop("own"), "drawn words"),
    "another codeword": (lambda b: b["opened"][0]["leaf"].update(word="00" * 38), "drawn words"),
    "another own word and codeword": (both, "drawn words"),
    "no draft": (lambda b: b.pop("drawn"), "draft"),
    "a draft that was not named": (lambda b: b["commitment"]["header"].pop("draw"), "draft"),
    "another root": (lambda b: draft_of(b).update(root="11" * 32), "draft"),
    "another root, named": (lambda b: b["commitment"]["header"]["draw"].update(root="11" * 32), "draft"),
    "another capacity": (lambda b: draft_of(b)["header"].update(capacity=101), "draft"),
    "another carrier": (lambda b: draft_of(b)["header"].update(carrier_key="11" * 32), "draft"),
    "another code key": (lambda b: draft_of(b)["header"].update(code_key="11" * 32), "draft"),
    "another base": (lambda b: b["commitment"]["header"].update(base="11" * 32), "draft"),
    "another strength": (lambda b: b["commitment"]["header"].update(strength=0.5), "draft"),
    "another header path": (lambda b: draft_of(b)["header_path"].pop(), "draft"),
    "another value": (lambda b: draw_of(b).update(value=changed(draw_of(b)["value"])), "public value"),
    "another value, named": (lambda b: b["commitment"]["header"]["draw"].update(value="11" * 32), "public value"),
    "no source": (lambda b: [draw_of(b).pop(name, None) for name in ("token", "beacon")], "public value"),
    "two sources": (
        lambda b: draw_of(b).update(
            token={"time": "2026-01-01T00:00:00Z", "response": "00"}, beacon={"name": "drand", "round": "1"}
        ),
        "public value",
    ),
    "other bytes for a token": (
        lambda b: (
            draw_of(b).pop("beacon", None),
            draw_of(b).update(token={"time": "2026-01-01T00:00:00Z", "response": "3000"}),
        ),
        "public value",
    ),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_changed_draw_is_noticed_and_nobody_is_accused_by_it(case, tmp_path, what):
    change, expected = FORGERIES[what]
    shutil.copy(next(case.folder.glob("shape-*")), tmp_path)
    report = case.forge(tmp_path / "forged", change)
    assert expected in failing(report)
    assert report.accused == ()


@OPENSSL
@pytest.mark.parametrize("case", ["token"], indirect=True)
def test_a_token_of_another_file_another_time_and_a_late_draft_are_noticed(case, tmp_path):
    authority(tmp_path)
    shutil.copy(next(case.folder.glob("shape-*")), tmp_path)
    foreign = stamp(tmp_path, timestamps.request(commitments_file(case)))

    def other(bundle):
        draw_of(bundle)["token"]["response"] = foreign.hex()

    assert "public value" in failing(case.forge(tmp_path / "forged", other))
    moved = case.forge(tmp_path / "forged", lambda b: draw_of(b)["token"].update(time="2020-01-01T00:00:00Z"))
    assert "public value" in failing(moved)

    def late(bundle):
        """The commitment's stamp says 2001; only the claim about the order is at stake here."""
        bundle["timestamps"][0]["time"] = "2001-01-01T00:00:00Z"

    report = case.forge(tmp_path / "forged", late)
    (value,) = (check for check in report.checks if check.name == "public value")
    assert not value.holds
    assert "commitment 1 was stamped before the draft" in value.detail


def commitments_file(case: Case) -> documents.Commitment:
    return bundles.read(case.bundle).bundle.commitment


def test_a_bundle_whose_draft_a_newer_version_wrote_is_not_read(case, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)'smark draft' of version 1.*Upgrade smark-jax"):
        case.forge(tmp_path / "forged", lambda b: draft_of(b).update(version=2))


def test_hostile_bundles_with_a_draw_are_refused_or_do_not_hold(case, tmp_path):
    rng, original = np.random.default_rng(0), case.bundle.read_bytes()
    shutil.copy(next(case.folder.glob("shape-*")), tmp_path)
    path, failed = tmp_path / "bundle", 0
    for _ in range(150):
        content = fuzz.edit(original, rng)
        path.write_bytes(content)
        try:
            report = case.verify(bundle=path)
        except errors.Unreadable as error:
            assert str(error).isprintable(), error
        else:
            assert report.holds == (json.loads(content) == json.loads(original))
            failed += not report.holds
    assert failed > 5


def test_a_coalition_of_two_sales_is_proved_with_drawn_words(tmp_path):
    base = weights(0)
    with new_vault(tmp_path, base) as model:
        customers.resolve(model.vault, [f"elsewhere {number}" for number in range(20)])
        drafts.draft(model, 1000)
        drafts.record(model, drafts.by_beacon(BEACON))
        leaked, roots = [], []
        for names in (["Ada", "Bob"], ["Carol", "Dora"]):
            issued = issuing.issue(model, customers.resolve(model.vault, names), tmp_path / "copies")
            leaked.append(files.read(issued.files[0]).leaves)
            roots.append(issued.commitment.root)
        files.write(tmp_path / "base", base)
        files.write(tmp_path / "suspect", {name: (leaked[0][name] + leaked[1][name]) / 2 for name in base})
        verdicts.trace(model, [tmp_path / "suspect"])
        exported = evidence.export(model.vault, 1)
        (tmp_path / "bundle").write_bytes(exported.content)
        assert exported.shape is not None
        shapes.write(tmp_path, exported.shape)
    report = verification.verify(tmp_path / "bundle", tmp_path / "suspect", tmp_path / "base", root=roots)
    assert report.holds, report.checks
    assert {accused.customer for accused in report.accused} == {"Ada", "Carol"}
    counted = {check.detail.partition("counting ")[2] for check in report.checks if "accusation" in check.name}
    assert all(text.startswith("32 customers") for text in counted)  # serials 20 and 22, of four customers


def test_the_files_for_openssl_are_written_as_the_documentation_says(case, tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs/evidence.md").read_text()
    code = page.partition("```python\nimport json, pathlib")[2].partition("```")[0]
    shutil.copy(case.bundle, tmp_path / "evidence.json")
    monkeypatch.chdir(tmp_path)
    drawn = bundles.read(case.bundle).bundle.drawn
    if drawn.draw.beacon:
        code = "".join(code.splitlines(keepends=True)[:-1])
    exec(f"import json, pathlib{code}", {})
    assert (tmp_path / "draft.json").read_bytes() == drawn.draft.published
    if drawn.draw.token:
        assert (tmp_path / "draft.tsr").read_bytes().hex() == drawn.draw.token.response


# The public value


@OPENSSL
def test_the_value_of_a_token_is_its_signature_and_nothing_that_anybody_can_rewrite(tmp_path):
    """An owner who could rewrite the value's bytes could try any number of values without asking for one."""
    authority(tmp_path, second_certificate=True)
    with new_vault(tmp_path, weights(0)) as model:
        draft = drafts.draft(model, 10)
        response = stamp(tmp_path, timestamps.request(draft))
        listed = subprocess.run(
            ["openssl", "asn1parse", "-inform", "DER"], input=response, capture_output=True, check=True
        ).stdout.decode()
        last = [line for line in listed.splitlines() if "OCTET STRING" in line][-1]
        assert timestamps.signature(response).hex().upper() == last.rpartition(":")[2]
        status, token = (
            part.head + part.content for part in timestamps._parts(next(timestamps._parts(response)).content)
        )
        texts = [b"\x0c" + bytes([len(text)]) + text for text in (b"one", b"two")]
        rewritten = [element(0x30, element(0x30, b"\x02\x01\x00" + element(0x30, text)) + token) for text in texts]
        assert len({hashlib.sha256(one).digest() for one in (response, *rewritten)}) == 3
        draws = [drafts.by_token(model, one) for one in (response, *rewritten)]
        assert len({draw.value for draw in draws}) == 1
        assert status.hex() == "3003020100"  # what was replaced
        for bad in (b"", b"\x30\x80" + response[4:], response[:-1]):
            with pytest.raises(ValueError, match=r"expected a (granted RFC 3161 response|token in DER)"):
                drafts.by_token(model, bad)
        with pytest.raises(ValueError, match=r"(?s)a response about this draft, but got one about another.*smark draw"):
            drafts.by_token(model, stamp(tmp_path, timestamps.request(draft._replace(root="11" * 32))))


def element(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < 128 else bytes([0x82]) + size.to_bytes(2, "big")
    return bytes([tag]) + length + content


def test_a_beacon_s_value_is_read_as_it_is_written():
    draw = drafts.by_beacon(f" NIST beacon  round 2-7 : 0x{HEX.upper()} ")
    assert draw == documents.Draw(HEX, beacon=documents.Beacon("NIST beacon", "2-7"))
    assert draw.key.to_bytes() == hashlib.sha256(bytes.fromhex(HEX)).digest()
    for bad in ("", HEX, f"drand 123: {HEX}", "drand round 1: ab", f"drand round 1: {HEX}0", f"a\x1bb round 1: {HEX}"):
        with pytest.raises(ValueError, match="NAME round NUMBER: VALUE"):
            drafts.by_beacon(bad)


# What is refused


def test_a_draw_comes_after_its_draft_once_and_before_the_first_copy(tmp_path):
    with new_vault(tmp_path, weights(0)) as model:
        desk = model.vault
        draw = drafts.by_beacon(BEACON)
        with pytest.raises(ValueError, match="a draft that came before the value"):
            drafts.record(model, draw)
        customers.resolve(desk, [f"customer {number}" for number in range(9)])
        for bad in (8, drafts.MOST + 1):
            with pytest.raises(ValueError, match="where 9 customers are registered"):
                drafts.draft(model, bad)
        draft = drafts.draft(model, 10)
        assert drafts.draft(model) == drafts.draft(model, 10) == draft
        with pytest.raises(ValueError, match="A draft is made once"):
            drafts.draft(model, 11)
        ada, *rest = customers.resolve(desk, ["Ada", "Bob"])
        with pytest.raises(ValueError, match="a draft without value"):
            issuing.issue(model, [ada], tmp_path / "copies")
        drafts.record(model, draw)
        with pytest.raises(ValueError, match="whose were"):
            drafts.record(model, drafts.by_beacon(f"drand round 124: {'00' * 32}"))
        with pytest.raises(ValueError, match=r"serials below the draft's 10, but got 10"):
            issuing.issue(model, [ada, *rest], tmp_path / "copies")
        assert commitments.latest(desk, "net") is None
        issuing.issue(model, [ada], tmp_path / "copies")
        assert commitments.latest(desk, "net").header.draw == drafts.named(model)

        plain = models.add(desk, "plain", weights(1))
        assert drafts.drawn(plain) is None
        issuing.issue(plain, [ada, *rest], tmp_path / "others")
        assert commitments.latest(desk, "plain").header.draw is documents.MISSING
        for refused in (drafts.draft, lambda model: drafts.draft(model, 20)):
            with pytest.raises(ValueError, match="a model of which nobody has a copy"):
                refused(plain)


def test_words_that_are_drawn_while_copies_are_issued_stop_the_issue(tmp_path, monkeypatch):
    with new_vault(tmp_path, weights(0)) as model:
        (ada,) = customers.resolve(model.vault, ["Ada"])
        hashed = commitments.leaves

        def meanwhile(*args):
            found = hashed(*args)
            drafts.draft(model, 10)
            drafts.record(model, drafts.by_beacon(BEACON))
            return found

        monkeypatch.setattr(commitments, "leaves", meanwhile)
        with pytest.raises(ValueError, match="words drawn meanwhile"):
            issuing.issue(model, [ada], tmp_path / "copies")
        assert commitments.latest(model.vault, "net") is None


def test_another_code_key_than_the_draft_s_exports_nothing(tmp_path, monkeypatch):
    with new_vault(tmp_path, weights(0)) as model:
        drafts.draft(model, 10)
        monkeypatch.setattr(models, "code_key", lambda *args: keys.from_bytes(bytes(32)))
        with pytest.raises(ValueError, match="the draft's own words, but got others"):
            drafts.own_words(model, [1])


# The attack: a codeword in the direction in which everybody's weights decay


def pruned(leaves: dict[str, np.ndarray], share: float = 0.5) -> dict[str, np.ndarray]:
    return {name: np.where(abs(w) < np.quantile(abs(w), share), 0, w) for name, w in leaves.items()}


def decayed(leaves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a step of L1 decay does: every weight moves towards zero, by 0.3 standard deviations at most."""
    return {name: np.sign(w) * np.maximum(abs(w) - 0.3 * w.std(), 0).astype(w.dtype) for name, w in leaves.items()}


DECAYS = {"pruned": lambda leaves: pruned(leaves, 0.9), "decayed": decayed}


@pytest.fixture(scope="module")
def attack(tmp_path_factory):
    """The owner's own word for each decay, and the chips of innocents' copies after it."""
    base = weights(0)
    with new_vault(tmp_path_factory.mktemp("attack"), base) as model:
        mark = model.mark
        read = lambda leaves: reading.read(leaves, base, mark, reading.Reading()).chips  # noqa: E731
        words = codes.codebook(keys.from_bytes(bytes(32)), range(1, 4))
        copies = [{name: np.asarray(w) for name, w in embedding.embed(base, mark, word).items()} for word in words]
        chips = {(how, who): read(decay(copies[who])) for how, decay in DECAYS.items() for who in range(3)}
        chosen = {how: np.where(read(decay(base)) < 0, -1, 1) for how, decay in DECAYS.items()}
        return chosen, chips, reading.base_alone(base, mark)


def test_without_a_draw_a_chosen_word_convicts_innocents(attack):
    """The negative control: T of 7 and more for words that nobody's copy carries."""
    chosen, chips, alone = attack
    counts = evidence.Counts(1000, num_suspects=1, num_alignments=1)
    for (decay, who), found in chips.items():
        test = evidence.test(found, chosen[decay], [], counts)
        assert test.statistic >= 7, (decay, who)
        assert test.log10_p <= -6
        # what the suspect shares with the base does not account for it, so an arbiter convicts
        assert evidence.test(found, chosen[decay], [], counts, base=alone).log10_p <= -6


class Chosen:
    """An owner's code whose own word of serial 0 is chosen, and all else as it should be."""

    def __init__(self, word: np.ndarray) -> None:
        self.word = word

    def words(self, key, serials, num_chips, public=None):
        found = np.array(codes.codebook(key, serials, num_chips))
        found[np.asarray(serials) == 0] = self.word
        return found if public is None else found * np.asarray(codes.codebook(public, serials, num_chips))

    def book(self, key, num_customers, num_chips, public=None):
        return self.words(key, range(num_customers), num_chips, public)


@pytest.mark.parametrize("draws", [False, True])
def test_an_arbiter_convicts_whom_a_chosen_word_frames_only_without_a_draw(tmp_path, monkeypatch, draws):
    """Bob's copy leaks and decays; the owner gave Victor, who has leaked nothing, the word of decay."""
    base = weights(0)
    with new_vault(tmp_path, base) as model, monkeypatch.context() as patch:
        chips = reading.read(decayed(base), base, model.mark, reading.Reading()).chips
        patch.setattr(models.OpenModel, "code", Chosen(np.where(chips < 0, -1, 1)))
        if draws:
            drafts.draft(model, 16)
            drafts.record(model, drafts.by_beacon(BEACON))
        issued = issuing.issue(model, customers.resolve(model.vault, ["Victor", "Bob"]), tmp_path / "copies")
        files.write(tmp_path / "base", base)
        files.write(tmp_path / "suspect", decayed(dict(files.read(issued.files[1]).leaves)))
        verdicts.trace(model, [tmp_path / "suspect"])
        exported = evidence.export(model.vault, 1)
        assert exported.shape is not None
        shapes.write(tmp_path, exported.shape)
        (tmp_path / "bundle").write_bytes(exported.content)
        root = issued.commitment.root
    report = verification.verify(tmp_path / "bundle", tmp_path / "suspect", tmp_path / "base", root=root)
    assert report.holds, report.checks
    assert {accused.customer for accused in report.accused} == ({"Bob"} if draws else {"Bob", "Victor"})


def public_word(value: bytes, serial: int = 0, num_chips: int = 304) -> np.ndarray:
    packed = np.frombuffer(stream_bytes(hashlib.sha256(value).digest(), serial), np.uint8)
    return 1 - 2 * np.unpackbits(packed, bitorder="little")[:num_chips].astype(np.int8)


def stream_bytes(key: bytes, serial: int) -> bytes:
    nonce = serial.to_bytes(4, "little") + bytes(8) + bytes([0, 0, 0, 128])
    return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor().update(bytes(64))


def test_with_a_draw_the_same_owner_s_word_reads_as_noise(attack):
    """Over 4,000 values: mean 0 within 3 standard errors, variance 1, and the largest |T| below the bound for 4,000."""
    chosen, chips, _ = attack
    number = 4000
    drawn = np.array([public_word(f"value {i}".encode()) for i in range(number)])
    for (decay, who), found in chips.items():
        ts = (drawn * chosen[decay]) @ statistics.direction(found)
        assert abs(ts.mean()) <= 3 / math.sqrt(number), (decay, who)
        assert abs(ts.var() - 1) <= 3 * math.sqrt(2 / number)
        bound = statistics.threshold(found, math.log(1e-3) - math.log(number))
        assert abs(ts).max() < bound < 7
        assert statistics.log_p_value(float(abs(ts).max()), found) > math.log(1e-6)


def test_an_owner_who_tries_q_values_gains_a_factor_of_q_at_most(attack):
    """At alpha = 0.1, with q = 1000: p times q holds it; without the factor, trying values beats it."""
    chosen, chips, _ = attack
    q, trials, alpha, found = 1000, 60, 0.1, chips["pruned", 0]
    direction, paid, unpaid = statistics.direction(found) * chosen["pruned"], 0, 0
    for trial in range(trials):
        best = max(abs(np.array([public_word(f"{trial} {i}".encode()) for i in range(q)]) @ direction))
        log_p = float(statistics.log_p_value(float(best), found))
        paid += log_p + math.log(q) <= math.log(alpha)
        unpaid += log_p <= math.log(alpha)
    assert paid <= alpha * trials + 3 * math.sqrt(trials * alpha * (1 - alpha))
    assert unpaid > 0.9 * trials  # negative control


def test_an_owner_who_gives_out_serials_when_v_is_known_is_held_to_alpha(key):
    """One customer, 4,096 words to choose from: counting the customers alone fails, counting serials holds."""
    alpha, trials, num_chips, capacity = 0.1, 200, 96, 4096
    rng, naive, paid = np.random.default_rng(0), 0, 0
    header = documents.DraftHeader(0.1, "", capacity, "", "", "", "", num_chips, "", "", 1.0, documents.Versions())
    made = documents.Drawn(documents.Draft("", 1, header, (), ""), documents.Draw(HEX))
    counts = evidence.Counts(1, num_suspects=1, num_alignments=1)
    for trial in range(trials):
        public = keys.from_bytes(hashlib.sha256(f"{trial}".encode()).digest())
        book = np.asarray(codes.codebook(key, range(capacity), num_chips, public=public))
        y = rng.normal(size=num_chips)
        ts = abs(book @ statistics.direction(y))
        found = [(serial, evidence.counted(counts, (serial,), made)) for serial in _best(ts)]
        paid += min(evidence.test(y, book[s], [], c).log10_p for s, c in found) <= math.log10(alpha)
        naive += evidence.test(y, book[ts.argmax()], [], counts).log10_p <= math.log10(alpha)
    assert paid <= alpha * trials
    assert naive > 0.9 * trials  # negative control


def _best(ts: np.ndarray) -> list[int]:
    """Of each range of serials the one with the largest statistic; the best of the paid tests is among them."""
    return sorted({int(ts[: 1 << k].argmax()) for k in range(len(ts).bit_length())})


def test_ranges_of_serials_pay_for_all_tests_that_they_hold():
    """Summed over all serials and ranges, one over what a test pays is at most 1."""
    for capacity in (1, 2, 5, 64, 100):
        scales = (capacity - 1).bit_length() + 1
        total = sum(2.0**-k * min(capacity, 1 << k) for k in range(scales)) / scales
        assert total <= 1
        for serial in range(capacity):
            customers, log_ranges = drafts.choices([serial, 0], capacity)
            assert serial < customers <= max(1, 2 * serial)
            assert customers in {1 << k for k in range(scales)}
            assert log_ranges == pytest.approx(math.log(scales))
    counts = evidence.Counts(5, 1, 1)
    assert evidence.counted(counts, [3], None) == counts
    assert evidence.test(np.ones(64), np.ones(64), [], counts._replace(log_ranges=math.log(10))).log10_p == (
        pytest.approx(evidence.test(np.ones(64), np.ones(64), [], counts).log10_p + 1)
    )


# The desk


@OPENSSL
def test_the_desk_from_draft_to_evidence_as_commands(tmp_path):
    authority(tmp_path)
    np.savez(tmp_path / "base.npz", **weights(0))
    smark = lambda *arguments: terminal.run(*arguments, folder=tmp_path)  # noqa: E731
    assert smark("init", "vault").code == 0
    assert smark("add-model", "vault", "net", "base.npz").code == 0
    said = smark("draw", "vault", "net")
    assert (said.code, "are not drawn" in said.out) == (0, True)
    assert smark("draw", "vault", "net", "--token", "base.npz").code == 1
    request = ("--out", "draft.json", "--timestamp-request", "draft.tsq", "--capacity", 64)
    for _ in range(2):  # the same files again
        written = smark("draw", "vault", "net", *request, "--json")
        assert written.code == 0, written.err
        assert json.loads(written.out)["capacity"] == 64
    assert (
        bundles.read_json(tmp_path / "draft.json", documents.Draft, "a draft").root == json.loads(written.out)["root"]
    )
    (tmp_path / "draft.tsr").write_bytes(stamp(tmp_path, (tmp_path / "draft.tsq").read_bytes()))
    verified = ["openssl", "ts", "-verify", "-in", "draft.tsr", "-data", "draft.json", "-CAfile", "tsa.pem"]
    subprocess.run(verified, cwd=tmp_path, check=True, capture_output=True)
    refused = smark("issue", "vault", "net", "Ada", "--out", "copies")
    assert refused.code == 1
    assert "a draft without value" in refused.err
    drawn = smark("draw", "vault", "net", "--token", "draft.tsr")
    assert drawn.code == 0, drawn.err
    assert "are drawn: time stamp of" in drawn.out
    assert smark("issue", "vault", "net", "Ada", "Bob", "Carol", "--out", "copies").code == 0
    again = smark("draw", "vault", "net", "--beacon", BEACON)
    assert again.code == 1
    assert "drawn once" in again.err
    leaked = files.read(tmp_path / "copies" / "000001-Bob.npz").leaves
    np.savez(tmp_path / "leaked.npz", **pruned(dict(leaked)))
    traced = smark("trace", "vault", "net", "leaked.npz", "--json")
    assert [a["customer"] for a in json.loads(traced.out)["suspects"][0]["accused"]] == ["Bob"]
    assert smark("evidence", "export", "vault", 1, "--out", "evidence.json").code == 0
    published = tmp_path / "vault" / "commitments" / "net-1.json"
    assert json.loads(published.read_text())["header"]["draw"]["root"] == json.loads(written.out)["root"]
    found = smark("evidence", "verify", "evidence.json", "leaked.npz", "base.npz", "--commitment", published, "--json")
    document = json.loads(found.out)
    assert document["holds"], document["checks"]
    assert {"draft", "public value", "drawn words"} <= {check["name"] for check in document["checks"]}


def test_odd_options_are_refused_before_anything_is_made(tmp_path):
    smark = lambda *arguments: terminal.run(*arguments, folder=tmp_path)  # noqa: E731
    smark("init", "vault")
    np.savez(tmp_path / "base.npz", **weights(0))
    smark("add-model", "vault", "net", "base.npz")
    for odd in (
        ("--out", "a.json", "--beacon", BEACON),
        ("--capacity", 5),
        ("--timestamp-request", "a.tsq"),
        ("--out", "vault/a.json"),
        ("--out", "a.json", "--timestamp-request", "a.json"),
        ("--out", "a.json", "--capacity", 0),
    ):
        assert smark("draw", "vault", "net", *odd).code == 2, odd
    assert smark("draw", "vault", "net", "--beacon", "drand").code == 1
    assert smark("draw", "vault", "other").code == 1
    assert json.loads(smark("draw", "vault", "net", "--json").out) == {
        "model": "net", "drawn": False, "root": None, "capacity": None, "source": None, "draft": None,
        "timestamp_request": None,
    }  # fmt: skip
    shown = smark("draw", "--help")
    assert "--token draft.tsr" in shown.out


def test_old_bundles_open_no_own_word_and_say_what_is_taken_on_trust():
    """A bundle without a draw is written and read as before."""
    assert "own" not in documents.plain(documents.Opened(documents.Leaf("Ada", "00" * 32, 0, ""), 1, ()))
    assert documents.Header._field_defaults["draw"] is documents.MISSING
    assert ranges.LARGEST_ALPHA == 1e-3
