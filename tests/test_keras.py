"""Files of Keras against what Keras computed (tests/make_fixtures/keras_models.py), and HDF5 against h5py."""

import io
import json
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from smark_jax import carriers, errors, files
from smark_jax.files import _hdf5

DATA = Path(__file__).parent / "data/keras"
NAMES = ("convolutional", "attentive")
NO_WEIGHTS = ("images", "logits")  # what an archive of numbers holds besides


def known(name):
    """The weights of a fixture by the names that Keras shows."""
    with np.load(DATA / f"{name}.npz") as archive:
        return {key: archive[key] for key in archive.files if key not in NO_WEIGHTS}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name], strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_leaves_have_the_names_and_numbers_that_keras_shows(name, tmp_path):
    path = DATA / f"{name}.keras"
    found = files.read(path)
    assert found.format == "keras"
    same(found.leaves, known(name))
    weights = tmp_path / "weights"
    weights.write_bytes(zipfile.ZipFile(path).read("model.weights.h5"))  # as save_weights writes it
    alone = files.read(weights)
    assert alone.format == "hdf5"
    same(alone.leaves, known(name))


def test_the_older_layout_has_the_same_leaves():
    same(files.read(DATA / "older.h5").leaves, known("convolutional"))


def test_names_of_the_older_layout_leave_out_what_repeats(tmp_path):
    h5py = pytest.importorskip("h5py")
    names = {
        "conv/conv/kernel:0": "conv/kernel",
        "conv_1/conv_1_1/bias:0": "conv_1/bias",
        "dense/model/dense/kernel": "dense/kernel",
        "inner/inner/conv/kernel": "inner/conv/kernel",
        "inner_1/conv/kernel:0": "inner_1/conv/kernel",
    }
    with h5py.File(tmp_path / "file", "w") as root:
        for number, path in enumerate(names):
            root[f"model_weights/{path}"] = np.full(3, number)
        root["optimizer_weights/adam/conv/kernel_momentum:0"] = np.zeros(3)
    leaves = files.read(tmp_path / "file").leaves
    assert {name: leaf[0] for name, leaf in leaves.items()} == {name: i for i, name in enumerate(names.values())}


def test_compressed_members_are_read_and_written_where_nothing_changes(tmp_path):
    """As a zip tool packs a model again: nothing can be written in place, and a copy that changes nothing can."""
    with zipfile.ZipFile(DATA / "attentive.keras") as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    path = tmp_path / "packed"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info, content in members.items():
            archive.writestr(info.filename, content)
    leaves = files.read(path).leaves
    same(leaves, known("attentive"))
    files.write(tmp_path / "copy", leaves, like=path)
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()
    with pytest.raises(errors.SmarkError, match=r"other numbers in leaf 'logits/bias', which is compressed"):
        files.write(tmp_path / "copy", {**leaves, "logits/bias": leaves["logits/bias"] + 1}, like=path)


def test_an_int8_kernel_is_read_as_what_its_numbers_stand_for_and_is_not_written(tmp_path):
    path, expected = DATA / "int8.keras", known("int8")
    leaves = files.read(path).leaves
    assert leaves.keys() == expected.keys()
    kernel, rounded = expected.pop("head/kernel"), leaves.pop("head/kernel")
    same(leaves, expected)
    step = np.abs(kernel).max(0) / 127
    assert rounded.dtype == np.float32 and 0 < (np.abs(rounded - kernel) / step).max() <= 0.5 + 1e-3
    with pytest.raises(errors.SmarkError, match="other numbers in leaf 'head/kernel', which is quantised"):
        files.write(tmp_path / "copy", {**leaves, "head/kernel": rounded * 2}, like=path)


