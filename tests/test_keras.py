"""Files of Keras against what Keras computed (tests/make_fixtures/keras_models.py), and HDF5 against h5py."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from smark_jax import errors, files
from smark_jax.files import _hdf5

DATA = Path(__file__).parent / "data"
NAMES = ("convolutional", "attentive")
NO_WEIGHTS = ("images", "logits")  # what an archive of numbers holds besides


def known(name):
    """The weights of a fixture by the names that Keras shows."""
    with np.load(DATA / f"keras_{name}.npz") as archive:
        return {key: archive[key] for key in archive.files if key not in NO_WEIGHTS}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[name], strict=True)


@pytest.mark.parametrize("name", NAMES)
def test_leaves_have_the_names_and_numbers_that_keras_shows(name, tmp_path):
    path = DATA / f"keras_{name}.keras"
    found = files.read(path)
    assert found.format == "keras"
    same(found.leaves, known(name))
    weights = tmp_path / "weights"
    weights.write_bytes(zipfile.ZipFile(path).read("model.weights.h5"))  # as save_weights writes it
    alone = files.read(weights)
    assert alone.format == "hdf5"
    same(alone.leaves, known(name))


def test_the_older_layout_has_the_same_leaves():
    same(files.read(DATA / "keras_older.h5").leaves, known("convolutional"))


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
    with zipfile.ZipFile(DATA / "keras_attentive.keras") as archive:
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
    path, expected = DATA / "keras_int8.keras", known("int8")
    leaves = files.read(path).leaves
    assert leaves.keys() == expected.keys()
    kernel, rounded = expected.pop("head/kernel"), leaves.pop("head/kernel")
    same(leaves, expected)
    step = np.abs(kernel).max(0) / 127
    assert rounded.dtype == np.float32 and 0 < (np.abs(rounded - kernel) / step).max() <= 0.5 + 1e-3
    with pytest.raises(errors.SmarkError, match="other numbers in leaf 'head/kernel', which is quantised"):
        files.write(tmp_path / "copy", {**leaves, "head/kernel": rounded * 2}, like=path)


@pytest.mark.parametrize("file", ["keras_convolutional.keras", "keras_older.h5"])
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
    content = zipfile.ZipFile(DATA / "keras_int8.keras").read("model.weights.h5")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(1500):
        broken, place = bytearray(content), int(rng.integers(len(content)))
        piece = (b"\xff" * 8, bytes(8), b"\xff\xff\xff\x7f", rng.bytes(2))[int(rng.integers(4))]
        broken[place : place + len(piece)] = piece
        if rng.integers(8) == 0:
            del broken[place:]
        try:
            _hdf5.File(bytes(broken), 2**20).items()
        except errors.Unreadable:
            refused += 1
    assert refused > 300
