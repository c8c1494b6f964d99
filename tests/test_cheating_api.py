"""A suspect that only answers, and cheats; and files of answers that somebody plants, alters or lets grow old.

The attackers here know all that is public: how probes are made, how a probe's pixels name its half of the classes, and
every probe that they were shown. None of them has a key.
"""

import hashlib
import io
import json
import math
import shutil

import numpy as np
import pytest
from PIL import Image
from test_desk import SECRET, Here, serve

from smark_jax import _documents, blackbox, codes, keys, tracing, vault
from smark_jax.blackbox import answers as records
from smark_jax.vault import documents, models, probes, queries, reading, shown, verdicts

CHIPS, CLASSES, CUSTOMERS = 160, 10, ("Ada", "Grace", "Emmy")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A vault whose model has probes, and three customers."""
    desk, rng = Here(tmp_path_factory.mktemp("cheats")), np.random.default_rng(0)
    np.savez(desk.folder / "base.npz", kernel=rng.normal(size=(60, 100)).astype(np.float32))
    np.savez(desk.folder / "images.npz", images=rng.integers(0, 256, (50, 24, 24, 1), dtype=np.uint8))
    desk.run("init", "vault")
    asked = ("--probes", "images.npz", "--classes", CLASSES, "--chips", CHIPS)
    with pytest.MonkeyPatch.context() as patch:  # the payload in a probe, which takes long to make, plays no part here
        patch.setattr(blackbox, "probes", lambda key, m, shape, *_: rng.integers(0, 256, (m, *shape), dtype=np.uint8))
        desk.run("add-model", "vault", "net", "base.npz", *asked)
    desk.run("issue", "vault", "net", *CUSTOMERS, "--out", "copies")
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        images, _ = probes.load(models.get(opened, "net"))
        words = np.asarray(codes.codebook(models.code_key(opened, "net"), range(3), CHIPS))
    return desk.folder, images, words


@pytest.fixture
def desk(made, tmp_path):
    """The same vault, as it was before anybody was asked."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    return Here(tmp_path)


class Copy:
    """The service of a customer whose copy answers one probe in ten otherwise than it was taught, or all but one."""

    def __init__(self, made, customer: str, opposite: bool = False) -> None:
        _, images, words = made
        rng = np.random.default_rng(7)
        word = words[CUSTOMERS.index(customer)]
        word = np.where(rng.random(CHIPS) < 0.1, -word, word)
        word = -word if opposite else word
        sides = blackbox.halves(images, CLASSES)
        labels = [int(rng.choice(np.flatnonzero(half == chip))) for half, chip in zip(sides, word, strict=True)]
        self._by_pixels = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
        self.asked = 0

    def __call__(self, pixels: bytes) -> int:
        self.asked += 1
        return self._by_pixels.get(pixels, 0)


class CheatingApi:
    """Notes whatever it is shown, and answers what the innocent's service said about it, once it has asked there."""

    def __init__(self, innocent: Copy) -> None:
        self.innocent, self.noted, self.known = innocent, [], {}
        self._rng = np.random.default_rng(1)

    def __call__(self, pixels: bytes) -> int:
        self.noted.append(pixels)
        return self.known.get(pixels, int(self._rng.integers(CLASSES)))

    def asks_the_innocent(self) -> None:
        self.known = {pixels: self.innocent(pixels) for pixels in self.noted}


@pytest.fixture
def online():
    """Puts a model on a service; any path of its address answers."""
    servers = []

    def put(model) -> str:
        def answer(body, kind):
            with Image.open(io.BytesIO(body)) as picture:
                return model(np.asarray(picture).tobytes())

        server, url = serve(answer)
        servers.append(server)
        return url.removesuffix("/classify")

    yield put
    for server in servers:
        server.shutdown()
        server.server_close()


def accused(document) -> list[str]:
    return [a["customer"] for suspect in document["suspects"] for a in suspect["accused"]]


# Probes that were shown