@pytest.mark.parametrize("file", ["convolutional.keras", "older.h5"])
def test_a_copy_has_its_bases_bytes_but_for_what_changed(file, tmp_path):
    base = DATA / file
    leaves = files.read(base).leaves
    kernel = leaves["stem/kernel"]
    changed = {**leaves, "stem/kernel": np.random.default_rng(0).normal(size=kernel.shape).astype(np.float32)}
    files.write(tmp_path / "copy", changed, like=base)
    same(files.read(tmp_path / "copy").leaves, changed)
    before, after = (np.frombuffer(path.read_bytes(), np.uint8) for path in (base, tmp_path / "copy"))
    (differ,) = np.nonzero(before != after)
    inside = before.tobytes().find(kernel.tobytes())
    within = (differ >= inside) & (differ < inside + kernel.nbytes)
    assert within.sum() > kernel.nbytes / 2 and (~within).sum() <= (8 if file.endswith(".keras") else 0)  # two CRCs
    if file.endswith(".keras"):
        assert zipfile.ZipFile(tmp_path / "copy").testzip() is None


def hdf5(**settings):
    """A file of many kinds of objects, as h5py writes it."""
    h5py = pytest.importorskip("h5py")
    file, rng = io.BytesIO(), np.random.default_rng(0)
    with h5py.File(file, "w", **settings) as root:
        root.attrs.update(text="naïve", bytes=np.bytes_(b"abc"), number=3, several=["a", "b"])
        group = root.create_group("many/of them")
        for number in range(100):
            group[f"{number}"] = rng.normal(size=(3, number % 4)).astype("f4")
        other = root.create_group("other")
        for dtype in ("<f2", ">f4", "<f8", "<i8", ">u2", "i1", "?"):
            other[f"as {dtype}"] = rng.integers(0, 2, (2, 3)).astype(dtype)
        packed = {"compression": "gzip", "shuffle": True, "fletcher32": True}
        other.create_dataset("packed", data=rng.normal(size=(20, 7, 5)), chunks=(6, 7, 2), **packed)
        other.create_dataset("chunked", data=rng.normal(size=(20, 9)).astype("f4"), chunks=(7, 4))
        other["scalar"] = np.float32(2.5)
        other["alias"] = root["many/of them/7"]
        for name, foreign in {"text": "abc", "complex": np.ones(2, complex), "void": h5py.Empty("f4")}.items():
            root[name] = foreign
        root.create_dataset("unwritten", shape=(3,), dtype="f4")
    return file.getvalue()


def test_hdf5_is_read_as_h5py_reads_it(tmp_path):
    h5py = pytest.importorskip("h5py")
    content = hdf5()
    (tmp_path / "file").write_bytes(content)
    found = files.read(tmp_path / "file", strict=False)
    assert found.foreign == ("complex", "text", "unwritten", "void")
    names = {"other/alias"}  # h5py visits each dataset once, under one of its names
    with h5py.File(io.BytesIO(content)) as root:
        root.visititems(lambda name, item: names.add(name) if isinstance(item, h5py.Dataset) else None)
        assert found.leaves.keys() == names - set(found.foreign)
        for name, leaf in found.leaves.items():
            assert leaf.dtype.isnative
            np.testing.assert_array_equal(leaf, root[name][()])
    file = _hdf5.File(content, 2**20)
    root = file.items()[""]
    texts = {name: file.text(root, name) for name in ("text", "bytes", "number", "several", "none")}
    assert texts == {"text": "naïve", "bytes": "abc", "number": None, "several": None, "none": None}


def test_newer_hdf5_and_links_to_elsewhere_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "file"
    path.write_bytes(hdf5(libver="latest"))
    with pytest.raises(errors.Unreadable, match="in a newer form"):
        files.read(path)
    for link, said in ((h5py.SoftLink("/a"), "'b' is a link"), (h5py.ExternalLink("x", "/a"), "links to other files")):
        with h5py.File(path, "w") as root:
            root["a"], root["b"] = np.ones(3), link
        with pytest.raises(errors.Unreadable, match=said):
            files.read(path)


def test_groups_in_a_circle_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "file", "w") as root:
        root["a/b"] = np.ones(3)
        root["a/up"] = root["a"]
    with pytest.raises(errors.Unreadable, match="too deep"):
        files.read(tmp_path / "file")


