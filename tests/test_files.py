"""Weights files: read as other libraries write them, refused when malformed, brought into the base's layout."""

import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy
import torch_layout
from hypothesis import given, settings
from hypothesis import strategies as st

from smark_jax import errors, files, models
from smark_jax.files import _places, formats

BF16 = np.dtype(ml_dtypes.bfloat16)
PLAIN = [np.dtype(name) for name in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]


def some(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape, name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


@st.composite
def leaves(draw, dtypes=tuple(PLAIN)):
    names = st.text("abc_.", min_size=1, max_size=6)
    found = {}
    for name in draw(st.lists(names, min_size=1, max_size=5, unique=True)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = draw(st.sampled_from(dtypes))
        size = int(np.prod(shape)) * dtype.itemsize
        raw = draw(st.binary(min_size=size, max_size=size))
        raw = bytes(byte & 1 for byte in raw) if dtype.kind == "b" else raw
        found[name] = np.frombuffer(raw, dtype).reshape(shape)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@settings(deadline=None, max_examples=60)
@given(tree=leaves())
def test_what_other_libraries_write_is_read_bit_for_bit(folder, tree):
    path = folder / "any"
    tree_of_steps = {"a": {"b": tree}}
    nested = {f"a/b/{name}": leaf for name, leaf in tree.items()}

    path.write_bytes(safetensors.numpy.save(tree))
    same(files.read(path).leaves, tree)
    path.write_bytes(flax.serialization.msgpack_serialize(tree_of_steps))
    same(files.read(path).leaves, nested)
    for save in (np.savez, np.savez_compressed):
        with path.open("wb") as file:
            save(file, **{name.replace("file", "f"): leaf for name, leaf in tree.items()})
        same(files.read(path).leaves, tree)


@settings(deadline=None, max_examples=60)
@given(tree=leaves())
def test_what_is_written_is_read_bit_for_bit_by_the_library_and_by_us(folder, tree):
    path = folder / "ours"
    digest = files.write(path, tree)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    same(safetensors.numpy.load_file(path), tree)
    found = files.read(path)
    same(found.leaves, tree)
    assert (found.format, found.sha256) == ("safetensors", digest)


@pytest.mark.parametrize("dtype", [BF16, np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)])
def test_narrow_dtypes_stay_as_they_are(tmp_path, dtype):
    tree = {"dense": {"kernel": some((4, 5)).astype(dtype), "bias": some(5)}}
    files.write(tmp_path / "ours", tree)
    same(files.read(tmp_path / "ours").leaves, files.flatten(tree))
    (tmp_path / "library").write_bytes(safetensors.numpy.save(files.flatten(tree)))
    same(files.read(tmp_path / "library").leaves, files.flatten(tree))
    (tmp_path / "flax").write_bytes(flax.serialization.to_bytes(tree))
    same(files.read(tmp_path / "flax").leaves, files.flatten(tree))


def test_npz_brings_bfloat16_other_byte_orders_and_fortran_order_back(tmp_path):
    matrix = some((3, 4))
    with (tmp_path / "w").open("wb") as file:
        np.savez(file, half=matrix.astype(BF16), big=matrix.astype(">f4"), fortran=np.asfortranarray(matrix))
    found = files.read(tmp_path / "w").leaves
    same(found, {"half": matrix.astype(BF16), "big": matrix, "fortran": matrix})


def test_content_hash_is_of_the_content_alone(tmp_path):
    tree = jax.tree.map(np.asarray, models.init(models.CNN(), jax.random.key(0), (28, 28, 1)))
    flat = files.flatten(tree)
    files.write(tmp_path / "a.npz", tree)  # the name says nothing
    (tmp_path / "b.safetensors").write_bytes(flax.serialization.to_bytes(tree))
    with (tmp_path / "c").open("wb") as file:
        np.savez_compressed(file, **dict(reversed(flat.items())))
    found = [files.read(path) for path in sorted(tmp_path.iterdir())]
    assert [one.format for one in found] == ["safetensors", "msgpack", "npz"]
    assert {files.content_hash(one.leaves) for one in found} == {files.content_hash(flat)}
    assert len({one.sha256 for one in found}) == 3

    kernel = np.array([[1, 2], [3, 4]], "<f4")
    by_hand = b"smark weights v1" + struct.pack(">I", 3) + b"a/b" + struct.pack(">I", 11) + b"float32 2,2"
    expected = hashlib.sha256(by_hand + struct.pack("<4f", 1, 2, 3, 4)).hexdigest()
    assert files.content_hash({"a/b": kernel}) == expected
    assert files.content_hash({"a/b": kernel.astype(">f4").copy(order="F")}) == expected
    others = [{"a/c": kernel}, {"a/b": kernel.reshape(4)}, {"a/b": kernel.view("<i4")}, {"a/b": kernel + 1}]
    assert len({files.content_hash(other) for other in others} | {expected}) == 5


def test_a_new_format_is_one_entry(tmp_path, monkeypatch):
    """A ``w``, and three bytes that count; it bounds what it reads, and says where the numbers lie."""

    def read(source, max_bytes):
        return {"w": np.frombuffer(source.data[2:], np.uint8)}

    def places(source):
        return {"w": _places.in_order(2, np.dtype(np.uint8), (3,))}

    lines = formats.Format("line", (".line",), lambda content: content.startswith(b"w "), read, places)
    monkeypatch.setattr(formats, "FORMATS", (lines, *formats.FORMATS))
    path = tmp_path / "weights"
    path.write_bytes(b"w \1\2\3")
    found = files.read(path)
    assert found.format == "line"
    np.testing.assert_array_equal(found.leaves["w"], [1, 2, 3])
    digest = files.write(tmp_path / "copy", {"w": found.leaves["w"] + 1}, like=path)
    assert (tmp_path / "copy").read_bytes() == b"w \2\3\4"
    assert files.read(tmp_path / "copy").sha256 == digest


def test_each_format_is_asked_in_an_order_in_which_no_other_takes_its_files():
    names = [format.name for format in formats.FORMATS]
    assert len(set(names)) == len(names)
    assert names.index("torch") < names.index("npz")
    assert names[-1] == "msgpack"


def test_flatten_and_nest_are_inverse_and_refuse_what_has_no_name():
    tree = models.init(models.ResNet18(width=4, norm="batch"), jax.random.key(0), (8, 8, 3))
    again = files.nest(files.flatten(tree))
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    assert list(files.flatten({"layers": [np.ones(1), {"b": np.ones(2)}]})) == ["layers/0", "layers/1/b"]
    with pytest.raises(ValueError, match="'a/b' twice"):
        files.flatten({"a/b": np.ones(1), "a": {"b": np.ones(1)}})
    with pytest.raises(ValueError, match="dtype complex64"):
        files.flatten({"a": np.ones(1, np.complex64)})
    for names in (("a", "a/b"), ("a/b", "a")):
        with pytest.raises(ValueError, match="nest: expected names of which none begins another"):
            files.nest(dict.fromkeys(names, 1))


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "copy"
    digest = files.write(path, {"a": some(3)})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write(path, {"a": some(4)})
    assert os.listdir(tmp_path) == ["copy"] and files.read(path).sha256 == digest
    with pytest.raises(ValueError, match="write: expected at least one leaf"):
        files.write(path, {})


def test_a_write_killed_at_any_moment_leaves_no_half_file_under_the_name(tmp_path):
    code = f"""
import numpy as np
from smark_jax import files
tree = {{str(i): np.full(200_000, i, np.float32) for i in range(20)}}
while True:
    files.write({str(tmp_path / "copy")!r}, tree)
    print("written", flush=True)
"""
    for delay in (0, 0.013, 0.027, 0.041):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"written\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(delay)
            process.kill()
        assert len(files.read(tmp_path / "copy").leaves) == 20
    assert all(name == "copy" or (name[0] == "." and name.endswith(".part")) for name in os.listdir(tmp_path))


# --- malformed files


def header(entries, size=0, length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(size)


def entry(start=0, end=4, shape=(1,), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


def zipped(members, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def npy(text, content=b"", version=b"\1\0"):
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode() + content


def npy_of(array, **kwargs):
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def flax_array(shape, dtype, content, code=1):
    return msgpack.packb({"a": msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))})


class Canary:
    """A pickle that leaves a folder behind when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


PLAIN_HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }"
MALFORMED = {
    "safetensors: header too long": (header({"a": entry()}, 4, 2**31), "header claims 2,147,483,648 bytes"),
    "safetensors: no JSON": (header(b"{" + b"x" * 20), "not JSON"),
    "safetensors: depth bomb": (header(b'{"a":' + b"[" * 100_000), "not JSON"),
    "safetensors: no object": (header(b'{"__metadata__":{}}'), "no arrays"),
    "safetensors: duplicate": (header(b'{"a":1,"a":2}'), "occurs twice"),
    "safetensors: dtype": (header({"a": entry(dtype="C64", end=8)}, 8), "of dtype 'C64'. Cast it to F32"),
    "safetensors: dtype is a list": (header({"a": entry(dtype=["F32"])}, 4), "of dtype ['F32']"),
    "safetensors: overlap": (header({"a": entry(), "b": entry()}, 4), "begins at byte 0, where byte 4 is next"),
    "safetensors: hole": (header({"a": entry(4, 8)}, 8), "begins at byte 4, where byte 0 is next"),
    "safetensors: beyond the end": (header({"a": entry()}), "end at byte 4 of 0"),
    "safetensors: more at the end": (header({"a": entry()}, 5), "end at byte 4 of 5"),
    "safetensors: shape": (header({"a": entry(shape=(2,))}, 4), "shape [2], float32, has 4 bytes"),
    "safetensors: negative": (header({"a": entry(shape=(-1, -1))}, 4), "has the shape [-1, -1]"),
    "safetensors: huge and empty": (header({"a": entry(0, 0, (0, 2**40, 2**40))}), "has 0 bytes"),
    "safetensors: true": (header({"a": entry(shape=(True,))}, 4), "has the shape [True]"),
    "safetensors: offsets": (header({"a": entry(4, 0)}, 4), "lies at bytes [4, 0]"),
    "safetensors: more keys": (header({"a": entry(code="x")}, 4), "is described by"),
    "safetensors: name": (header({"\x1b[2J": entry()}, 4), r"a leaf's name is '\x1b[2J'"),
    "safetensors: metadata": (header({"__metadata__": {"a": 1}, "a": entry()}, 4), "metadata is more than text"),
    "msgpack: cut": (flax_array((2,), "float32", bytes(8))[:-1], "ends in the middle"),
    "msgpack: goes on": (flax_array((2,), "float32", bytes(8)) + b"\0", "goes on after its end"),
    "msgpack: depth bomb": (b"\x91" * 100_000, "nested more than 64 deep"),
    "msgpack: wide bomb": (b"\xdd\x7f\xff\xff\xff" + b"\xc0" * 1_100_000, "too many values"),
    "msgpack: long shape": (flax_array((1,) * 100, "float32", bytes(4)), "too many values"),
    "msgpack: shape": (flax_array((3,), "float32", bytes(8)), "has 8 bytes of data"),
    "msgpack: object": (flax_array((1,), "object", bytes(8)), "of dtype 'object'"),
    "msgpack: complex": (flax_array((1,), "complex64", bytes(8)), "of dtype 'complex64'"),
    "msgpack: complex number": (msgpack.packb({"a": msgpack.ExtType(2, b"\x92\x01\x02")}), "a complex number"),
    "msgpack: other extension": (flax_array((2,), "float32", bytes(8), code=42), "an extension of type 42"),
    "msgpack: text for bytes": (flax_array((2,), "float32", "12345678"), "has no bytes"),
    "msgpack: duplicate": (b"\x82\xa1a\x01\xa1a\x02", "the key 'a' twice"),
    "msgpack: duplicate path": (msgpack.packb({"a": {"b": 1}, "a/b": 2}), "'a/b' occurs twice"),
    "msgpack: no text": (b"\x81\xa1\xff\x01", "no UTF-8"),
    "msgpack: marker": (b"\x81\xa1a\xc1", "marker 0xc1"),
    "msgpack: long names": (msgpack.packb({"a" * 900: {"b" * 900: 1}}), "a leaf's name is"),
    "msgpack: only text": (msgpack.packb({"a": "b", "c": None}), "no arrays"),
    "npz: objects": (zipped({"a.npy": npy_of(np.array([{}]), allow_pickle=True)}), "not a plain array of numbers"),
    "npz: records": (zipped({"a.npy": npy_of(np.zeros(1, [("x", "f4")]))}), "not a plain array of numbers"),
    "npz: complex": (zipped({"a.npy": npy_of(np.zeros(1, complex))}), "of dtype 'c16'"),
    "npz: text": (zipped({"a.npy": npy_of(np.array(["x"]))}), "of dtype 'U1'"),
    "npz: path": (zipped({"../../a.npy": npy(PLAIN_HEADER, bytes(4))}), "points outside"),
    "npz: root": (zipped({"/a.npy": npy(PLAIN_HEADER, bytes(4))}), "points outside"),
    "npz: drive": (zipped({"C:\\a.npy": npy(PLAIN_HEADER, bytes(4))}), "points outside"),
    "npz: other file": (zipped({"run.sh": b"rm"}), "neither npz nor PyTorch"),
    "npz: empty": (zipped({}), "no arrays"),
    "npz: no npy": (zipped({"a.npy": b"hello"}), "not a .npy file"),
    "npz: code": (zipped({"a.npy": npy("__import__('os').abort()", bytes(4))}), "not a plain array"),
    "npz: depth": (zipped({"a.npy": npy("(" * 3000, bytes(4))}), "not a plain array"),
    "npz: shape": (zipped({"a.npy": npy(PLAIN_HEADER.replace("1,", "9,"), bytes(4))}), "has 4 bytes of data"),
    "npz: absurd shape": (zipped({"a.npy": npy(PLAIN_HEADER.replace("1,", "9" * 400), bytes(4))}), "has the shape"),
    "npz: cut": (zipped({"a.npy": npy(PLAIN_HEADER, bytes(4))})[:-30], "zip directory is damaged"),
    "npz: rare compression": (zipped({"a.npy": b"x"}, zipfile.ZIP_LZMA), "compressed in a rare way"),
    "npz: bomb": (zipped({f"{i}.npy": bytes(2**25) for i in range(13)}, zipfile.ZIP_DEFLATED), "it unpacks to"),
    "pickle": (pickle.dumps({"a": 1}), "no arrays"),
    "torch": (zipped({"archive/data.pkl": pickle.dumps({})}), "no arrays"),
    "empty": (b"", "it is empty"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "it ends before byte 24"),
    "npy": (npy_of(np.zeros(3)), "a single .npy array"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    "text": (b"hello", "it is in none of the formats "),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_in_one_line_that_says_what_to_do(tmp_path, case):
    content, said = MALFORMED[case]
    path = tmp_path / "suspect"
    path.write_bytes(content)
    with pytest.raises(errors.Unreadable) as caught:
        files.read(path)
    message = str(caught.value)
    assert said in message and str(path) in message and message.endswith((".", "?"))
    assert message.isprintable() and len(message) < 500


def test_every_cut_and_every_flipped_bit_of_small_files_is_read_or_refused(tmp_path):
    tree = {"a": some((2, 3)), "b": np.arange(3)}
    valid = [
        safetensors.numpy.save(tree),
        flax.serialization.msgpack_serialize(tree),
        zipped({f"{name}.npy": npy_of(leaf) for name, leaf in tree.items()}, zipfile.ZIP_DEFLATED),
    ]
    path = tmp_path / "suspect"
    refused = 0
    for content in valid:
        flips = (content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :] for i in range(len(content)))
        for broken in (*(content[:i] for i in range(len(content))), *flips):
            path.write_bytes(broken)
            try:
                files.read(path)
            except errors.Unreadable:
                refused += 1
    assert refused > sum(map(len, valid))  # all cuts at least


def test_no_pickle_is_ever_loaded(tmp_path):
    canary = Canary(tmp_path / "canary")
    bomb = pickle.dumps(canary)
    objects = np.empty(1, object)
    objects[0] = canary
    contents = [
        bomb,
        zipped({"archive/data.pkl": bomb, "archive/version": b"3"}),
        zipped({"a.npy": npy_of(objects, allow_pickle=True)}),
        zipped({"a.npy": bomb}),
        msgpack.packb({"a": bomb, "b": msgpack.ExtType(1, bomb)}),
        header({"a": entry(0, len(bomb), (len(bomb),), "U8")}) + bomb,
    ]
    for i, content in enumerate(contents):
        (tmp_path / str(i)).write_bytes(content)
        try:
            files.read(tmp_path / str(i))
        except errors.Unreadable:
            pass
    assert not (tmp_path / "canary").exists()
    pickle.loads(bomb)  # the negative control: this pickle does what it is feared for
    assert (tmp_path / "canary").exists()


def test_hostile_files_take_little_memory(tmp_path):
    """In a process of its own: its peak since it runs this program, where ru_maxrss would include its parent's."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    hostile = {
        "json": header(b'{"a":[' + b"{}," * (2**23 // 3 - 10) + b"{}]}"),
        "lists": b"\xdd\x07\xff\xff\xff" + b"\x90" * 2**27,
        "levels": b"\xdd\x07\xff\xff\xff" * 2**22,
        "members": zipped({f"{i}.npy": b"" for i in range(80_000)}),
        "bomb": zipped({"a.npy": npy(PLAIN_HEADER.replace("1,", f"{2**28},"), bytes(2**28))}, zipfile.ZIP_DEFLATED),
    }
    for name, content in hostile.items():
        (tmp_path / name).write_bytes(content)
    code = """
import sys
from smark_jax import errors, files
for path in sys.argv[1:]:
    try:
        files.read(path, max_bytes=2**28 - 1)
    except errors.Unreadable as error:
        print(error)
print(next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    paths = [str(tmp_path / name) for name in hostile]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    *refused, peak = done.stdout.splitlines()
    assert len(refused) == len(hostile)
    assert int(peak) < 5e8


def test_the_size_limit_is_of_the_file_and_of_what_it_unpacks_to(tmp_path):
    path = tmp_path / "w"
    files.write(path, {"a": np.zeros(1000, np.float32)})
    with pytest.raises(errors.Unreadable, match=r"larger than 4,000 bytes. Raise max_bytes"):
        files.read(path, max_bytes=4000)
    assert files.read(path, max_bytes=5000).leaves["a"].size == 1000
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.zeros(1000, np.float32))
    assert path.stat().st_size < 1000
    with pytest.raises(errors.Unreadable, match="unpacks to"):
        files.read(path, max_bytes=4000)
    with pytest.raises(ValueError, match="max_bytes to be a whole number"):
        files.read(path, max_bytes=0)


def test_folders_devices_and_missing_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    said = {
        tmp_path: "Orbax",
        tmp_path / "pipe": "not a regular file",
        tmp_path / "none": "No such file",
        "a\0": "opened",
    }
    for path, words in said.items():
        with pytest.raises(errors.Unreadable, match=words):
            files.read(path)


def test_nan_is_read_as_it_is_and_numbers_beside_arrays_too(tmp_path):
    files.write(tmp_path / "w", {"a": np.array([np.nan, np.inf], np.float32)})
    assert np.isnan(files.read(tmp_path / "w").leaves["a"][0])
    state = {"step": 3, "rate": 0.5, "name": "cnn", "none": None, "scalar": np.float32(2), "list": [np.ones(1)]}
    (tmp_path / "m").write_bytes(flax.serialization.msgpack_serialize(state))
    found = files.read(tmp_path / "m").leaves
    assert {name: leaf.tolist() for name, leaf in found.items()} == {
        "list/0": [1.0],
        "rate": 0.5,
        "scalar": 2.0,
        "step": 3,
    }


def test_arrays_that_flax_cut_into_pieces_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 64)
    tree = {"a": {"kernel": some((5, 9)), "bias": some(3)}}
    content = flax.serialization.msgpack_serialize(tree)
    assert b"__msgpack_chunked_array__" in content
    (tmp_path / "m").write_bytes(content)
    same(files.read(tmp_path / "m").leaves, files.flatten(tree))


# --- layouts


@pytest.fixture(scope="module")
def cnn():
    return jax.tree.map(np.asarray, models.init(models.CNN(), jax.random.key(0), (28, 28, 1)))


def noisy(leaves, level, seed=1):
    rng = np.random.default_rng(seed)
    return {
        name: (leaf + level * leaf.std() * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        for name, leaf in leaves.items()
    }


def test_a_pytorch_copy_computes_the_same_once_its_layout_is_matched(cnn):
    """The reference computes in PyTorch's layout, and knows nothing of how leaves are matched."""
    copy = files.nest(noisy(files.flatten(cnn), 0.3))
    leaves = torch_layout.cnn_leaves(copy)
    images = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    expected = torch_layout.cnn_logits(leaves, images.transpose(0, 3, 1, 2))
    layout = files.match_layout(leaves, files.flatten(cnn))
    got = models.apply_fn(models.CNN())(files.nest(layout.leaves), images)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert {(m.base, m.suspect, m.change) for m in layout.moves if m.change != "renamed"} == {
        ("Conv_0/kernel", "conv1.weight", "OIHW to HWIO"),
        ("Conv_1/kernel", "conv2.weight", "OIHW to HWIO"),
        ("Dense_0/kernel", "fc1.weight", "transposed, flattened CHW to HWC (64 channels)"),
        ("Dense_1/kernel", "fc2.weight", "transposed"),
    }
    # The negative control: in the order HWC the same rows give other logits.
    wrong = layout.leaves | {"Dense_0/kernel": leaves["fc1.weight"].T}
    assert np.abs(models.apply_fn(models.CNN())(files.nest(wrong), images) - expected).max() > 0.1


@pytest.mark.parametrize("rename", ["{}", "params/{}", "state_dict/{}", "model.{}"])
def test_names_that_agree_are_trusted_and_levels_around_them_ignored(cnn, rename):
    base = files.flatten(cnn)
    suspect = {rename.format(name): leaf for name, leaf in noisy(base, 0.1).items()} | {"step": np.array(3)}
    for ours in (base, {f"params/{name}": leaf for name, leaf in base.items()}):
        layout = files.match_layout(suspect, ours)
        same(layout.leaves, dict(zip(ours, noisy(base, 0.1).values(), strict=True)))
        assert layout.unused == ("step",)
        assert all(move.change == "renamed" for move in layout.moves)
        assert bool(layout.moves) == (suspect.keys() - {"step"} != ours.keys())


def resnet_as_pytorch(base):
    """Names and layouts of PyTorch, in an order that tells nothing."""
    words = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var", "bias": "bias"}
    layers = sorted(
        {name.split("/", 1)[1].rpartition("/")[0] for name in base}, key=lambda n: hashlib.md5(n.encode()).digest()
    )
    found, expected = {}, {}
    for name, leaf in base.items():
        layer, _, role = name.split("/", 1)[1].rpartition("/")
        new = f"layer{layers.index(layer)}.{words[role]}"
        found[new] = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T if leaf.ndim == 2 else leaf
        expected[name] = new
        if role == "mean":
            found[f"layer{layers.index(layer)}.num_batches_tracked"] = np.array(7)
    return found, expected


def test_equal_shapes_and_batch_norm_are_told_apart_by_content():
    net = models.init(models.ResNet18(width=16, norm="batch"), jax.random.key(0), (32, 32, 3))
    rng = np.random.default_rng(0)
    base = {name: leaf + 0.1 * some(leaf.shape, rng.integers(2**31)) for name, leaf in files.flatten(net).items()}
    suspect, expected = resnet_as_pytorch(noisy(base, 0.5))
    layout = files.match_layout(suspect, base)
    assert {move.base: move.suspect for move in layout.moves} == expected
    same(layout.leaves, noisy(base, 0.5))
    assert len(layout.unused) == 20 and all("num_batches_tracked" in name for name in layout.unused)


def test_names_exchanged_on_purpose_do_not_mislead():
    base = {f"layer{i}/kernel": some((16, 16), i) for i in range(4)}
    suspect = {f"layer{i}/kernel": noisy(base, 0.2)[f"layer{(i + 1) % 4}/kernel"].T for i in range(4)}
    layout = files.match_layout(suspect, base)
    same(layout.leaves, noisy(base, 0.2))
    assert layout.moves[1] == ("layer1/kernel", "layer0/kernel", "transposed")


def test_names_are_kept_where_content_denies_some_and_tells_nothing_better(cnn):
    """As after neurons were permuted: alignment needs the leaves by their names."""
    base = {name: leaf + 0.1 * some(leaf.shape) for name, leaf in files.flatten(cnn).items()}
    order = np.random.default_rng(0).permutation(32)
    permuted = base | {name: base[name][..., order] for name in ("Conv_0/kernel", "Conv_0/bias")}
    permuted["Conv_1/kernel"] = base["Conv_1/kernel"][:, :, order]
    layout = files.match_layout(permuted, base)
    same(layout.leaves, permuted)
    assert layout.moves == ()
    with pytest.raises(ValueError, match="leaves in the base"):
        files.match_layout(permuted, {})


def test_another_model_under_the_same_names_is_left_as_it_is(cnn):
    other = files.flatten(models.init(models.CNN(), jax.random.key(1), (28, 28, 1)))
    layout = files.match_layout(other, files.flatten(cnn))
    same(layout.leaves, other)
    assert layout.moves == ()


def test_what_cannot_be_told_is_asked_and_the_answer_taken(cnn):
    base = files.flatten(cnn)
    other = jax.tree.map(np.asarray, models.init(models.CNN(), jax.random.key(1), (28, 28, 1)))
    suspect = torch_layout.cnn_leaves(other)
    with pytest.raises(errors.Ambiguous, match=r"--map 'Dense_0/kernel=fc1.weight: transposed'") as asked:
        files.match_layout(suspect, base)
    right = "fc1.weight: transposed, flattened CHW to HWC (64 channels)"
    assert right in asked.value.options["Dense_0/kernel"]
    answers = {"Dense_0/kernel": right, "Dense_1/kernel": "fc2.weight: transposed"}
    same(files.match_layout(suspect, base, answers).leaves, files.flatten(other))
    for wrong in (
        {"Dense_7/kernel": right},
        {"Dense_0/kernel": "fc9.weight"},
        {"Dense_0/kernel": "fc1.weight: upside down"},
    ):
        with pytest.raises(ValueError, match="match_layout: expected a"):
            files.match_layout(suspect, base, wrong)


def test_equal_layers_without_content_are_asked_for():
    base = {"a/kernel": some((8, 8)), "b/kernel": some((8, 8), 1)}
    suspect = {"x": some((8, 8), 2), "y": some((8, 8), 3)}
    with pytest.raises(errors.Ambiguous) as asked:
        files.match_layout(suspect, base)
    assert asked.value.options.keys() == base.keys()
    layout = files.match_layout(suspect, base, {"a/kernel": "y: transposed", "b/kernel": "x: transposed"})
    same(layout.leaves, {"a/kernel": suspect["y"].T.copy(), "b/kernel": suspect["x"].T.copy()})


def test_names_that_say_nothing_are_matched_leaf_by_leaf(cnn):
    base = {name: leaf + 0.1 * some(leaf.shape) for name, leaf in files.flatten(cnn).items()}
    suspect = {f"w{i}": leaf for i, leaf in enumerate(reversed(noisy(base, 0.2).values()))}
    same(files.match_layout(suspect, base).leaves, noisy(base, 0.2))


def test_another_width_is_left_for_alignment_and_missing_leaves_are_named(cnn):
    base = files.flatten(cnn)
    wide = base | {"Dense_0/bias": some(130), "Dense_0/kernel": some((3136, 130)), "Dense_1/kernel": some((130, 10))}
    layout = files.match_layout(wide, base)
    same(layout.leaves, wide)
    layout = files.match_layout({name: leaf for name, leaf in base.items() if name != "Dense_1/kernel"}, base)
    assert layout.missing == ("Dense_1/kernel",)
    assert layout.leaves.keys() == base.keys() - {"Dense_1/kernel"}
    with pytest.raises(errors.Undecided, match=r"a leaf for 'Conv_0/bias'.*\n.*alignment.align"):
        files.match_layout({"x": some((3, 2))}, base)


def test_dtypes_and_values_stay_the_suspects(cnn):
    base = files.flatten(cnn)
    suspect = {name: leaf.astype(BF16) for name, leaf in torch_layout.cnn_leaves(cnn).items()}
    layout = files.match_layout(suspect, base)
    same(layout.leaves, {name: leaf.astype(BF16) for name, leaf in base.items()})
    broken = torch_layout.cnn_leaves(cnn)
    broken["fc1.weight"][3, :1500] = np.nan
    found = files.match_layout(broken, base).leaves["Dense_0/kernel"]
    assert np.isnan(found).sum() == 1500