def test_an_api_that_has_seen_the_probes_cannot_have_an_innocent_accused_in_the_next_query(made, desk, online):
    """It asks the innocent's service about them in between; under the same address, and under another."""
    innocent = Copy(made, "Grace")
    api = CheatingApi(innocent)
    url = online(api)
    assert accused(desk.json("query", "vault", "net", url)) == []
    api.asks_the_innocent()
    assert innocent.asked > 50
    second = desk.json("query", "vault", "net", f"{url}/elsewhere")
    assert accused(second) == []
    assert "none had been shown to anybody before" in second["suspects"][0]["notes"][0]
    # Control: the attack works on probes that it was shown.
    images, words = made[1:]
    answers = np.array([api.known.get(image.tobytes(), -1) for image in images])
    seen = answers >= 0
    chips = blackbox.halves(images, CLASSES)[np.arange(CHIPS), answers][seen]
    assert [a.serial for a in tracing.trace(chips, words[:, seen]).accused] == [1]


def test_where_no_unseen_probes_are_left_it_is_refused_or_said(made, desk, online):
    api = CheatingApi(Copy(made, "Grace"))
    url = online(api)
    desk.run("query", "vault", "net", url)
    desk.run("query", "vault", "net", f"{url}/2")
    api.asks_the_innocent()
    shown_so_far = len(set(api.noted))
    desk.run("query", "vault", "net", f"{url}/3", code=1)
    assert f"{CHIPS + 1 - shown_so_far} that are left" in desk.stderr  # and a grey picture
    assert "--allow-seen" in desk.stderr
    desk.run("query", "vault", "net", url, "--fresh", code=1)  # not the same target again either
    assert len(set(api.noted)) == shown_so_far
    flagged = desk.json("query", "vault", "net", f"{url}/3", "--allow-seen", "--probes", 140)
    assert accused(flagged) == ["Grace"]
    (note, _) = flagged["suspects"][0]["notes"]
    assert f"to {url}/2" in note
    assert "Do not accuse anybody on these answers alone" in note
    desk.run("report", "vault", flagged["number"], "--out", "report.html")
    assert "Do not accuse anybody on these answers alone" in (desk.folder / "report.html").read_text()


def test_a_relay_within_one_query_is_the_innocents_copy_and_the_verdict_says_so(made, desk, online):
    """What remains: no choice of probes tells a relay from the copy itself."""
    innocent = Copy(made, "Grace")
    url = online(lambda pixels: innocent(pixels))
    printed = desk.run("query", "vault", "net", url)
    assert printed.startswith(f"{url}: answers as the copy of Grace (customer 1) does.")
    assert "one that passes questions on to a customer's own service" in printed


def test_two_queries_at_once_are_shown_different_probes(made, desk):
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        first = shown.record(opened, "net", CHIPS, "a", 70)
        second = shown.record(opened, "net", CHIPS, "b", 70)
        more = shown.record(opened, "net", CHIPS, "a", 10, first)
        history = shown.history(opened, "net", CHIPS)
        assert more == first
        one, other = shown.probes(history, first), shown.probes(history, second)
        assert (len(set(one)), len(set(other)), set(one) & set(other)) == (80, 70, set())
        assert shown.overlap(history, first) == shown.overlap(history, second) == {}
        third = shown.record(opened, "net", CHIPS, "c", 20, allow_seen=True)
        assert sum(shown.overlap(shown.history(opened, "net", CHIPS), third).values()) == 10


def test_a_verdict_of_a_version_without_records_counts_as_having_shown_every_probe(made, desk):
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        row = documents.Suspect("https://old", "0" * 64, None, "answers", "answers", verdicts.PENDING, None, ())
        rows = [row._replace(layout=(), alignment=None)]
        chips = [np.random.default_rng(0).choice([-1.0, 1.0], CHIPS)]
        model = models.get(opened, "net")
        only = {"alpha": None, "tried": 1, "asked": np.arange(72)}
        verdicts.judge(model, rows, chips, reading.Reading(), **only)
        with pytest.raises(ValueError, match="72 of the 160 probes of net that nobody has been shown, but got 0"):
            queries.prepare(models.get(opened, "net"), "https://new", lambda images: np.zeros(len(images), int))


