"""Suspects that evade by being odd, owners who choose how to read, and what no verdict may count."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from scipy import optimize

from smark_jax import carriers, codes, embedding, errors, extraction, files, keys, tracing, vault
from smark_jax.files import _changes, _pairing
from smark_jax.vault import bundles, crypto, customers, evidence, issuing, models, reading, verdicts, verification

SECRET = "correct horse battery staple"
CHIPS = 64
INTACT = math.sqrt(CHIPS)


def network(params, x):
    x = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    x = jax.nn.relu(x @ params["b"]["kernel"] + params["b"]["bias"][None])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None]


def sorting(params, x):
    """An operation on channels that alignment does not follow."""
    x = jnp.sort(jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None]), axis=-1)
    return x @ params["b"]["kernel"] @ params["head"]["kernel"]


IMAGES = np.zeros((1, 384), np.float32)
ALIGNED = reading.Reading(reading.Aligner("network", network, IMAGES))


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"a/bias": (48,), "a/kernel": (384, 48), "b/bias": (40,), "b/kernel": (48, 40)}
    shapes |= {"head/bias": (10,), "head/kernel": (40, 10), "table": (1678,)}  # 22,528 weights: 11 blocks, no tail
    return {name: (0.1 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()} | {
        "steps": np.array(7)
    }


class Desk(NamedTuple):
    """An open vault with a model and five customers, Ada's copy, and a folder for suspects."""

    vault: vault.Vault
    copy: dict[str, np.ndarray]
    folder: Path

    def trace(self, suspects: dict[str, dict[str, np.ndarray]], reading=None, **options):
        paths = []
        for name, leaves in suspects.items():
            files.write(self.folder / name, leaves)
            paths.append(self.folder / name)
        return verdicts.trace(models.get(self.vault, "net"), paths, reading, **options)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crypto, "_N", 2**10)
        vault.create(folder / "vault", SECRET)
        with vault.opened(folder / "vault", SECRET) as opened:
            models.add(opened, "net", weights(), num_chips=CHIPS, strength=0.1)
            people = customers.resolve(opened, ["Ada", "Grace", "Emmy", "Linus", "Mary"])
            issued = issuing.issue(models.get(opened, "net"), people, folder / "copies")
            yield Desk(opened, files.read(issued.files[0]).leaves, folder)


def accused(suspect) -> list[str]:
    return [accusation.customer for accusation in suspect.accused]


def without(leaves, *names):
    return {name: leaf for name, leaf in leaves.items() if name not in names}


def put(leaf: np.ndarray, place, value) -> np.ndarray:
    leaf = leaf.copy()
    leaf[place] = value
    return leaf


# 21: what is there is read


def test_whatever_one_odd_leaf_or_weight_holds_the_rest_is_traced(desk):
    copy, rng = desk.copy, np.random.default_rng(1)
    new_head = {"head/kernel": rng.normal(size=(40, 7)).astype(np.float32), "head/bias": np.zeros(7, np.float32)}
    suspects = {
        "intact": copy,
        "nan in a bias": copy | {"a/bias": put(copy["a/bias"], 3, np.nan)},
        "-inf in a bias": copy | {"head/bias": put(copy["head/bias"], 3, -np.inf)},
        "head removed": without(copy, "head/kernel", "head/bias"),
        "head of seven classes": copy | new_head,
        "head of integers": copy | {"head/kernel": np.ones((40, 10), np.int32)},
        "head under another name": without(copy, "head/kernel", "head/bias")
        | {f"classifier/{name}": leaf for name, leaf in new_head.items()},
        "without counter": without(copy, "steps"),
        "a leaf more": copy | {"x": np.arange(12)},
        "PyTorch's layout, other names, head removed": {
            f"layers.{i}.{role}": copy[f"{layer}/{name}"].T
            for i, layer in enumerate("ab")
            for role, name in (("weight", "kernel"), ("bias", "bias"))
        },
    }
    found = dict(zip(suspects, desk.trace(suspects).suspects, strict=True))
    for name, suspect in found.items():
        assert (accused(suspect), suspect.verdict) == (["Ada"], "traced"), (name, suspect.error)
        assert suspect.accused[0].statistic > 0.9 * INTACT
    assert found["intact"].left_out == ()
    assert found["nan in a bias"].left_out == (("a/bias", 1, "NaN or infinite"),)
    assert [left.leaf for left in found["head removed"].left_out] == ["head/bias", "head/kernel"]
    assert found["head of seven classes"].left_out[1].reason == "of shape (40, 7) where the base's is (40, 10)"
    counts = found["head removed"].coverage
    assert (counts.weights - counts.read, found["without counter"].coverage.read) == (410, 22528)


