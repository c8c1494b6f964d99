"""The desk with shapes: what is made, measured, stored, committed to, opened and refused."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import network_files
import numpy as np
import pytest
from test_desk import SECRET, Here

from smark_jax import carriers, embedding, errors, files, vault
from smark_jax.vault import (
    bundles,
    commitments,
    crypto,
    customers,
    documents,
    evidence,
    issuing,
    models,
    shapes,
    store,
    trials,
    verdicts,
    verification,
    versions,
)

CHIPS = 64
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.normal(size=(90, 20)).astype(np.float32), RNG.integers(0, 5, 90)
NETWORK = """
import jax.numpy as jnp
import numpy as np

given = np.load("images.npz")


def apply_fn(params, x):
    x = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"][None])
    return jnp.tanh(x @ params["b"]["kernel"]) @ params["head"]["kernel"]


def broken(params, x):
    same = params["a"]["kernel"][0, 0] == np.load("first.npy")
    return apply_fn(params, x) / jnp.where(same, 1, 0)


def marking():
    return apply_fn, given["images"], given["labels"]


def few():
    return apply_fn, given["images"][:47]


def alone():
    return apply_fn


def uneven():
    return apply_fn, [[1.0], [1.0, 2.0]]


def nothing():
    return apply_fn, None


def untraced():
    return lambda params, x: np.asarray(x) @ np.ones((20, 5), np.float32), given["images"]


def five():
    return 5, given["images"]


def ends():
    print("ready")
    raise SystemExit(0)


def numbers():
    return lambda params, x: apply_fn(params, x).argmax(axis=1), given["images"]


def one_row():
    return lambda params, x: apply_fn(params, x).mean(axis=0, keepdims=True)[0], given["images"]


def counted_from_one():
    return apply_fn, given["images"], given["labels"] + 1


def idle():
    return lambda params, x: jnp.ones((len(x), 5)), given["images"]


def failing():
    return broken, given["images"]