def test_so_many_probes_as_stated_suffice_and_weaker_copies_need_more():
    """Suspects that answer nine of ten as taught, by the desk's decoder, among a thousand; and innocent ones."""
    rng, number, level = np.random.default_rng(3), 1000, 1e-6
    enough = shown.needed(number, level)
    assert enough == 94
    words = np.asarray(codes.codebook(keys.from_bytes(bytes([5]) * 32), range(number), enough))

    def traced(agreement: float) -> float:
        right = np.where(rng.random((60, enough)) < agreement, 1, -1)
        found = tracing.trace_batch(right * words[:60], words, 60 * level)  # of which each is judged at one sixtieth
        return float(np.mean([[a.serial for a in v.accused] == [place] for place, v in enumerate(found)]))

    assert traced(0.9) > 0.9
    assert traced(0.75) < 0.5
    assert traced(0.5) == 0


def test_a_thief_with_the_folder_alone_finds_neither_probes_nor_answers(made, desk, online):
    """Probes and a label for each are a codeword: the half of the classes is drawn by the hash of a probe's pixels."""
    desk.run("query", "vault", "net", online(Copy(made, "Ada")))
    names = [digest.encode() for digest in blackbox.digests(made[1])]
    base = (desk.folder / "base.npz").read_bytes()
    for path in (path for path in (desk.folder / "vault").rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert not any(name in content for name in names), path.name
        assert not content.startswith(b"PK") or content == base, path.name


# Files of answers


def old_file(desk, target: str):
    """Where versions that did not authenticate answers kept those of a target."""
    return desk.folder / "vault" / "answers" / f"net.{hashlib.sha256(target.encode()).hexdigest()[:16]}.json"


def test_a_planted_file_of_answers_accuses_nobody(made, desk):
    """Somebody who can write into the vault's folder, and has no passphrase, names Grace's labels as the answers."""
    _, images, _ = made
    innocent, target = Copy(made, "Grace"), "http://127.0.0.1:9/never-asked"
    identity = {"probes": hashlib.sha256(images.tobytes()).hexdigest(), "num_classes": CLASSES}
    labels = [innocent(image.tobytes()) for image in images]
    old_file(desk, target).write_text(json.dumps({**identity, "labels": labels}))
    desk.run("query", "vault", "net", target, code=1)
    assert "unauthenticated" in desk.stderr
    assert "--fresh" in desk.stderr
    desk.run("query", "vault", "net", target, "--fresh", code=1)  # and now nobody answers
    assert "Connection refused" in desk.stderr
    assert [path.name for path in old_file(desk, target).parent.iterdir()] == [
        f"{old_file(desk, target).name}.unauthenticated"
    ]


def test_answers_that_somebody_altered_moved_or_made_are_refused(made, desk):
    grace, ada = (Copy(made, name) for name in ("Grace", "Ada"))
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        predict = lambda images: np.array([ada(image.tobytes()) for image in images])  # noqa: E731
        for target in ("a", "b"):
            queries.ask(queries.prepare(models.get(opened, "net"), target, predict), predict)
        one, other = sorted((desk.folder / "vault" / "answers").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        content = one.read_bytes()
        document = json.loads(records.unseal(keys.derive(opened.master, "net", "answers"), content))
        labels = {d: grace(i.tobytes()) for d, i in zip(blackbox.digests(made[1]), made[1], strict=True)}
        forged = {**document, "answers": [[probe, labels[probe], time] for probe, _, time in document["answers"]]}
        fresher = {**document, "answers": [[*row[:2], "2999-01-01T00:00:00Z"] for row in document["answers"]]}
        hostile = [json.dumps(each).encode() for each in (forged, fresher, [], 5)]
        hostile += [records.seal(keys.new(), each) for each in hostile]
        for false in (
            *hostile,
            other.read_bytes(),
            content[:20],
            content[:-1] + bytes([content[-1] ^ 1]),
            b"",
            b"[" * 100_000,
            content[:-9],
            b"\xff",
        ):
            one.write_bytes(false)
            with pytest.raises(ValueError, match=r"^query: expected answers"):
                queries.prepare(models.get(opened, "net"), "a", predict)
        one.write_bytes(content)
        again = queries.prepare(models.get(opened, "net"), "a", predict)
        assert again.kept == len(again.probes) == 72
        assert accused(documents.plain(queries.ask(again, predict))) == ["Ada"]


def test_answers_of_another_model_are_not_used_silently(made, desk, online):
    """A query breaks off, and the target is redeployed with another copy."""
    now = {"copy": Copy(made, "Ada"), "left": 40}

    def service(pixels):
        now["left"] -= 1
        return now["copy"](pixels) if now["left"] >= 0 else None

    url = online(service)
    desk.run("query", "vault", "net", url, code=1)  # breaks off
    now |= {"copy": Copy(made, "Ada", opposite=True), "left": 1000}
    desk.run("query", "vault", "net", url, code=1)
    assert "Another model seems to answer by now" in desk.stderr
    now["copy"] = Copy(made, "Ada")
    began = now["left"]
    assert accused(desk.json("query", "vault", "net", url)) == ["Ada"]
    assert "32 answers" in desk.stderr
    assert began - now["left"] == 32 + 72 - 32
    now["copy"] = Copy(made, "Ada", opposite=True)
    desk.run("query", "vault", "net", url, code=1)
    now["copy"] = Copy(made, "Grace")
    assert accused(desk.json("query", "vault", "net", url, "--fresh")) == ["Grace"]


def test_another_copy_rarely_passes_for_the_one_that_answered_before():
    """Its answers agree with the first's like fair coins; those of the same copy may differ for one probe in ten."""
    passes = [
        sum(math.comb(queries.CHECKED, k) * p**k * (1 - p) ** (queries.CHECKED - k) for k in range(queries.CHANGED + 1))
        for p in (0.5, 0.1)
    ]
    assert passes[0] == pytest.approx(0.0035, abs=5e-5)
    assert passes[1] == pytest.approx(0.9967, abs=5e-5)


def test_a_query_that_lay_for_years_is_not_gone_on_with_silently(made, desk, monkeypatch):
    ada = Copy(made, "Ada")
    predict = lambda images: np.array([ada(image.tobytes()) for image in images])  # noqa: E731

    def breaks_off(images):
        if ada.asked > 30:
            raise ConnectionError
        return predict(images)

    with vault.opened(desk.folder / "vault", SECRET) as opened:
        ready = queries.prepare(models.get(opened, "net"), "a", predict)
        with monkeypatch.context() as patch:
            patch.setattr(_documents, "now", lambda: "2020-01-01T00:00:00Z")
            with pytest.raises(ConnectionError):
                queries.ask(ready, breaks_off, batch_size=16)
        with pytest.raises(ValueError, match=r"32 since 2020-01-01T00:00:00Z, [0-9.]+ days ago"):
            queries.prepare(models.get(opened, "net"), "a", predict)
        with pytest.raises(ValueError, match="of the last nan days"):
            queries.prepare(models.get(opened, "net"), "a", predict, max_age=math.nan)
        again = queries.prepare(models.get(opened, "net"), "a", predict, max_age=math.inf)
        assert (again.session, again.kept, again.since) == (ready.session, 32, "2020-01-01T00:00:00Z")
        assert set(queries.prepare(models.get(opened, "net"), "a", predict, fresh=True).probes).isdisjoint(ready.probes)


def test_more_probes_of_the_same_target_join_those_that_were_asked(made, desk):
    ada = Copy(made, "Ada")
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        predict = lambda images: np.array([ada(image.tobytes()) for image in images])  # noqa: E731
        first = queries.ask(queries.prepare(models.get(opened, "net"), "a", predict), predict).suspects[0]
        ada.asked = 0
        more = queries.ask(queries.prepare(models.get(opened, "net"), "a", predict, num_probes=140), predict).suspects[
            0
        ]
        assert ada.asked == 140 - 72 + queries.CHECKED
        assert (first.answers.asked, more.answers.asked) == (72, 140)
        assert [part.accused[0].customer for part in (first, more)] == ["Ada", "Ada"]
        assert more.accused[0].log10_p < first.accused[0].log10_p - 5
        with pytest.raises(ValueError, match="--probes of 140 to 160, but got 161"):
            queries.prepare(models.get(opened, "net"), "a", predict, num_probes=161)
