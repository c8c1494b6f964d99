"""Evidence: an arbiter without the vault computes it again, and whatever was changed is noticed."""

import contextlib
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats
from stress.fuzz import accusations, mutations
from stress.fuzz import evidence as fuzz
from time_stamps import authority, stamp

from smark_jax import carriers, codes, embedding, errors, files, keys, statistics, vault
from smark_jax.vault import (
    bundles,
    commitments,
    crypto,
    customers,
    documents,
    evidence,
    issuing,
    models,
    ranges,
    timestamps,
    verdicts,
    verification,
)

SECRET = "correct horse battery staple"


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"kernel": rng.normal(size=(100, 200)).astype(np.float32), "bias": rng.normal(size=200).astype(np.float32)}


class Case(NamedTuple):
    """What an arbiter gets, and the vault it came from."""

    folder: Path
    bundle: Path
    suspect: Path
    base: Path
    root: str

    def verify(self, **changed):
        paths = {name: changed.pop(name, getattr(self, name)) for name in ("bundle", "suspect", "base")}
        return verification.verify(**paths, **{"root": self.root, **changed})


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Six customers; Ada's copy was pruned a little and rounded to bfloat16; three others mixed theirs."""
    folder = tmp_path_factory.mktemp("evidence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crypto, "_N", 2**10)
        vault.create(folder / "vault", SECRET)
        with vault.opened(folder / "vault", SECRET) as desk:
            base = weights(0)
            models.add(desk, "net", base)
            names = ["Grace", "Ada", "Emmy", "王小明", "Linus", "Mary"]
            issued = issuing.issue(models.get(desk, "net"), customers.resolve(desk, names), folder / "copies")
            leaked = files.read(issued.files[1]).leaves
            files.write(folder / "base", base)
            files.write(folder / "suspect", {name: np.where(abs(w) < 0.1, 0, w) for name, w in leaked.items()})
            mixed = [files.read(path).leaves for path in issued.files[2:5]]
            noise = np.random.default_rng(1)
            files.write(
                folder / "mixed",
                {
                    name: np.mean([m[name] for m in mixed], axis=0)
                    + noise.normal(scale=0.003, size=w.shape).astype(np.float32)
                    for name, w in base.items()
                },
            )
            verdicts.trace(models.get(desk, "net"), [folder / "suspect"])
            (folder / "bundle").write_bytes(evidence.export(desk, 1).content)
            root = commitments.latest(desk, "net").root
    return Case(folder, folder / "bundle", folder / "suspect", folder / "base", root)


def failing(report) -> set[str]:
    return {check.name for check in report.checks if not check.holds}


@contextlib.contextmanager
def opened(case, tmp_path):
    shutil.copytree(case.folder / "vault", tmp_path / "vault")
    with vault.opened(tmp_path / "vault", SECRET) as desk:
        yield desk


def test_genuine_evidence_holds_and_opens_nobody_else(case):
    report = case.verify()
    assert report.holds
    assert report.compared
    assert [a.customer for a in report.accused] == ["Ada"]
    assert report.accused[0].log10_p < -20
    assert not case.verify(root=None).compared
    content = json.loads(case.bundle.read_text())["bundle"]
    assert [opened["leaf"]["customer"] for opened in content["opened"]] == ["Ada"]
    for name in ("Grace", "Emmy", "Linus", "Mary"):
        assert name not in case.bundle.read_text()


def test_the_statistic_is_what_plain_numpy_makes_of_suspect_base_and_opened_key(case):
    content = json.loads(case.bundle.read_text())["bundle"]
    spec = documents.spec(documents.parse(documents.Bundle, content).spec)
    mark = carriers.Mark(spec, carriers.draw(keys.from_bytes(bytes.fromhex(content["carrier_key"])), spec, 304))
    rows = np.stack([np.asarray(carriers.spread(row, mark)) for row in np.eye(304, dtype=np.float32)])  # X, dense
    base, suspect = files.read(case.base).leaves, files.read(case.suspect).leaves
    shift = np.concatenate(
        [(np.float64(suspect[path]) - base[path]).ravel() / scale for path, _, scale in content["spec"]]
    )
    y = rows.astype(np.float64) @ shift
    (opened,) = content["opened"]
    bits = [int(digit) for byte in bytes.fromhex(opened["leaf"]["word"]) for digit in f"{byte:08b}"][:304]
    signs = 1 - 2 * np.array(bits)
    assert case.verify().accused[0].statistic == pytest.approx(y @ signs / np.linalg.norm(y), abs=1e-3)


# What is changed is noticed. An owner who cheats signs what was changed, so both are tried.


def forge(case, tmp_path, change, resign=True) -> Path:
    content = json.loads(case.bundle.read_text())
    change(content["bundle"])
    path = tmp_path / "forged"
    if resign:
        master = crypto.unseal(case.folder / "vault" / "master.key", SECRET)
        path.write_bytes(bundles.signed(content["bundle"], master))
    else:
        path.write_text(json.dumps(content))
    return path


def other_leaf(bundle):
    bundle["opened"][0]["leaf"] = {**bundle["opened"][0]["leaf"], "customer": "Grace"}


def other_word(bundle):
    word = bundle["opened"][0]["leaf"]["word"]
    bundle["opened"][0]["leaf"] = {**bundle["opened"][0]["leaf"], "word": f"{int(word[:2], 16) ^ 1:02x}{word[2:]}"}


FORGERIES = {
    "another name in the leaf": (other_leaf, "customers"),
    "another codeword": (other_word, "customers"),
    "another place": (lambda b: b["opened"][0].update(index=1), "customers"),
    "nobody accused": (lambda b: b.update(accused=[]), "customers"),
    "a word that was not opened": (lambda b: b["accused"][0].update(support=[5]), "customers"),
    "its own word as support": (lambda b: b["accused"][0].update(support=[1]), "customers"),
    "a forged carrier": (lambda b: b.update(carrier_key="11" * 32), "carrier"),
    "other leaves": (lambda b: b.update(spec=b["spec"][:1]), "carrying leaves"),
    "another scale": (lambda b: b["spec"][0].__setitem__(2, 2 * b["spec"][0][2]), "carrying leaves"),
    "fewer customers": (lambda b: b["commitment"]["header"].update(customers=1), "commitment"),
    "another alpha": (lambda b: b["commitment"]["header"].update(alpha=0.5), "commitment"),
    "another root": (lambda b: b["commitment"].update(root="11" * 32), "published root"),
    "another statistic": (lambda b: b["accused"][0].update(statistic=17.0), "accusation of 'Ada'"),
    "many readings": (lambda b: b.update(num_alignments=2**62), None),
    "another reading": (lambda b: b["suspect"]["reading"].update(rectify=True), None),
    "an alignment": (lambda b: b["suspect"]["reading"].update(align="a:b"), "read-out"),
    "another suspect's hash": (lambda b: b["suspect"].update(content="11" * 32), "suspect"),
    "a foreign time stamp": (lambda b: b["timestamps"].append({"time": "2020", "response": "00"}), "time stamp"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_changed_bundle_is_noticed_with_its_signature_and_with_a_new_one(case, tmp_path, what):
    change, expected = FORGERIES[what]
    assert "signature" in failing(case.verify(bundle=forge(case, tmp_path, change, resign=False)))
    found = failing(case.verify(bundle=forge(case, tmp_path, change)))
    assert expected is None or expected in found
    assert "signature" not in found


def test_a_thief_s_signature_is_noticed(case, tmp_path):
    content = json.loads(case.bundle.read_text())["bundle"]
    (tmp_path / "forged").write_bytes(bundles.signed(content, keys.new()))
    assert failing(case.verify(bundle=tmp_path / "forged")) == {"signature"}
    content["commitment"]["header"]["public_key"] = crypto.public_key(thief := keys.new())
    (tmp_path / "forged").write_bytes(bundles.signed(content, thief))
    assert "commitment" in failing(case.verify(bundle=tmp_path / "forged"))


def test_swapped_models_are_noticed(case, tmp_path):
    files.write(tmp_path / "other", weights(1))
    assert {"base", "carrying leaves"} & failing(case.verify(base=tmp_path / "other"))
    assert "suspect" in failing(case.verify(suspect=tmp_path / "other"))
    assert "suspect" in failing(case.verify(suspect=case.folder / "mixed"))
    np.savez(tmp_path / "same.npz", **files.read(case.suspect).leaves)
    assert case.verify(suspect=tmp_path / "same.npz").holds  # the same weights in another format are the same model


def test_a_seed_that_was_ground_after_publication_is_noticed(case, tmp_path, monkeypatch):
    """The owner draws new keys until they accuse somebody, and makes everything else anew: only the root tells."""
    monkeypatch.setattr(crypto, "_N", 2**10)
    vault.create(tmp_path / "ground", SECRET)
    with vault.opened(tmp_path / "ground", SECRET) as desk:
        models.add(desk, "net", files.read(case.base).leaves)
        names = ["Grace", "Ada", "Emmy"]
        issued = issuing.issue(models.get(desk, "net"), customers.resolve(desk, names), tmp_path / "copies")
        verdicts.trace(models.get(desk, "net"), [issued.files[0]])
        (tmp_path / "bundle").write_bytes(evidence.export(desk, 1).content)
    report = case.verify(bundle=tmp_path / "bundle", suspect=issued.files[0])
    assert failing(report) == {"published root"}


def test_a_root_is_taken_from_the_published_file_or_as_it_is(case, tmp_path):
    published = case.folder / "vault" / "commitments" / "net-1.json"
    assert verification.published_root(str(published)) == case.root
    assert verification.published_root(case.root.upper()) == case.root
    (tmp_path / "bad.json").write_text("{}")
    for bad in (str(tmp_path / "bad.json"), "absent", case.root[:-1]):
        with pytest.raises(ValueError, match="evidence: expected a commitment"):
            verification.published_root(bad)


# Coalitions


def test_each_of_a_coalition_is_proved_by_the_accused_s_words_alone(case, tmp_path):
    with opened(case, tmp_path) as desk:
        document = verdicts.trace(models.get(desk, "net"), [case.folder / "mixed", case.suspect])
        assert len(document.suspects[0].accused) == 3
        with pytest.raises(ValueError, match=r"(?s)2 of them.*--suspect: 1 \(.*2 \("):
            evidence.export(desk, 2)
        with pytest.raises(ValueError, match="number 3"):
            evidence.export(desk, 2, 3)
        exported = evidence.export(desk, 2, 1)
        assert set(exported.accused) == {"Emmy", "王小明", "Linus"}
        assert exported.left_out == ()
        assert len(evidence.exports(desk, "net")) == 2
    (tmp_path / "bundle").write_bytes(exported.content)
    report = case.verify(bundle=tmp_path / "bundle", suspect=case.folder / "mixed")
    assert report.holds
    assert {a.customer for a in report.accused} == set(exported.accused)
    names = {o["leaf"]["customer"] for o in json.loads(exported.content)["bundle"]["opened"]}
    assert names == set(exported.accused)


def test_the_bound_of_a_test_is_as_documented(key):
    rng = np.random.default_rng(0)
    words = rng.choice([-1.0, 1.0], (4, 200))
    y = words.sum(axis=0) + rng.normal(size=200)
    found = evidence.test(y, words[0], list(words[1:]), evidence.Counts(1000, num_suspects=3, num_alignments=2))
    coefficients = np.linalg.solve(words[1:] @ words[1:].T, words[1:] @ y)
    residual = y - coefficients @ words[1:]
    statistic = residual @ words[0] / np.linalg.norm(residual)
    assert found.statistic == pytest.approx(statistic)
    choices = 1000 * math.comb(999, 3) * 2**4 * 3 * 2
    expected = float(statistics.log_p_value(statistic, residual)) / math.log(10) + math.log10(choices)
    assert found.log10_p == pytest.approx(expected, abs=1e-6)
    zero = evidence.test(np.zeros(200), words[0], [], evidence.Counts(9, num_suspects=1, num_alignments=1))
    assert zero == (0.0, 0.0)


def test_an_owner_who_searches_all_supports_accuses_an_innocent_no_more_than_alpha_says():
    """At alpha = 0.1: the worst of all innocents and supports of up to two. Without the factor for choices it fails."""
    rng = np.random.default_rng(3)
    num_customers, num_chips, trials, alpha = 8, 48, 150, 0.1
    wrong = uncorrected = 0
    for _ in range(trials):
        book = rng.choice([-1.0, 1.0], (num_customers, num_chips))
        y = book[:2].mean(axis=0) + rng.normal(scale=0.7, size=num_chips)
        best, plain = 0.0, 0.0
        for size in (0, 1, 2):
            found = []
            for j in range(2, num_customers):
                others = [i for i in range(num_customers) if i != j]
                for support in ([], *([i] for i in others), *([i, k] for i in others for k in others if i < k)):
                    if len(support) == size:
                        found.append((abs(_statistic(y, book[j], book[support])), j, support))
            _, j, support = max(found)
            counts = evidence.Counts(num_customers, num_suspects=1, num_alignments=1)
            test = evidence.test(y, book[j], list(book[support]), counts)
            best = min(best, test.log10_p)
            # The exact normal tail in place of the proved bound, for the same N: what a naive arbiter would compute.
            plain = min(plain, math.log10(2 * stats.norm.sf(abs(test.statistic)) * num_customers))
        wrong += best <= math.log10(alpha)
        uncorrected += plain <= math.log10(alpha)
    assert wrong / trials <= alpha
    assert stats.binomtest(uncorrected, trials, alpha, "greater").pvalue < 0.01  # negative control


def _statistic(y: np.ndarray, word: np.ndarray, support: np.ndarray) -> float:
    residual = y - np.linalg.lstsq(support.T, y, rcond=None)[0] @ support if len(support) else y
    return float(residual @ word / np.linalg.norm(residual))


# A lying owner, who signs any number and commits to any before publication (tests/stress/fuzz/accusations.py).


def committed(tmp_path, change) -> accusations.Case:
    """An accusation of Ada for a model that is nobody's, by an owner who lied before publishing the root."""
    at = fuzz.scene()
    suspect = at.suspects[-1]
    content = json.loads(at.bundle)["bundle"]
    content["suspect"]["content"] = suspect.content
    accusations.commit(content)
    accusations.accuse(content, suspect, np.random.default_rng(0))
    change(content)
    accused, opened = content["accused"], content["opened"]
    accusations.commit(content)
    content |= {"accused": accused} | ({"opened": opened} if content["opened"] == [] else {})
    roots = tuple(item["commitment"]["root"] for item in accusations.committed(content))
    (tmp_path / "bundle").write_bytes(bundles.signed(content, at.master))
    return accusations.Case(b"", suspect, roots, ())


def judged(tmp_path, case, **options) -> verification.Report:
    return verification.verify(tmp_path / "bundle", case.suspect.path, fuzz.scene().base, root=case.roots, **options)


@pytest.mark.parametrize("alpha", [2.0, 1.0, 0.5, 0.002])
def test_a_committed_alpha_above_what_the_arbiter_allows_convicts_nobody(tmp_path, alpha):
    case = committed(tmp_path, lambda content: content["commitment"]["header"].update(alpha=alpha))
    report = judged(tmp_path, case)
    assert failing(report) == {"level"}
    assert report.accused == ()
    (level,) = (check for check in report.checks if check.name == "level")
    assert "at most 0.001" in level.detail
    assert report.largest_alpha == 1e-3
    if alpha == 2.0:  # the control: as it was, an alpha that no test can miss convicts of a model that is nobody's
        with accusations.ranges_unchecked():
            assert judged(tmp_path, case).holds
    if alpha == 0.5:  # an arbiter who allows it gets a test at that level, which this accusation does not pass
        assert "level" not in failing(judged(tmp_path, case, largest_alpha=0.6))


def test_an_arbiter_s_own_limit_is_a_level(case):
    assert case.verify(largest_alpha=1e-6).holds
    assert failing(case.verify(largest_alpha=1e-7)) == {"level"}
    for bad in (0.0, 1.0, 2.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="largest alpha"):
            case.verify(largest_alpha=bad)


OUT_OF_RANGE = {
    "no suspects": lambda c: c.update(num_suspects=0),
    "no readings": lambda c: c.update(num_alignments=0),
    "no occasion": lambda c: c["verdict"].update(occasion=0),
    "verdict 0": lambda c: c["verdict"].update(number=0),
    "alpha 0": lambda c: c["commitment"]["header"].update(alpha=0.0),
    "a negative alpha": lambda c: c["commitment"]["header"].update(alpha=-1e-6),
    "no customers": lambda c: c["commitment"]["header"].update(customers=0),
    "no chips": lambda c: c["commitment"]["header"].update(num_chips=0),
    "more chips than weights": lambda c: c["commitment"]["header"].update(num_chips=681),
    "commitment 0": lambda c: c["commitment"]["header"].update(number=0),
    "decoder 0": lambda c: c["commitment"]["header"].update(decoder_version=0),
    "strength 0": lambda c: c["commitment"]["header"].update(strength=0.0),
    "a leaf without weights": lambda c: c["spec"][0][1].append(0),
    "a scale of 0": lambda c: c["spec"][0].__setitem__(2, 0.0),
    "a positive log10_p": lambda c: c["accused"][0].update(log10_p=0.5),
    "a statistic above the largest": lambda c: c["accused"][0].update(statistic=8.2),
    "a share above 1": lambda c: c["accused"][0].update(share=2.0),
    "a support of all chips": lambda c: c["accused"][0].update(support=list(range(64))),
    "nobody accused": lambda c: c.update(accused=[]),
    "a place before the first": lambda c: c["opened"][0].update(index=0),
    "a place behind the last": lambda c: c["opened"][0].update(index=4),
    "a serial below its place": lambda c: c["opened"][2]["leaf"].update(serial=1),
    "a commitment that is not there": lambda c: c["opened"][0].update(commitment=9),
    "a thousand time stamps": lambda c: c.update(timestamps=[{"time": "", "response": "00"}] * 1000),
}


@pytest.mark.parametrize("what", OUT_OF_RANGE)
def test_a_number_out_of_its_range_is_a_failed_check_and_no_crash(tmp_path, what):
    content = json.loads(fuzz.scene().bundle)["bundle"]
    suspect = fuzz.scene().suspects[0]
    accusations.commit(content)
    OUT_OF_RANGE[what](content)
    (tmp_path / "bundle").write_bytes(bundles.signed(content, fuzz.scene().master))
    report = judged(tmp_path, accusations.Case(b"", suspect, (), ()))
    assert {"level", "numbers"} & failing(report)
    assert report.accused == ()


def test_accusations_that_would_take_an_arbiter_s_computer_hours_are_refused():
    content = json.loads(fuzz.scene().bundle)["bundle"]
    for item in accusations.committed(content):
        item["commitment"]["header"] |= {"num_chips": 680, "customers": 10_000}
    assert ranges.numbers(documents.parse(documents.Bundle, content)) is None
    content["accused"] = [{**content["accused"][0], "support": [1] * 670}] * 670
    assert "multiplications" in (ranges.numbers(documents.parse(documents.Bundle, content)) or "")


def test_counts_below_one_are_refused_where_a_test_is_computed():
    counts = evidence.Counts(1, 1, 1)
    for name in ("num_customers", "num_suspects", "num_alignments"):
        with pytest.raises(ValueError, match=f"{name} to be a whole number of at least 1"):
            evidence.test(np.ones(8), np.ones(8), [], counts._replace(**{name: 0}))


def test_large_counts_only_weaken_an_accusation(tmp_path):
    content = json.loads(fuzz.scene().bundle)["bundle"]
    found = []
    for count in (1, 1000, 2**62):
        content |= dict.fromkeys(("num_suspects", "num_alignments", "num_customers"), count)
        (tmp_path / "bundle").write_bytes(bundles.signed(content, fuzz.scene().master))
        found.append(judged(tmp_path, accusations.Case(b"", fuzz.scene().suspects[0], (), ())))
    assert [report.num_customers for report in found] == [5, 1000, 2**62]  # five are committed to
    assert [bool(report.accused) and report.holds for report in found] == [True, True, False]
    assert found[0].accused[0].log10_p < found[1].accused[0].log10_p < found[2].accused[0].log10_p == 0


def test_all_that_is_taken_on_the_owner_s_word_is_listed(case, tmp_path):
    said = " ".join(case.verify().statements)
    for word in (
        "1 suspect(s) were examined",
        "occasion 1",
        "no more than 6 customers",
        "drawn at random, and neither chosen nor drawn again",
        "no other commitment to this model",
        "the suspect is younger than the commitment: no time stamp says how old that is",
        "for anybody but the accused",
    ):
        assert word in said


# Several issues: a codeword is proved by the commitment of its own sale.


@pytest.fixture(scope="module")
def later(case, tmp_path_factory):
    """The vault of the case, after two more customers were licensed by an issue of their own each, and verdicts."""
    place = tmp_path_factory.mktemp("later")
    shutil.copytree(case.folder / "vault", place / "vault")
    with vault.opened(place / "vault", SECRET) as desk:
        newer = [
            issuing.issue(models.get(desk, "net"), customers.resolve(desk, [name]), place / "copies")
            for name in ("Noor", "Ole")
        ]
        leaked = [
            files.read(path).leaves for path in (case.folder / "copies/000001-Ada.safetensors", newer[0].files[0])
        ]
        files.write(place / "mixed", {name: (leaked[0][name] + leaked[1][name]) / 2 for name in leaked[0]})
        verdicts.trace(models.get(desk, "net"), [case.suspect])
        verdicts.trace(models.get(desk, "net"), [place / "mixed"])
        roots = [commitments.get(desk, "net", number).root for number in (1, 2, 3)]
    return place, roots


@contextlib.contextmanager
def exported(later, tmp_path, *args):
    shutil.copytree(later[0] / "vault", tmp_path / "vault")
    with vault.opened(tmp_path / "vault", SECRET) as desk:
        yield desk
        found = evidence.export(desk, *args)
        (tmp_path / "bundle").write_bytes(found.content)


def test_after_a_second_issue_an_earlier_customer_s_evidence_holds_against_the_root_of_that_sale(case, later, tmp_path):
    _, roots = later
    with exported(later, tmp_path, 2):
        pass
    for published in (roots[0], roots[1], roots[2], roots):  # each commitment names the one before
        report = case.verify(bundle=tmp_path / "bundle", root=published)
        assert report.holds, report.checks
        assert report.num_customers == 8  # all who were compared, though commitment 1 has six
    before = case.verify().accused[0].log10_p
    assert report.accused[0].log10_p == pytest.approx(before + math.log10(8 / 6))
    assert failing(case.verify(bundle=tmp_path / "bundle", root="11" * 32)) == {"published root"}


def test_a_named_commitment_is_used_and_one_that_proves_nothing_refused(case, later, tmp_path):
    _, roots = later
    with exported(later, tmp_path, 2, None, 2) as desk:
        for number in (4, 9):
            with pytest.raises(ValueError, match=r"(?s)of number 1 to 3.*after the suspect was seen"):
                evidence.export(desk, 2, None, number)
        with pytest.raises(ValueError, match="of number 2 to 3"):
            evidence.export(desk, 3, None, 1)
    report = case.verify(bundle=tmp_path / "bundle", root=roots[1])
    assert report.holds
    assert report.header.number == 2
    assert failing(case.verify(bundle=tmp_path / "bundle", root=roots[0])) == {"published root"}


def test_a_coalition_of_two_sales_is_proved_by_both_commitments(case, later, tmp_path):
    place, roots = later
    with exported(later, tmp_path, 3):
        pass
    report = case.verify(bundle=tmp_path / "bundle", suspect=place / "mixed", root=roots[:2])
    assert report.holds, report.checks
    assert {accused.customer for accused in report.accused} == {"Ada", "Noor"}
    only_first = case.verify(bundle=tmp_path / "bundle", suspect=place / "mixed", root=roots[0])
    assert failing(only_first) == {"published root"}
    assert any("codeword of 'Noor', was not given" in check.detail for check in only_first.checks)


CHAIN_FORGERIES = {
    "a commitment left out": lambda b: b["later"].pop(0),
    "a commitment of another model": lambda b: b["later"][0]["commitment"]["header"].update(base="11" * 32),
    "commitments exchanged": lambda b: b["later"].reverse(),
    "an alpha of a later one": lambda b: b["later"][1]["commitment"]["header"].update(alpha=0.9),
    "another root": lambda b: b["later"][1]["commitment"].update(root="11" * 32),
}


@pytest.mark.parametrize("what", CHAIN_FORGERIES)
def test_a_broken_chain_of_commitments_is_noticed(case, later, tmp_path, what):
    with exported(later, tmp_path, 2):
        pass
    content = json.loads((tmp_path / "bundle").read_text())["bundle"]
    CHAIN_FORGERIES[what](content)
    master = crypto.unseal(case.folder / "vault" / "master.key", SECRET)
    (tmp_path / "bundle").write_bytes(bundles.signed(content, master))
    assert "commitment" in failing(case.verify(bundle=tmp_path / "bundle", root=None))


def test_an_owner_who_understates_the_customers_compared_is_held_to_those_committed_to(case, later, tmp_path):
    with exported(later, tmp_path, 2):
        pass
    content = json.loads((tmp_path / "bundle").read_text())["bundle"]
    content["num_customers"] = 1
    (tmp_path / "bundle").write_bytes(
        bundles.signed(content, crypto.unseal(case.folder / "vault" / "master.key", SECRET))
    )
    assert case.verify(bundle=tmp_path / "bundle").num_customers == 8


# What else is exported


def test_a_verdict_against_nobody_is_no_evidence(case, tmp_path):
    with opened(case, tmp_path) as desk:
        verdicts.trace(models.get(desk, "net"), [case.base, tmp_path / "absent"])
        with pytest.raises(ValueError, match="0 of them"):
            evidence.export(desk, 2)
        with pytest.raises(ValueError, match="number of a verdict"):
            evidence.export(desk, 9)


def test_an_accusation_at_a_weaker_alpha_than_committed_is_not_exported(case, tmp_path):
    """Noise until the joint decoder accuses at 0.3 and not at the committed 1e-6."""
    leaked, rng = files.read(case.suspect).leaves, np.random.default_rng(0)
    with opened(case, tmp_path) as desk:
        for number in range(2, 12):
            noisy = {name: w + rng.normal(scale=0.9, size=w.shape).astype(np.float32) for name, w in leaked.items()}
            files.write(tmp_path / "weak", noisy)
            (suspect,) = verdicts.trace(models.get(desk, "net"), [tmp_path / "weak"], alpha=0.3).suspects
            if suspect.accused and suspect.accused[0].p_value > 1e-6:
                with pytest.raises(ValueError, match="an accusation that holds at alpha 1e-06"):
                    evidence.export(desk, number)
                return
    pytest.fail("no noise made a weak accusation")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl as a time-stamp authority")
def test_time_stamps_travel_with_the_evidence(case, tmp_path):
    authority(tmp_path)
    with opened(case, tmp_path) as desk:
        commitment = commitments.get(desk, "net", 1)
        time = timestamps.add(desk, commitment, stamp(tmp_path, timestamps.request(commitment)))
        (tmp_path / "bundle").write_bytes(evidence.export(desk, 1).content)
    report = case.verify(bundle=tmp_path / "bundle")
    assert report.holds
    (check,) = (check for check in report.checks if check.name == "time stamp")
    assert time in check.detail
    assert any("the time stamps say how old that is" in statement for statement in report.statements)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl as a time-stamp authority")
def test_a_time_stamp_of_the_sale_travels_with_evidence_after_later_issues(case, later, tmp_path):
    authority(tmp_path)
    with exported(later, tmp_path, 2) as desk:
        commitment = commitments.get(desk, "net", 1)
        time = timestamps.add(desk, commitment, stamp(tmp_path, timestamps.request(commitment)))
    report = case.verify(bundle=tmp_path / "bundle")
    assert report.holds
    assert [check.detail.split(";")[0] for check in report.checks if check.name == "time stamp"] == [time]


# Hostile bundles


def test_hostile_bundles_are_refused_or_do_not_hold(case, tmp_path):
    rng, original = np.random.default_rng(0), case.bundle.read_bytes()
    path, refused, failed = tmp_path / "bundle", 0, 0
    breaks = (*mutations.BREAKS, fuzz.edit, fuzz.edit, fuzz.edit)
    for number in range(450):
        content = breaks[number % len(breaks)](original, rng)
        path.write_bytes(content)
        try:
            report = case.verify(bundle=path)
        except errors.Unreadable as error:
            assert str(error).isprintable(), error
            assert "Ask for the file again" in str(error)
            refused += 1
        else:
            same = json.loads(content) == json.loads(original)
            assert report.holds == same
            failed += not same
    assert refused > 200
    assert failed > 5


def test_a_bundle_that_is_too_large_is_not_read(case, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "LARGEST", 1000)
    with pytest.raises(ValueError, match="at most 1,000 bytes"):
        case.verify()


def test_no_secret_but_the_carrier_s_key_is_in_a_bundle(case):
    master = crypto.unseal(case.folder / "vault" / "master.key", SECRET)
    text = case.bundle.read_text()
    labels = [("net", name) for name in ("code", "probes", "decoy", "salt")] + [("log",), ("signing",), ("findings",)]
    secrets = [master, *(keys.derive(master, *some) for some in labels)]
    for secret in secrets:
        assert secret.to_bytes().hex() not in text
    assert keys.derive(master, "net", "carrier").to_bytes().hex() in text


def test_a_base_that_was_made_for_a_codeword_convicts_nobody_by_a_strangers_model(tmp_path, monkeypatch):
    """The owner takes Bob's mark out of the base before committing to it, so that any model reads as his copy."""
    monkeypatch.setattr(crypto, "_N", 2**10)
    vault.create(tmp_path / "vault", SECRET)
    real, stranger = (
        {"kernel": np.random.default_rng(seed).normal(size=(600, 700)).astype(np.float32)} for seed in (0, 1)
    )
    with vault.opened(tmp_path / "vault", SECRET) as desk:
        mark = carriers.mark(models.carrier_key(desk, "net"), real, 304)
        bob = np.asarray(codes.codebook(models.code_key(desk, "net"), [0], 304, version=1))[0]
        made = {name: np.asarray(leaf) for name, leaf in embedding.embed(real, mark, -bob, 0.03).items()}
        models.add(desk, "net", made)
        issued = issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Bob", "Carol"]), tmp_path / "copies")
        files.write(tmp_path / "base", made)
        files.write(tmp_path / "stranger", stranger)
        verdicts.trace(models.get(desk, "net"), [tmp_path / "stranger"])
        with pytest.raises(ValueError, match="an accusation that holds"):
            evidence.export(desk, 1)
        with monkeypatch.context() as patched:  # the owner's own program does not look
            patched.setattr(evidence, "base_alone", lambda *models: None)
            (tmp_path / "bundle").write_bytes(evidence.export(desk, 1).content)
    found = verification.verify(
        tmp_path / "bundle", tmp_path / "stranger", tmp_path / "base", root=issued.commitment.root
    )
    assert [check.name for check in found.checks if not check.holds] == ["accusation of 'Bob'"]
    assert "the base alone reads as this codeword" in found.checks[-1].detail