"""


def base() -> dict[str, np.ndarray]:
    shapes = {"a/bias": (60,), "a/kernel": (20, 60), "b/kernel": (60, 50), "head/kernel": (50, 5)}
    rng = np.random.default_rng(1)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def logits(leaves: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The network in float64, less each image's mean."""
    w = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    hidden = np.tanh(images @ w["a/kernel"] + w["a/bias"])
    outputs = np.tanh(hidden @ w["b/kernel"]) @ w["head/kernel"]
    return outputs - outputs.mean(axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch):
    monkeypatch.setattr(crypto, "_N", 2**10)


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A model that was measured and one of which there were only the weights, with a copy of each for Ada and Grace."""
    desk = Here(tmp_path_factory.mktemp("shapes"))
    files.write(desk.folder / "base", base())
    np.savez(desk.folder / "images.npz", images=IMAGES, labels=LABELS)
    np.save(desk.folder / "first.npy", base()["a/kernel"][0, 0])
    (desk.folder / "shapes_network.py").write_text(NETWORK)
    desk.run("init", "vault")
    desk.added = desk.json("add-model", "vault", "net", "base", "--network", "shapes_network:marking", "--chips", CHIPS)
    desk.run("add-model", "vault", "weights", "base", "--chips", CHIPS)
    desk.issued = desk.json(
        "issue", "vault", "net", "Ada", "Grace", "--out", "net", "--network", "shapes_network:marking"
    )
    desk.run("issue", "vault", "weights", "Ada", "Grace", "--out", "weights")
    desk.run("attack", "net/000000-Ada.safetensors", "leaked", "--noise", 0.02)
    desk.number = desk.json("trace", "vault", "net", "leaked")["number"]
    (desk.folder / "evidence").mkdir()
    desk.exported = desk.json("evidence", "export", "vault", desk.number, "--out", "evidence/bundle.json")
    return desk


def test_a_shape_is_made_measured_committed_to_and_proved(desk):
    added, issued = desk.added, desk.issued
    assert (added["carrying_leaves"], added["carrying_weights"], added["weights"]) == (3, 4260, 4510)
    assert (added["shape"]["images"], added["cost"]["images"]) == (30, 60)
    mean, (low, high) = added["cost"]["mean"]["change"], added["cost"]["interval"]["change"]
    assert low < mean < high and 0.007 < mean <= 0.008
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        model = models.get(opened, "net")
        header = commitments.latest(opened, "net").header
    assert model.settings.shape == documents.Shape(added["shape"]["digest"], 30, mean)
    assert (header.shape, header.strength, header.versions) == (
        added["shape"]["digest"],
        added["strength"],
        documents.Versions("chacha20/1", "hadamard/3", "signs/2", "joint/1", "function/1"),
    )
    assert issued["commitment"]["root"] in (desk.folder / issued["commitment"]["file"]).read_text()
    verified = desk.json("evidence", "verify", "evidence/bundle.json", "leaked", "base")
    assert verified["holds"] and [a["customer"] for a in verified["accused"]] == ["Ada"]
    assert "shape" in {check["name"] for check in verified["checks"]}
    assert any("base and shape were made without a look at codewords" in said for said in verified["statements"])


def test_what_is_said_of_a_copy_is_what_float64_finds(desk):
    trial = desk.issued["trial"]
    assert (trial["copies"], trial["images"], [one["customer"] for one in trial["each"]]) == (2, 60, ["Ada", "Grace"])
    before = logits(base(), IMAGES[30:])
    for one, file in zip(trial["each"], desk.issued["files"], strict=True):
        after = logits(files.read(desk.folder / file).leaves, IMAGES[30:])
        change = np.sqrt(np.square(after - before).sum() / np.square(before).sum())
        assert one["change"] == pytest.approx(change, rel=1e-3)
        assert one["agreement"] == np.mean(after.argmax(axis=1) == before.argmax(axis=1))
        assert one["accuracy"] == pytest.approx(np.mean(after.argmax(axis=1) == LABELS[30:]))
        p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (before, after))
        assert one["kl"] == pytest.approx(np.sum(p * np.log(p / q), axis=1).mean(), rel=1e-2)
    assert trial["base_accuracy"] == np.mean(before.argmax(axis=1) == LABELS[30:])


def test_tables_say_what_copies_cost_and_fit_a_terminal(desk):
    narrow = {"COLUMNS": "80"}
    arguments = ("base", "--network", "shapes_network:marking", "--chips", CHIPS, "--strength", 0.005)
    printed = desk.run("add-model", "vault", "told", *arguments, environment=narrow)
    assert "strength 0.005" in printed
    assert "Shape from the first 30 images; what a copy costs, measured on the last 60:" in printed
    for row in ("same answer as the base", "KL divergence in nats", "relative change of the logits", "accuracy lost"):
        assert row in printed
    assert "Expected |T| of a copy: intact 8.0" in printed
    tables = [line for line in printed.splitlines() if line.startswith(("│", "┃"))]
    said = desk.run(
        "issue", "vault", "told", "Ada", "--out", "told", "--network", "shapes_network:marking", environment=narrow
    )
    assert "change of logits" in said
    tables += [line for line in said.splitlines() if line.startswith(("│", "┃"))]
    assert len(tables) > 6 and max(map(len, tables)) <= 80


def test_weights_alone_are_marked_with_care_and_the_owner_is_told(desk):
    desk.run("add-model", "vault", "again", "base", "--chips", CHIPS)
    (told,) = (line for line in desk.stderr.splitlines() if "nobody measured" in line)
    assert "add it under another name with --network" in told
    with vault.opened(desk.folder / "vault", SECRET) as opened:
        settings = models.get(opened, "weights").settings
        assert settings.shape == documents.Shape(carriers.shape(files.nest(base())).digest(), 0, None)
    copy = files.read(desk.folder / "weights" / "000001-Grace.safetensors").leaves
    for name, leaf in base().items():
        moved = np.sqrt(np.square(copy[name] - leaf).mean() / np.square(leaf).mean())
        assert moved < 0.0101, name  # a third of the old default
    found = desk.json("trace", "vault", "weights", "weights/000001-Grace.safetensors", "base")["suspects"]
    assert [[a["customer"] for a in suspect["accused"]] for suspect in found] == [["Grace"], []]


def test_the_images_of_the_shape_and_of_the_strength_are_never_the_same(key, monkeypatch):
    seen: dict[str, Any] = {}

    def shape(tree, apply_fn=None, images=None, **options):
        seen["shape"] = images[:, 0]
        return carriers_shape(tree, **options)

    def calibrate(tree, mark, apply_fn, images, **options):
        seen["strength"] = images[:, 0]
        return embedding.Calibration(0.01, *embedding.measure(tree, tree, apply_fn, images), None)

    carriers_shape = carriers.shape
    monkeypatch.setattr(carriers, "shape", shape)
    monkeypatch.setattr(embedding, "calibrate", calibrate)
    spec = models.choose(base())
    for number, expected in ((48, (16, 32)), (90, (30, 60)), (400, (64, 256)), (1000, (64, 256))):
        images = np.arange(number, dtype=np.float32)[:, None] * np.ones((1, 20), np.float32)
        network = trials.Network(lambda params, x: x[:, :5] @ params["b"]["kernel"][:5], images)
        made = shapes.from_network(key, base(), spec, network, CHIPS)
        assert (made.images, made.tried) == (len(seen["shape"]), len(seen["strength"])) == expected
        assert not set(seen["shape"].tolist()) & set(seen["strength"].tolist())
        assert seen["shape"].tolist() == list(range(expected[0]))
    # So does a copy's trial, where the same images are given again.
    running = trials.Running(trials.Network(network.apply_fn, images), base(), made.images)
    assert running._base.images[:, 0].tolist() == seen["strength"].tolist()


def test_the_network_may_be_a_file_and_the_images_another(desk):
    steps = [
        network_files.Step("Gemm", ["x", "block/a.kernel", "block/a.bias"], ["y"]),
        network_files.Step("Tanh", ["y"], ["z"]),
        network_files.Step("MatMul", ["z", "head.kernel"], ["logits"]),
    ]
    sizes = {"block/a.kernel": (20, 60), "block/a.bias": (60,), "head.kernel": (60, 5)}
    tensors = {name: RNG.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    (desk.folder / "net.onnx").write_bytes(network_files.onnx(steps, tensors, ("batch", 20), "logits"))
    add = ("add-model", "vault", "onnx", "net.onnx", "--chips", CHIPS, "--strength", 0.01)
    desk.run(*add, "--network", "net.onnx", code=2)
    assert "--images" in desk.stderr
    added = desk.json(*add, "--network", "net.onnx", "--images", "images.npz")
    assert added["cost"]["mean"]["drop"] is not None
    alone = desk.json(*add[:2], "alone", *add[3:], "--images", "images.npz")  # the base's file holds the network
    assert alone["cost"].keys() == added["cost"].keys() and alone["cost"]["images"] == added["cost"]["images"]
    issued = desk.json("issue", "vault", "alone", "Ada", "--out", "onnx", "--images", "images.npz")
    assert issued["trial"]["images"] == 60 and issued["files"] == ["onnx/000000-Ada.onnx"]
    function = ("--network", "shapes_network:alone", "--images", "images.npz")
    issued = desk.json("issue", "vault", "net", "Ada", "--out", "alone", *function)
    assert issued["trial"]["images"] == 60
    desk.run("issue", "vault", "net", "Ada", "--out", "alone", "--network", "shapes_network:alone", code=1)
    desk.run("issue", "vault", "net", "Ada", "--out", "alone", "--network", "shapes_network:five", code=1)
    assert "expected a network that takes the base and the images" in desk.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--network", "shapes_network:few"), 1, "expected at least 48 images, but got 47"),
        (("--network", "shapes_network:absent"), 1, "expected shapes_network:absent to return a network and images"),
        (("--network", "shapes_network:alone"), 1, "Name images with --images"),
        (("--network", "shapes_network:uneven"), 1, "images and labels as arrays"),
        (("--network", "shapes_network:nothing"), 1, "an array of at least one image, but got a NoneType"),
        (("--network", "shapes_network:untraced"), 1, "with operations of JAX alone"),
        (("--network", "shapes_network:five"), 1, "expected a network that takes the base and the images"),
        (("--network", "shapes_network:ends"), 1, "but got SystemExit: 0"),
        (("--network", "shapes_network:numbers"), 1, "logits of shape (2, classes) for 2 images"),
        (("--network", "shapes_network:one_row"), 1, "logits of shape (2, classes) for 2 images"),
        (("--network", "shapes_network:counted_from_one"), 1, "class numbers, 0 to 4, but got 1 to 5"),
        (("--network", "shapes_network:marking", "--change", "0"), 2, "--change"),
        (("--network", "shapes_network:marking", "--images", "base"), 1, "an npz file with 'images'"),
        (("--network", "shapes_network:marking", "--change", "1e-12"), 1, "Accept a larger --change"),
        (("--network", "shapes_network:marking", "--strength", "2"), 1, "Leave --strength out"),
        (("--images", "images.npz"), 2, "--images goes with --network"),
        (("--change", "0.02"), 2, "--change goes with --network"),
        (("--network", "shapes_network:marking", "--change", "0.1", "--strength", "0.1"), 2, "not with --strength"),
    ],
)
def test_what_is_wrong_is_said_in_words_of_the_desk_and_no_model_is_added(desk, arguments, code, message):
    before = sorted((desk.folder / "vault").rglob("*"))
    desk.run("add-model", "vault", "wrong", "base", "--chips", CHIPS, *arguments, code=code)
    assert message in " ".join(desk.stderr.replace("│", " ").split())
    assert "apply_fn" not in desk.stderr
    assert sorted((desk.folder / "vault").rglob("*")) == before


def test_the_owner_is_told_of_a_mark_that_traces_nobody(desk):
    said = desk.run("add-model", "vault", "faint", "base", "--chips", CHIPS, "--strength", "1e-9")
    assert "Not even an intact copy will be traced" in said
    assert "Not even" not in desk.run("add-model", "vault", "plain", "base", "--chips", CHIPS)


# Copies that do not work


def test_a_copy_that_answers_nan_is_not_written_and_its_customer_keeps_the_serial(desk):
    run = ("issue", "vault", "net", "Emmy", "--out", "nan")
    desk.run(*run, "--network", "shapes_network:idle", code=1)
    assert "outputs that differ between classes, but got the same for all" in desk.stderr
    desk.run(*run, "--network", "shapes_network:failing", code=1)
    assert "finite outputs, but got NaN or infinite ones from the copy of Emmy" in desk.stderr
    assert [path for path in (desk.folder / "nan").iterdir() if not path.name.startswith(".")] == []
    issued = desk.json(*run, "--network", "shapes_network:marking")
    assert [Path(file).name for file in issued["files"]] == ["000002-Emmy.safetensors"]
    assert (issued["licensed"], issued["written"]) == (0, 1)  # licensed by the run that failed
    found = desk.json("trace", "vault", "net", *issued["files"])["suspects"][0]
    assert [a["customer"] for a in found["accused"]] == ["Emmy"]


def test_a_taught_copy_with_a_weight_that_is_not_finite_is_refused(tmp_path):
    vault.create(tmp_path / "vault", SECRET)
    with vault.opened(tmp_path / "vault", SECRET) as opened:
        made = shapes.from_weights(base(), models.choose(base()))
        model = models.add(opened, "net", base(), num_chips=CHIPS, made=made)

        def diverges(copies, words):
            return {**copies, "head": {"kernel": copies["head"]["kernel"] * np.float32("nan")}}

        with pytest.raises(errors.NotFinite, match=r"finite weights in leaf 'head/kernel'.* in the copy of Ada"):
            issuing.issue(model, customers.resolve(opened, ["Ada"]), tmp_path / "out", teach=diverges)
    assert list((tmp_path / "out").iterdir()) == []


# A shape is the one that was committed to


def altered(file: Path) -> None:
    """One scale a hair larger: still a shape, with another digest."""
    arrays = files.read(file).leaves
    name = next(name for name in arrays if name.endswith(":rows"))
    files.write(file, arrays | {name: arrays[name] * np.float32(1.001)})


def exchanged(file: Path) -> None:
    """The shape of another model of the same leaves."""
    other = carriers.shape(files.nest({name: leaf[::-1].copy() for name, leaf in base().items() if name[0] != "h"}))
    files.write(file, other.to_arrays())


DAMAGES = {
    "missing": (Path.unlink, "no such file"),
    "altered": (altered, "another content"),
    "of another model": (exchanged, "another content"),
    "no shape": (lambda file: files.write(file, base()), "another content"),
    "no file of weights": (lambda file: file.write_text("nothing"), "another content"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_shape_that_is_not_the_one_committed_to_is_refused_at_the_desk_and_by_an_arbiter(desk, what, tmp_path):
    damage, expected = DAMAGES[what]
    here = Here(tmp_path)
    for name in ("vault", "evidence", "net"):
        shutil.copytree(desk.folder / name, tmp_path / name)
    for name in ("leaked", "base"):
        shutil.copy(desk.folder / name, tmp_path)
    digest = desk.added["shape"]["digest"]
    verify = ("evidence", "verify", "evidence/bundle.json", "leaked", "base", "--json")
    assert json.loads(here.run(*verify))["holds"]  # before the damage
    damage(shapes.path(tmp_path / "evidence", digest))
    report = json.loads(here.run(*verify, code=1))
    failing = {check["name"]: check["detail"] for check in report["checks"] if not check["holds"]}
    assert failing.keys() == {"shape"} and expected in failing["shape"] and "same folder" in failing["shape"]
    assert report["accused"] == []
    damage(shapes.path(tmp_path / "vault" / "models", digest))
    for command in (("trace", "vault", "net", "leaked"), ("issue", "vault", "net", "Linus", "--out", "net")):
        here.run(*command, code=1)
        assert expected in here.stderr and "Restore it from your backup" in here.stderr
    assert len(list((tmp_path / "net").iterdir())) == 2


def test_an_owner_who_signs_another_shape_is_noticed(desk, tmp_path):
    """The digest stands in the header, under the root: what is signed later does not lead there."""
    master = crypto.unseal(desk.folder / "vault" / "master.key", SECRET)
    other = shapes.from_weights(base(), models.choose(base())).shape
    shapes.write(tmp_path, other)
    shutil.copy(desk.folder / desk.exported["shape"], tmp_path)

    def failing(change) -> set[str]:
        bundle = json.loads((desk.folder / "evidence" / "bundle.json").read_text())["bundle"]
        change(bundle["commitment"]["header"])
        (tmp_path / "bundle").write_bytes(bundles.signed(bundle, master))
        report = verification.verify(tmp_path / "bundle", desk.folder / "leaked", desk.folder / "base")
        return {check.name for check in report.checks if not check.holds}

    assert failing(lambda header: None) == set()
    assert failing(lambda header: header.update(shape=other.digest())) == {"commitment"}
    assert failing(lambda header: header.pop("shape")) == {"commitment", "shape"}
    assert failing(lambda header: header["versions"].update(shape=None)) == {"commitment", "shape"}
    assert failing(lambda header: header["versions"].update(carrier="hadamard/1")) >= {"commitment"}


def test_arrays_that_no_scale_has_are_refused():
    """What an owner may have committed to is checked too: memory and signs are bounded."""
    arrays = carriers.shape(files.nest(base())).to_arrays()
    kernel = "a/kernel:"
    wrong = {
        "NaN": {"rows": np.full((1, 1), np.nan, np.float32)},
        "negative": {"cap": np.float32(-1)},
        "directions": {"basis": np.ones((20, 10**6), np.float32)},
        "axes": {"axes": np.array([7], np.int32)},
        "a/kernel": {"basis": np.ones(20, np.float32)},
    }
    for match, changes in wrong.items():
        with pytest.raises(errors.SmarkError, match=match):
            carriers.Shape.from_arrays(arrays | {kernel + name: array for name, array in changes.items()})


def test_nothing_in_a_vault_names_code_to_run(desk):
    """A vault that somebody else hands over must not run anything."""
    for path in (desk.folder / "vault").rglob("*"):
        assert not path.is_file() or b"shapes_network" not in path.read_bytes(), path


# Models of before


def test_models_with_and_without_a_shape_live_in_one_vault(tmp_path):
    """A vault of 0.1.0 keeps its white model, and a new one beside it has a shape."""
    with zipfile.ZipFile(Path(__file__).parent / "data" / "vault-2.zip") as archive:
        archive.extractall(tmp_path)
    with vault.opened(tmp_path / "vault", "correct horse battery staple") as opened:
        old = models.get(opened, "net")
        assert (old.settings.shape, old.shape, old.mark.shape) == (None, None, None)
        assert old.settings.versions == versions.WHITE and old.mark.carrier.length is None
        made = shapes.from_weights(base(), models.choose(base()))
        new = models.add(opened, "new", base(), num_chips=CHIPS, made=made)
        assert new.settings.versions == versions.NEW and new.mark.carrier.length is not None
        for model in (old, models.get(opened, "new")):
            ada = customers.resolve(opened, ["Ada"])
            (copy,) = issuing.issue(model, ada, tmp_path / f"{model.name}-copies").files
            found = verdicts.trace(model, [copy])
            assert [a.customer for a in found.suspects[0].accused] == ["Ada"]
            exported = evidence.export(opened, found.number)
            assert (exported.shape is None) == (model is old)
        headers = [json.loads(row.document)["header"] for row in store.commitments(opened.connection)]
    assert [header.get("shape") for header in headers if header["model"] == "net"] == [None] * (len(headers) - 1)
    assert headers[-1]["shape"] == made.shape.digest()


def test_a_shaped_model_has_one_reading(desk):
    desk.run("trace", "vault", "net", "leaked", "--rectify", code=1)
    assert "leave --rectify out" in desk.stderr


# Plans


def test_a_plan_says_what_the_models_own_strength_can_do(desk):
    found = desk.json("plan", "vault", "net", "--customers", 1000, "--coalition", 2)
    (row,) = (row for row in found["rows"] if row["num_chips"] == CHIPS)
    assert row["strength"] == pytest.approx(desk.added["strength"])
    # T of the traced copy, whose weights moved by 2 % of their RMS, lies between an intact one's and an int4 copy's.
    traced = desk.json("trace", "vault", "net", "net/000000-Ada.safetensors", "leaked")["suspects"]
    intact, noisy = (suspect["accused"][0]["statistic"] for suspect in traced)
    # The reading leaves out a few odd weights of 4,260: over vaults' keys, an intact copy's T has mean 7.85 and
    # standard deviation 0.13 where the plan says 8.
    assert row["statistic"]["intact"] == pytest.approx(intact, rel=0.15)
    assert row["statistic"]["int4"] < noisy < intact
    doubled = desk.json("plan", "vault", "net", "--change", 2 * desk.added["cost"]["mean"]["change"])
    assert doubled["rows"][0]["strength"] == pytest.approx(2 * desk.added["strength"])
    assert doubled["rows"][0]["statistic"]["int4"] > row["statistic"]["int4"]


def test_a_plan_fits_80_columns_and_says_which_number_of_chips_to_take(desk):
    printed = desk.run("plan", "vault", "net", "--customers", 100, environment={"COLUMNS": "80"})
    assert max(map(len, printed.splitlines()[:8])) <= 80
    assert "are enough for 1 colluding" in printed or "chips are enough" in printed
    desk.run("plan", "vault", "weights", "--change", 0.02, code=1)
    assert "add it under another name with --network" in desk.stderr.lower()
    assert desk.json("plan", "vault", "weights", "--coalition", 10**6)["num_chips"] is None