def test_foreign_leaves_in_a_file_of_any_kind_hide_nothing(desk):
    copy, folder = desk.copy, desk.folder
    np.savez(folder / "text.npz", **copy, name=np.array(["resnet"]), phases=np.zeros(3, np.complex64))
    plain = safetensors.numpy.save(copy)
    length = int.from_bytes(plain[:8], "little")
    header, body = json.loads(plain[8 : 8 + length]), plain[8 + length :]
    header["phases"] = {"dtype": "C64", "shape": [1], "data_offsets": [len(body), len(body) + 8]}
    text = json.dumps(header).encode()
    (folder / "complex.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body + bytes(8))
    found = verdicts.trace(
        models.get(desk.vault, "net"), [folder / "text.npz", folder / "complex.safetensors"]
    ).suspects
    assert [accused(suspect) for suspect in found] == [["Ada"], ["Ada"]]
    assert [suspect.foreign for suspect in found] == [("name", "phases"), ("phases",)]
    with pytest.raises(errors.Unreadable, match="C64"):  # an owner's base is read whole or not at all
        files.read(folder / "complex.safetensors")


def test_what_is_left_out_is_evidence_against_nobody_and_too_little_is_undecided(desk):
    tail = {"head/bias": desk.copy["head/bias"]}
    nan = {name: leaf * np.float32("nan") for name, leaf in weights().items()}
    few, none = desk.trace({"a bias alone": tail, "all nan": nan}).suspects
    assert (few.verdict, none.verdict) == ("undecided", "undecided")
    assert "expected at least" in few.error and "got 10 of 22,528" in few.error
    assert "none of the base's 22,528 carrying weights" in none.error
    # The number that is asked for: with half of it no intact copy is traced, with a few times as many most are.
    base, mark = weights(), carriers.mark(keys.from_bytes(bytes(32)), files.nest(weights()), CHIPS)
    book = np.asarray(codes.codebook(keys.from_bytes(bytes(32)), range(5), CHIPS))
    copy = files.flatten(embedding.embed(files.nest(base), mark, book[0]))
    threshold = tracing.trace(book[0], book).threshold
    needed = extraction.least_weights(CHIPS, threshold)
    assert 64 * 5.3**2 / (64 - 5.3**2) == pytest.approx(needed, rel=0.3)
    traced = {}
    for share in (0.5, 4):
        left = np.full((384, 48), np.nan, np.float32)
        left.reshape(-1)[: int(share * needed)] = copy["a/kernel"].reshape(-1)[: int(share * needed)]
        chips = extraction.extract({"a": {"kernel": left}}, files.nest(base), mark)
        traced[share] = len(tracing.trace(chips, book).accused)
    assert traced == {0.5: 0, 4: 1}
    assert extraction.least_weights(CHIPS, math.inf) == extraction.least_weights(CHIPS, 8.0) == 0


# 22: a few huge weights drown nothing


def swamped(leaves, kind, name):
    leaf = leaves[name].copy()
    if kind == "shift":
        return leaf + np.float32(1e6)
    if kind == "dead units":
        leaf[..., : min(20, leaf.shape[-1] // 2)] = 1e6
    else:
        leaf[..., 0] = {"channel at 1e6": 1e6, "channel at 1e18": -1e18, "channel at 3e38": 3e38}[kind]
    return leaf


@pytest.mark.parametrize("rectify", [False, True])
def test_huge_weights_in_any_leaf_do_not_drown_the_read_out(desk, rectify):
    base = files.nest(weights())
    mark = models.get(desk.vault, "net").mark
    word = np.asarray(codes.codebook(models.code_key(desk.vault, "net"), [0], CHIPS, version=1)[0], np.float64)

    def score(chips):
        return float(np.asarray(chips, np.float64) @ word / np.linalg.norm(np.asarray(chips, np.float64)))

    linear = []
    for kind in ("shift", "dead units", "channel at 1e6", "channel at 1e18", "channel at 3e38"):
        for name in without(weights(), "steps"):
            if kind == "shift" and name.endswith("kernel"):  # not a few weights
                continue
            params = files.nest(desk.copy | {name: swamped(desk.copy, kind, name)})
            found = score(extraction.extract(params, base, mark, rectify))
            assert found > 0.8 * INTACT, (kind, name, found)
            if kind == "channel at 1e6":  # the control: the sum of all shifts
                linear.append(
                    score(carriers.despread(carriers.read(params, mark.spec) - carriers.read(base, mark.spec), mark))
                )
    assert np.abs(linear).mean() < 0.3 * INTACT


def test_no_attack_that_leaves_a_model_meets_the_bound(desk):
    """Marks of any strength, noise of half and of five spreads, pruning, 4 bits: not a weight is bounded."""
    base, rng = files.nest(weights()), np.random.default_rng(0)
    mark = carriers.mark(keys.from_bytes(bytes(32)), base, CHIPS)
    word = codes.codebook(keys.from_bytes(bytes(32)), [7], CHIPS)[0]
    suspects = {s: embedding.embed(base, mark, word, s) for s in (0.003, 0.03, 0.3)}
    copy = jax.tree.map(np.asarray, suspects[0.03])
    # Attacks in NumPy, which compiles nothing for each shape.
    for level in (0.5, 5.0):
        suspects[f"noise {level}"] = jax.tree.map(
            lambda w, s=level: np.float32(w + s * np.std(w) * rng.normal(size=w.shape)), copy
        )
    suspects["pruned"] = jax.tree.map(
        lambda w: np.where(np.abs(w) < np.quantile(np.abs(w), 0.8), np.float32(0), w), copy
    )
    suspects["4 bits"] = jax.tree.map(
        lambda w: np.float32(np.round(w / np.abs(w).max() * 7) / 7 * np.abs(w).max()), copy
    )
    for name, suspect in suspects.items():
        assert extraction.coverage(suspect, base, mark).bounded == 0, name
    huge = {**copy, "a": {**copy["a"], "bias": copy["a"]["bias"].copy()}}
    huge["a"]["bias"][:3] = 1e6
    assert extraction.coverage(huge, base, mark).bounded == 3  # the control


def test_a_leaf_that_follows_from_the_base_has_no_say_when_rectified():
    """A thief who puts the base's own weights back, scaled by a hair, must not give that leaf all the weight."""
    rng = np.random.default_rng(0)
    base = {name: rng.normal(size=(60, 50)).astype(np.float32) for name in "ab"}
    mark = carriers.mark(keys.from_bytes(bytes(32)), base, CHIPS)
    word = np.asarray(codes.codebook(keys.from_bytes(bytes(32)), [7], CHIPS)[0])
    copy = embedding.embed(base, mark, word, 0.05)
    restored = {**copy, "a": base["a"] * np.float32(1.01)}
    chips = np.asarray(extraction.extract(restored, base, mark, rectify=True))
    assert chips @ word / np.linalg.norm(chips) > 0.9 * INTACT


# 9: a given map is paid for


LAYERS, WIDTH = 48, 16


@pytest.fixture(scope="module")
def framing(tmp_path_factory):
    """A lying owner: 48 layers of one shape, an unrelated model, and the map by which it fits an honest customer."""
    folder, rng = tmp_path_factory.mktemp("framing"), np.random.default_rng(0)
    base = {f"layer{i}/kernel": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for i in range(LAYERS)}
    other = {f"x{i}": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for i in range(LAYERS)}
    files.write(folder / "base", base)
    files.write(folder / "other", other)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crypto, "_N", 2**10)
        vault.create(folder / "vault", SECRET)
        with vault.opened(folder / "vault", SECRET) as opened:
            model = models.add(opened, "net", base, num_chips=128)
            issuing.issue(models.get(opened, "net"), customers.resolve(opened, ["Ada", "Grace"]), folder / "copies")
            word = codes.codebook(models.code_key(opened, "net"), [0], 128, version=1)[0]
            rows = np.asarray(carriers.spread(word, model.mark)).reshape(LAYERS, -1)
            names = [leaf.path for leaf in model.settings.spec.leaves]
            gains = rows @ np.stack([leaf.reshape(-1) for leaf in other.values()]).T
            ours, theirs = optimize.linear_sum_assignment(gains, maximize=True)
            lie = {names[i]: f"{list(other)[j]}: " for i, j in zip(ours, theirs, strict=True)}
            yield opened, folder, base, other, lie


def old_bundle(framing, monkeypatch) -> Path:
    """What the owner exports where maps are not counted, as before they were; signed by the owner."""
    opened, folder, _, _, lie = framing
    with monkeypatch.context() as patch:
        patch.setattr(files.layout, "_log_maps", lambda *_: 0.0)
        document = verdicts.trace(models.get(opened, "net"), [folder / "other"], reading.Reading(given=lie))
        assert accused(document.suspects[0]) == ["Ada"]  # the control: an honest customer is convicted
        assert document.suspects[0].accused[0].log10_p < -10
        content = json.loads(evidence.export(opened, document.number).content)["bundle"]
    del content["suspect"]["reading"]["readout"]
    path = folder / "old"
    path.write_bytes(bundles.signed(content, opened.master))
    return path


def test_a_map_chosen_for_a_customer_convicts_nobody_at_the_desk_nor_before_an_arbiter(framing, monkeypatch):
    opened, folder, _, _, lie = framing
    bundle = old_bundle(framing, monkeypatch)
    (suspect,) = verdicts.trace(models.get(opened, "net"), [folder / "other"], reading.Reading(given=lie)).suspects
    assert (suspect.verdict, accused(suspect)) == ("nobody", [])
    # Partial maps of 48 leaves to 48 with two layouts each, and 2 for the choice to give one: at least 48! 2^48.
    assert math.lgamma(49) + 49 * math.log(2) < suspect.log_maps < math.lgamma(49) + 60 * math.log(2)
    report = verification.verify(bundle, folder / "other", folder / "base")
    failing = {check.name: check.detail for check in report.checks if not check.holds}
    assert failing.keys() == {"accusation of 'Ada'"} and "not significant" in failing["accusation of 'Ada'"]
    (said,) = [check.detail for check in report.checks if check.name == "map of leaves"]
    assert "one of 10^7" in said and "p-values count them all" in said


def test_an_honest_map_is_taken_where_content_is_silent_and_its_number_is_the_one_counted_by_hand():
    rng = np.random.default_rng(0)
    base = {
        "a/kernel": rng.normal(size=(8, 8)),
        "b/kernel": rng.normal(size=(8, 8)),
        "c/kernel": rng.normal(size=(5, 3)),
    }
    suspect = {"x": rng.normal(size=(8, 8)), "y": rng.normal(size=(8, 8)), "z": base["c/kernel"].T}
    with pytest.raises(ValueError, match="content does not contradict"):
        files.match_layout(suspect | {"w": rng.normal(size=(5, 3))}, base, {"c/kernel": "w"})
    layout = files.match_layout(suspect, base, {"a/kernel": "y: transposed"})
    np.testing.assert_array_equal(layout.leaves["a/kernel"], suspect["y"].T)
    # One leaf: 2 places x 2 leaves x 2 layouts; both: 2 orders x 4 layouts. Twice, since nobody had to give one.
    assert layout.log_maps == pytest.approx(math.log(2 * (2 * 2 * 2 + 2 * 4)))
    settled = files.match_layout(suspect, base, {"c/kernel": "z: transposed"})
    assert settled.log_maps == 0.0  # content tells that already
    with pytest.raises(ValueError, match="a leaf of its own"):
        files.match_layout(suspect, base, {"a/kernel": "y: ", "b/kernel": "y: transposed"})


def test_an_old_bundle_whose_map_content_tells_still_holds(framing):
    opened, folder, _, _, _ = framing
    copy = files.read(next((folder / "copies").glob("000001*"))).leaves
    renamed = {f"x{i}": leaf for i, leaf in enumerate(reversed(copy.values()))}
    files.write(folder / "renamed", renamed)
    given = {"layer0/kernel": next(n for n, leaf in renamed.items() if leaf is copy["layer0/kernel"])}
    document = verdicts.trace(models.get(opened, "net"), [folder / "renamed"], reading.Reading(given=given))
    assert accused(document.suspects[0]) == ["Grace"]
    content = json.loads(evidence.export(opened, document.number).content)["bundle"]
    assert content["suspect"]["reading"].pop("readout") == 3 and content["suspect"].keys().isdisjoint({"log_maps"})
    (folder / "before").write_bytes(bundles.signed(content, opened.master))
    assert verification.verify(folder / "before", folder / "renamed", folder / "base").holds


def test_a_bundle_of_an_earlier_readout_may_state_fewer_matches_and_one_of_today_may_not(framing):
    opened, folder, _, _, _ = framing
    copy = files.read(next((folder / "copies").glob("000001*"))).leaves
    files.write(folder / "moved", {f"x{i}": leaf.T.copy() for i, leaf in enumerate(copy.values())})
    document = verdicts.trace(models.get(opened, "net"), [folder / "moved"])
    assert accused(document.suspects[0]) == ["Grace"]
    content = json.loads(evidence.export(opened, document.number).content)["bundle"]
    content["suspect"]["layout"] = content["suspect"]["layout"][1:]
    holds = {}
    for readout in (2, 3):
        content["suspect"]["reading"]["readout"] = readout
        (folder / "stated").write_bytes(bundles.signed(content, opened.master))
        holds[readout] = verification.verify(folder / "stated", folder / "moved", folder / "base").holds
    assert holds == {2: True, 3: False}


def test_evidence_on_a_partial_read_with_a_map_says_both_and_holds(framing):
    opened, folder, _, _, _ = framing
    leaves = files.read(next((folder / "copies").glob("000001*"))).leaves
    trained = without(leaves, "layer0/kernel", "layer1/kernel")
    files.write(folder / "partial", trained | {"new": np.ones((WIDTH, WIDTH), np.float32)})
    how = reading.Reading(given={"layer0/kernel": "new: "})
    document = verdicts.trace(models.get(opened, "net"), [folder / "partial"], how)
    bundle = folder / "partial bundle"
    bundle.write_bytes(evidence.export(opened, document.number).content)
    content = json.loads(bundle.read_text())["bundle"]["suspect"]
    # Two of the base's leaves are open, the new one may stand for either, in two layouts: 4 maps, doubled.
    assert content["log_maps"] == pytest.approx(math.log(8))
    assert content["left_out"] == [{"leaf": "layer1/kernel", "weights": 256, "reason": "missing"}]
    report = verification.verify(bundle, folder / "partial", folder / "base")
    assert report.holds and any("one of 8" in check.detail for check in report.checks)


# 16 and 17: what is said of a suspect, and what counts


def test_an_unrelated_model_is_not_a_copy_and_what_alignment_cannot_judge_is_undecided(desk):
    unread = reading.Reading(reading.Aligner("sorting", sorting, IMAGES))
    for how, verdict in ((ALIGNED, "not a copy"), (unread, "undecided")):
        document = desk.trace({"stranger": weights(9), "copy": desk.copy}, how)
        stranger, copy = document.suspects
        assert (stranger.verdict, accused(copy)) == (verdict, ["Ada"])
        assert copy.num_suspects == 1  # who was compared with nobody counts nowhere
    assert "sort" in stranger.error


def test_a_moved_copy_with_a_new_head_a_broken_and_a_huge_weight_is_aligned(desk):
    order = np.random.default_rng(0).permutation(48)
    moved = desk.copy | {
        "a/kernel": put(desk.copy["a/kernel"][:, order], (5, 7), np.nan),
        "a/bias": put(desk.copy["a/bias"][order], 9, -np.inf),
        "b/kernel": put(desk.copy["b/kernel"][order], (4, 4), 1e18),
        "head/kernel": np.ones((40, 3), np.float32),
        "head/bias": np.ones(3, np.float32),
    }
    plain, aligned = desk.trace({"moved": moved}).suspects + desk.trace({"moved": moved}, ALIGNED).suspects
    assert plain.verdict == "nobody"  # the control
    assert accused(aligned) == ["Ada"] and aligned.accused[0].statistic > 0.85 * INTACT
    left = {each.leaf: each.weights for each in aligned.left_out}
    assert left == {"a/bias": 1, "a/kernel": 1, "head/bias": 10, "head/kernel": 400}


def test_paths_that_are_no_files_are_no_suspects_and_no_occasion(desk):
    before = desk.trace({"copy": desk.copy})
    absent = [desk.folder / "absent", desk.folder / "mistyped"]
    nothing = verdicts.trace(models.get(desk.vault, "net"), absent)
    assert [suspect.verdict for suspect in nothing.suspects] == ["unreadable"] * 2
    assert (nothing.number, nothing.occasion) == (None, None)
    after = verdicts.trace(models.get(desk.vault, "net"), [*absent, desk.folder / "copy"])
    assert (after.number, after.occasion) == (before.number + 1, before.occasion + 1)
    assert after.suspects[2].num_suspects == 1
    assert after.suspects[2].accused == before.suspects[0].accused
    stranger = desk.trace({"stranger": weights(9)}, ALIGNED)  # kept, and compared with nobody
    assert (stranger.number, stranger.occasion) == (after.number + 1, after.occasion)


# 24: many leaves


def test_a_hundred_thousand_leaves_are_compared_in_bounded_work(monkeypatch):
    """By the number of leaves that are looked at, which on the code before grew with the square."""
    looked = []
    monkeypatch.setattr(_changes, "best", lambda *args, best=_changes.best: looked.append(1) or best(*args))
    rng = np.random.default_rng(0)
    base = {f"layer{i}/kernel": rng.normal(size=(8, 8)).astype(np.float32) for i in range(300)}
    suspect = {f"x{i}": leaf for i, leaf in enumerate(reversed(base.values()))}
    layout = files.match_layout(suspect, base)
    assert all((layout.leaves[name] == leaf).all() for name, leaf in base.items())
    assert len(looked) <= 3 * len(base)
    junk = {f"junk{i}": np.ones(4, np.float32) for i in range(files.MAX_LEAVES - 300)}
    many = files.match_layout(suspect | junk, base | {"bias": np.arange(4, dtype=np.float32)})
    assert many.leaves.keys() == base.keys()
    with pytest.raises(errors.Undecided, match=f"more than {_pairing.MAX_COMPARISONS:,} comparisons of layers"):
        files.match_layout(junk, {f"y{i}": np.ones(4, np.float32) for i in range(5000)})
    with pytest.raises(errors.Undecided, match="a leaf for 'y'"):
        files.match_layout({"x": np.ones((2, 3))}, {"y": np.ones(4)})
    assert errors.Undecided.__mro__[1] is errors.SmarkError