def test_every_kind_of_damage_to_hdf5_is_read_or_refused(tmp_path):
    """Cuts, flipped bits and edges of ranges, where they hurt most: in the bytes that are no numbers of weights."""
    content = zipfile.ZipFile(DATA / "int8.keras").read("model.weights.h5")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(1000):
        broken, place = bytearray(content), int(rng.integers(len(content)))
        piece = (b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f", rng.bytes(2))[int(rng.integers(4))]
        broken[place : place + len(piece)] = piece
        if rng.integers(8) == 0:
            del broken[place:]
        try:
            _hdf5.File(bytes(broken), 2**20).items()
        except errors.Unreadable:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    "file",
    ["convolutional.keras", "attentive.keras", "older.h5"],
    ids=["newer", "attentive", "older"],
)
def test_a_network_gives_the_logits_of_keras(file):
    """Before the last softmax, whether a layer's activation or a layer of its own."""
    name = "attentive" if "attentive" in file else "convolutional"
    params, apply_fn = files.network(DATA / file)
    same(params, known(name))
    with np.load(DATA / f"{name}.npz") as archive:
        images, logits = archive["images"], archive["logits"]
    np.testing.assert_allclose(apply_fn(params, images), logits, atol=2e-5)
    statistics = {name for name in params if "moving" in name}
    assert params.keys() - {leaf.path for leaf in carriers.select(params).leaves} >= statistics
    zeros = {name: np.zeros_like(leaf) for name, leaf in params.items()}
    assert np.abs(np.asarray(apply_fn({**params, **zeros}, images)) - logits).max() > 0.1
    with pytest.raises(errors.SmarkError, match=r"images of shape \[any .*\], but got shape \[3, 1, 1, 1\]"):
        apply_fn(params, images[:, :1, :1, :1])


def model_of(layers, kind="Sequential", **config):
    return {"class_name": kind, "config": {"layers": layers, "name": "m", **config}}


def layer(kind, **config):
    return {"class_name": kind, "config": {"name": kind.lower(), **config}}


def called(kind, taken, *, older=False, **config):
    """A layer of a functional model that takes these results."""
    if older:
        return {**layer(kind, **config), "name": config["name"], "inbound_nodes": [[[*one, {}] for one in taken]]}
    results = [{"class_name": "__keras_tensor__", "config": {"keras_history": list(one)}} for one in taken]
    call = {"args": results if len(results) == 1 else [results], "kwargs": {}}
    return {**layer(kind, **config), "module": "keras.layers", "name": config["name"], "inbound_nodes": [call]}


def computed(tmp_path, model, images):
    """What the network of a configuration without weights makes of images; its file has the weights of a fixture."""
    with zipfile.ZipFile(DATA / "int8.keras") as archive:
        weights = archive.read("model.weights.h5")
    with zipfile.ZipFile(tmp_path / "network", "w") as archive:
        archive.writestr("config.json", json.dumps(model))
        archive.writestr("model.weights.h5", weights)
    params, apply_fn = files.network(tmp_path / "network")
    return np.asarray(apply_fn(params, np.asarray(images, np.float32)))


ROW = [[-4.0, -1.0, 0.0, 1.0, 8.0]]
EXACT = {
    "ReLU to six, leaking": (
        "ReLU",
        {"max_value": 6.0, "negative_slope": 0.5, "threshold": 1.0},
        [-2.5, -1, -0.5, 1, 6],
    ),
    "ReLU": ("ReLU", {"max_value": None, "negative_slope": 0.0, "threshold": 0.0}, [0, 0, 0, 1, 8]),
    "ReLU, leaking": ("ReLU", {"negative_slope": 0.5}, [-2, -0.5, 0, 1, 8]),
    "LeakyReLU of Keras 2": ("LeakyReLU", {"alpha": 0.25}, [-1, -0.25, 0, 1, 8]),
    "hard_sigmoid of Keras 2": ("Activation", {"activation": "hard_sigmoid"}, [0, 0.3, 0.5, 0.7, 1]),
    "Dropout": ("Dropout", {"rate": 0.5}, ROW[0]),
    "Rescaling": ("Rescaling", {"scale": 2.0, "offset": 1.0}, [-7, -1, 1, 3, 17]),
    "Normalization": ("Normalization", {"axis": -1, "mean": [1] * 5, "variance": [4] * 5}, [-2.5, -1, -0.5, 0, 3.5]),
}


