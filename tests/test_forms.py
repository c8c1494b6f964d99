"""Files in the form of another: byte for byte the same but for numbers of leaves, whatever the format."""

import hashlib
import io
import json
import os
import zipfile
import zlib

import flax.serialization
import network_files
import numpy as np
import pytest
import safetensors.numpy

from smark_jax import errors, files
from smark_jax.files import _places, _sources, _zip, formats
from smark_jax.files._places import Place


def some(shape, seed=0, dtype: type = np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


LEAVES = {
    "conv/bias": some(4, 1),
    "conv/kernel": some((3, 3, 2, 4), 2),
    "dense/kernel": some((8, 5), 3, np.float16),
    "empty": np.zeros((0, 2), np.float32),
    "step": np.array(7, np.int64),
}
OTHERS = LEAVES | {"conv/kernel": some((3, 3, 2, 4), 4), "dense/kernel": some((8, 5), 5, np.float16)}


def npz(leaves, save=np.savez):
    file = io.BytesIO()
    save(file, **leaves)
    return file.getvalue()


def streamed(leaves):
    """A zip written to what cannot seek: checksums stand behind the members."""

    class Pipe(io.RawIOBase):
        content = b""

        def writable(self):
            return True

        def write(self, data):
            self.content += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w") as archive:
        for name, leaf in leaves.items():
            file = io.BytesIO()
            np.save(file, leaf)
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                member.write(file.getvalue())
    return pipe.content


def fortran(leaves):
    return {name: np.array(leaf, order="F") for name, leaf in leaves.items()}


FORMS = {
    "safetensors": (lambda leaves: safetensors.numpy.save(leaves, {"by": "us"}), safetensors.numpy.load),
    "msgpack": (
        lambda leaves: flax.serialization.msgpack_serialize(files.nest(leaves)),
        lambda content: files.flatten(flax.serialization.msgpack_restore(content)),
    ),
    "npz": (npz, lambda content: dict(np.load(io.BytesIO(content)))),
    "npz in Fortran's order": (lambda leaves: npz(fortran(leaves)), lambda content: dict(np.load(io.BytesIO(content)))),
    "npz, big-endian": (
        lambda leaves: npz({name: leaf.astype(leaf.dtype.newbyteorder(">")) for name, leaf in leaves.items()}),
        lambda content: {
            name: leaf.astype(leaf.dtype.newbyteorder("=")) for name, leaf in np.load(io.BytesIO(content)).items()
        },
    ),
    "npz with checksums behind": (streamed, lambda content: dict(np.load(io.BytesIO(content)))),
}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_is_what_the_formats_own_library_writes(tmp_path, form):
    write, read = FORMS[form]
    base, copy = tmp_path / "base", tmp_path / "copy"
    base.write_bytes(write(LEAVES))
    digest = files.write(copy, OTHERS, like=base)
    content = copy.read_bytes()
    assert content == write(OTHERS)
    assert digest == hashlib.sha256(content).hexdigest() == files.read(copy).sha256
    same(read(content), OTHERS)
    files.write(copy, LEAVES, like=base)
    assert copy.read_bytes() == base.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["base", "copy"]


def test_a_leaf_without_a_place_is_read_and_may_not_change(tmp_path):
    base = tmp_path / "base"
    base.write_bytes(npz(LEAVES, np.savez_compressed))
    files.write(tmp_path / "copy", LEAVES, like=base)
    assert (tmp_path / "copy").read_bytes() == base.read_bytes()
    with pytest.raises(errors.SmarkError, match=r"other numbers in leaf 'conv/kernel', which is compressed"):
        files.write(tmp_path / "copy", OTHERS, like=base)
    wider = LEAVES | {"conv/kernel": LEAVES["conv/kernel"].astype(np.float64)}
    with pytest.raises(errors.SmarkError, match="write: expected leaves as in"):
        files.write(tmp_path / "copy", wider, like=base)


def test_every_format_knows_the_places_of_the_leaves_that_it_reads():
    for form, (write, _) in FORMS.items():
        source = _sources.Source(write(LEAVES))
        format = formats.of(source.data)
        places = format.places(source)
        assert places.keys() == LEAVES.keys(), form
        for name, place in places.items():
            assert isinstance(place, Place)
            found = np.ndarray(place.shape, place.dtype, source.data, place.start, place.strides)
            np.testing.assert_array_equal(found, LEAVES[name])


def test_what_a_network_is_given_is_what_its_file_is_written_with(tmp_path):
    """A network's weights are fewer than its file's leaves, which hold numbers of nodes too."""
    counted = network_files.exported(
        [("add.Tensor", ["x", "w"], "y")], {"w": some(3)}, {"steps": np.array([7])}, ["s0", 3], "y"
    )
    for content in (network_files.classifier().onnx(), counted):
        (tmp_path / "base").write_bytes(content)
        params = files.network(tmp_path / "base").params
        doubled = {name: 2 * leaf for name, leaf in params.items() if not name.startswith("buffers/")}
        files.write(tmp_path / "copy", doubled, like=tmp_path / "base")
        same(files.network(tmp_path / "copy").params, params | doubled)
        assert len(params) < len(files.read(tmp_path / "base").leaves) or len(doubled) < len(params)


# --- places


def test_pieces_are_what_assigning_to_views_of_the_whole_file_gives():
    """The reference writes into a copy of all bytes."""
    data, rng = np.random.default_rng(0).bytes(4000), np.random.default_rng(1)
    f4, f2, i8 = np.dtype("<f4"), np.dtype("<f2"), np.dtype("<i8")
    places = {
        "plain": _places.in_order(16, f4, (3, 5)),
        "transposed": Place("", 100, f4, (5, 3), (4, 20)),
        "permuted": Place("", 203, f4, (2, 3, 4), (4, 32, 8)),  # at an odd byte
        "every other": Place("", 400, f2, (10,), (4,)),
        "between those": Place("", 402, f2, (10,), (4,)),
        "big-endian": Place("", 600, np.dtype(">f4"), (4,), (4,)),
        "backwards": Place("", 736, i8, (5,), (-8,)),
        "scalar": Place("", 900, f4, (), ()),
        "nothing": Place("", 5000, f4, (0, 3), (12, 4)),
    }
    leaves = {
        name: (100 * rng.standard_normal(place.shape)).astype(place.dtype.newbyteorder("="))
        for name, place in places.items()
    }
    whole = bytearray(data)
    for name, place in places.items():
        if place.shape[:1] != (0,):
            np.ndarray(place.shape, place.dtype, whole, place.start, place.strides)[...] = leaves[name]
    pieces = _places.pieces(data, leaves, places)
    assert b"".join(_places.spliced(data, pieces)) == whole
    for start, end in np.sort(rng.integers(0, 1100, (200, 2))):
        assert (
            b"".join(_places.spliced(data, pieces, min(start, end), max(start, end)))
            == whole[min(start, end) : max(start, end)]
        )


def test_leaves_that_share_bytes_are_written_once_and_must_agree():
    f4, shared = np.dtype("<f4"), some((4, 3))
    places = {
        "fused": _places.in_order(8, f4, (4, 3)),
        "tied": _places.in_order(8, f4, (4, 3)),
        "part": _places.in_order(8 + 12, f4, (2, 3)),
        "transposed": Place("", 8, f4, (3, 4), (4, 12)),
    }
    leaves = {"fused": shared, "tied": shared, "part": shared[1:3], "transposed": shared.T}
    (piece,) = _places.pieces(bytes(100), leaves, places)
    assert (piece.start, bytes(piece.content)) == (8, shared.tobytes())
    for name in leaves:
        with pytest.raises(errors.SmarkError, match="share bytes"):
            _places.pieces(bytes(100), leaves | {name: leaves[name] + 1}, places)


def test_checksums_are_written_at_all_their_places():
    content = {"a": b"x" * 50, "b": b"y" * 60, "packed": b"z" * 70}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if name == "packed" else zipfile.ZIP_STORED)
    data = file.getvalue()
    assert _zip.spans(data).keys() == {"a", "b"}
    start, end = _zip.spans(data)["b"]
    assert data[start:end] == content["b"]
    pieces = _places.mended(data, [_places.Piece(start + 5, b"new")], _zip.checksums(data))
    mended = b"".join(_places.spliced(data, pieces))
    found = zipfile.ZipFile(io.BytesIO(mended))
    assert found.testzip() is None and found.read("b") == b"y" * 5 + b"new" + b"y" * 52
    assert found.getinfo("b").CRC == zlib.crc32(found.read("b"))
    assert found.read("a") == content["a"] and found.read("packed") == content["packed"]
    assert mended[found.getinfo("b").header_offset + 14 :][:4] == zlib.crc32(found.read("b")).to_bytes(4, "little")