@pytest.mark.parametrize("case", EXACT)
def test_layers_without_weights_are_exact(case, tmp_path):
    kind, config, expected = EXACT[case]
    np.testing.assert_allclose(computed(tmp_path, model_of([layer(kind, **config)]), ROW)[0], expected, atol=1e-6)


@pytest.mark.parametrize("older", [False, True])
def test_calls_are_put_in_order_whatever_the_order_of_layers(older, tmp_path):
    layers = [
        called("Subtract", [("b", 0, 0), ("a", 0, 0)], older=older, name="out"),
        called("Rescaling", [("a", 0, 0)], older=older, name="b", scale=3.0, offset=0.0),
        called("Rescaling", [("in", 0, 0)], older=older, name="a", scale=2.0, offset=1.0),
        called("Lambda", [("a", 0, 0)], older=older, name="not needed"),
        {**layer("InputLayer", batch_shape=[None, 5]), "name": "in", "inbound_nodes": []},
    ]
    layers[-1]["config"]["name"] = "in"
    model = model_of(layers, "Functional", input_layers=[["in", 0, 0]], output_layers=["out", 0, 0])
    np.testing.assert_allclose(computed(tmp_path, model, ROW), 4 * np.array(ROW) + 2, rtol=1e-6)


def test_what_is_no_network_or_runs_code_is_refused_by_name(tmp_path):
    with pytest.raises(errors.SmarkError, match="'Lambda' in node 'lambda #0', and 'Mine'"):
        computed(tmp_path, model_of([layer("Lambda", function="os.abort()"), layer("Mine")]), ROW)
    circle = [called("Relu", [("b", 0, 0)], name="a"), called("Relu", [("a", 0, 0)], name="b"), layer("InputLayer")]
    circle = model_of(circle, "Functional", input_layers=["inputlayer", 0, 0], output_layers=["a", 0, 0])
    masked = called("ReLU", [("in", 0, 0)], name="a")
    masked["inbound_nodes"][0]["kwargs"] = {"mask": None, "use_causal_mask": True}
    masked = model_of([masked], "Functional", input_layers=["in", 0, 0], output_layers=["a", 0, 0])
    two = model_of([], "Functional", input_layers=[["a", 0, 0], ["b", 0, 0]], output_layers=["a", 0, 0])
    for model, said in (
        (circle, "takes its own result"),
        (masked, "is called with 'use_causal_mask'"),
        (two, "takes 2 inputs"),
        ({}, "'config'"),
        ([], "not as Keras"),
    ):
        with pytest.raises(errors.Unreadable, match=said):
            computed(tmp_path, model, ROW)
    many = model_of([])
    for _ in range(14):  # each model holds the one before twice
        many = model_of([many, {**many, "config": {**many["config"], "name": "again"}}])
    with pytest.raises(errors.Unreadable, match="more than 20,000 layers"):
        computed(tmp_path, many, ROW)
    (tmp_path / "weights").write_bytes(zipfile.ZipFile(DATA / "int8.keras").read("model.weights.h5"))
    with pytest.raises(errors.Unreadable, match="it holds the weights of Keras, and no network"):
        files.network(tmp_path / "weights")


def test_a_copy_loads_in_keras_and_computes_what_its_network_does(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    base = DATA / "convolutional.keras"
    params, apply_fn = files.network(base)
    rng = np.random.default_rng(1)
    changed = {name: leaf * rng.uniform(0.9, 1.1, leaf.shape).astype("f4") for name, leaf in params.items()}
    files.write(tmp_path / "copy.keras", changed, like=base)
    images = np.load(DATA / "convolutional.npz")["images"]
    with jax.numpy_rank_promotion("allow"):  # which Keras relies on
        model = keras.models.load_model(tmp_path / "copy.keras", compile=False)
        chances = np.asarray(model(images, training=False))
    np.testing.assert_allclose(chances, jax.nn.softmax(apply_fn(changed, images)), atol=1e-5)
    assert np.abs(chances - jax.nn.softmax(apply_fn(params, images))).max() > 0.01