# --- folders


def sharded(folder, leaves=LEAVES, shards=2, **index):
    """A model as Hugging Face's libraries cut it into files."""
    folder.mkdir()
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files_of = {name: names[i % shards] for i, name in enumerate(leaves)}
    for file in names:
        safetensors.numpy.save_file({n: leaf for n, leaf in leaves.items() if files_of[n] == file}, folder / file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": files_of} | index)
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text('{"model_type": "vit"}')
    return folder


def test_a_sharded_folder_is_read_and_gives_sharded_folders(tmp_path):
    base = sharded(tmp_path / "base")
    (base / "pytorch_model.bin").write_bytes(b"the same weights, unmarked")
    (base / ".git").mkdir()
    found = files.read(base)
    same(found.leaves, LEAVES)
    assert (found.format, found.sha256) == ("shards", files.read(base / "model.safetensors.index.json").sha256)
    digest = files.write(tmp_path / "copy", OTHERS, like=base)
    expected = sharded(tmp_path / "expected", OTHERS)
    assert sorted(os.listdir(tmp_path / "copy")) == sorted(os.listdir(expected))  # no other file of weights
    for name in os.listdir(expected):
        assert (tmp_path / "copy" / name).read_bytes() == (expected / name).read_bytes()
    again = files.read(tmp_path / "copy")
    same(again.leaves, OTHERS)
    lines = [hashlib.sha256((expected / "model.safetensors.index.json").read_bytes()).hexdigest()]
    for name in sorted(os.listdir(expected)):
        if name.endswith(".safetensors"):
            lines.append(f"{hashlib.sha256((expected / name).read_bytes()).hexdigest()}  {name}")
    assert digest == again.sha256 == hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    with pytest.raises(OSError):
        files.write(tmp_path / "copy", LEAVES, like=base)  # a folder is never merged with another
    same(files.read(tmp_path / "copy").leaves, OTHERS)
    assert sorted(os.listdir(tmp_path)) == ["base", "copy", "expected"]
    part = files.read(base / "model-00002-of-00002.safetensors").leaves
    same(part, {name: LEAVES[name] for name in ("conv/kernel", "empty")})


def test_a_folder_of_one_file_keeps_its_configuration(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    safetensors.numpy.save_file(LEAVES, base / "model.safetensors")
    for name in ("config.json", "preprocessor_config.json", "README.md", "optimizer.pt", "training_args.bin"):
        (base / name).write_text("text")
    same(files.read(base).leaves, LEAVES)
    files.write(tmp_path / "copy", OTHERS, like=base)
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(os.listdir(tmp_path / "copy")) == names
    same(files.read(tmp_path / "copy").leaves, OTHERS)
    same(safetensors.numpy.load_file(tmp_path / "copy" / "model.safetensors"), OTHERS)


def test_a_folder_whose_weights_cannot_be_told_is_refused(tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        files.write(tmp_path / name, LEAVES)
    with pytest.raises(errors.Unreadable, match=r"several files of weights \('a.safetensors', 'b.safetensors'\)"):
        files.read(tmp_path)
    files.write(tmp_path / "model.safetensors", OTHERS)
    same(files.read(tmp_path).leaves, OTHERS)


HOSTILE = {
    "up": ({"a": "../w.safetensors"}, "not beside it"),
    "absolute": ({"a": "/etc/passwd"}, "not beside it"),
    "nothing": ({"a": ""}, "not beside it"),
    "the folder": ({"a": "."}, "not beside it"),
    "missing": ({"a": "none.safetensors"}, "cannot be opened"),
    "unprintable": ({"a": "\x1b[2J"}, "not beside it"),
    "a link out": ({"a": "link.safetensors"}, "is a link to another folder"),
    "a folder": ({"a": "folder"}, "is not a regular file"),
    "a pipe": ({"a": "pipe"}, "is not a regular file"),
    "itself": ({"a": "model.safetensors.index.json"}, "neither safetensors nor PyTorch"),
    "of another file": ({"b": "w.safetensors"}, "'b' is not in its file 'w.safetensors'"),
    "in two": ({"a": "w.safetensors", "b": "w2.safetensors"}, "'a' occurs in two"),
    "no text": ({"a": 7}, "does not name a file"),
    "no map": (["a"], "does not name a file"),
    "no leaves": ({}, "no arrays"),
    "a long name": ({"a": "x" * 5000}, "not beside it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_index_is_refused_in_one_line(tmp_path, case):
    folder = tmp_path / "folder"
    (folder / "folder").mkdir(parents=True)
    os.mkfifo(folder / "pipe")
    files.write(tmp_path / "w.safetensors", {"a": some(3)})
    (folder / "link.safetensors").symlink_to(tmp_path / "w.safetensors")
    for name, leaves in (("w", {"a": some(3)}), ("w2", {"a": some(3), "b": some(2)})):
        files.write(folder / f"{name}.safetensors", leaves)
    map_of_leaves, words = HOSTILE[case]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": map_of_leaves}))
    with pytest.raises(errors.Unreadable) as caught:
        files.read(folder)
    assert words in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_files_count_together_and_links_may_lead_to_where_the_main_file_lies(tmp_path):
    """The cache of Hugging Face is a folder of links to files in another folder."""
    blobs, snapshot = sharded(tmp_path / "blobs"), tmp_path / "snapshot"
    snapshot.mkdir()
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    same(files.read(snapshot).leaves, LEAVES)
    largest = max(path.stat().st_size for path in blobs.iterdir())
    with pytest.raises(errors.Unreadable, match=r"its file 'model-00002-of-00002\.safetensors' is larger than"):
        files.read(blobs, max_bytes=largest + 400)
    alone = _sources.Source((blobs / "model.safetensors.index.json").read_bytes())
    with pytest.raises(errors.Unreadable, match="stands alone"):
        formats.of(alone.data).read(alone, 2**20)


def test_an_index_hides_no_leaf(tmp_path):
    base = sharded(tmp_path / "base", weight_map={"conv/bias": "model-00001-of-00002.safetensors"})
    same(files.read(base).leaves, {name: LEAVES[name] for name in ("conv/bias", "dense/kernel", "step")})
