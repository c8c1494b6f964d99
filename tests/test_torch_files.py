"""PyTorch's files of every form, and plain pickles: read and written without PyTorch, and nothing in them runs.

PyTorch itself wrote the files of ``tests/data/torch`` and the values in ``expected.npz``
(``tests/make_fixtures/torch_files.py``).
"""

import collections
import hashlib
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_layout
from memory import counted, peak
from stress.fuzz import mutations

from smark_jax import errors, files, models
from smark_jax.files import _scaled

DATA = Path(__file__).parent / "data/torch"
EXPECTED: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
with np.load(DATA / "expected.npz") as archive:
    for key in archive:
        EXPECTED[key.split(":")[0]][key.split(":")[1].replace("|", "/")] = archive[key]


def zipped(members, method=zipfile.ZIP_STORED):
    return mutations.zipped(tuple(members.items()), method)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def legacy(tensors, storages):
    """A state dict as PyTorch wrote it before 1.6: by hand, opcode for opcode."""

    def text(value):
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    def numbers(values):
        return b"(" + b"".join(b"J" + value.to_bytes(4, "little", signed=True) for value in values) + b"t"

    state = b"\x80\x02ccollections\nOrderedDict\n)R("
    for name, (key, offset, shape, strides) in tensors.items():
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K\x00NtQ"
        rest = b"K" + bytes([offset]) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)R"
        state += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + rest + b"tR"
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    body = b"".join(
        len(values).to_bytes(8, "little") + np.asarray(values, "<f4").tobytes() for values in storages.values()
    )
    return head + state + b"u." + pickle.dumps(list(storages), 2) + body


# --- reading


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_form_gives_the_tensors_that_pytorch_finds_in_it(name):
    found = files.read(DATA / name)
    assert found.format == ("pickle" if name.endswith(".pkl") else "torch")
    assert found.sha256 == hashlib.sha256((DATA / name).read_bytes()).hexdigest()
    assert found.leaves.keys() == EXPECTED[name].keys()
    for leaf, expected in EXPECTED[name].items():
        ours = found.leaves[leaf]
        assert ours.flags.writeable and ours.flags.owndata and ours.flags.c_contiguous
        np.testing.assert_array_equal(ours.astype(expected.dtype), expected, strict=True)


def test_narrow_dtypes_stay_as_they_are():
    kinds = {name: leaf.dtype.name for name, leaf in files.read(DATA / "views.pt").leaves.items()}
    assert (kinds["bf16"], kinds["half"], kinds["double"], kinds["bool"]) == ("bfloat16", "float16", "float64", "bool")
    kinds = {name: leaf.dtype.name for name, leaf in files.read(DATA / "float8.pt").leaves.items()}
    assert kinds == {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}


def test_a_legacy_state_dict_is_read_with_offsets_and_strides(tmp_path):
    content = legacy({"a": ("1", 1, (2, 3), (1, 2)), "b": ("2", 0, (2,), (1,))}, {"1": range(7), "2": [8, 9]})
    (tmp_path / "w").write_bytes(content)
    found = files.read(tmp_path / "w").leaves
    assert {name: leaf.tolist() for name, leaf in found.items()} == {"a": [[1, 3, 5], [2, 4, 6]], "b": [8, 9]}


@pytest.mark.parametrize("name", ["state.pt", "script.pt", "quantised.pt"])
def test_a_zip_that_was_compressed_again_is_read_alike(name, tmp_path):
    (tmp_path / "w").write_bytes(zipped(members(DATA / name), zipfile.ZIP_DEFLATED))
    ours, theirs = files.read(tmp_path / "w").leaves, files.read(DATA / name).leaves
    assert files.content_hash(ours) == files.content_hash(theirs)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_arrays_of_numpy_and_jax_are_read_bit_for_bit(protocol, tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "kernel": rng.standard_normal((50, 60)).astype(np.float32),  # longer than a text that is decoded
        "fortran": np.asfortranarray(rng.standard_normal((3, 4))),
        "big": np.arange(5, dtype=">f4"),
        "bytes": rng.integers(0, 256, (9, 1000), np.uint8),
        "scalar": np.array(3.5),
        "bf16": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
    }
    ours = {"a": [jnp.asarray(tree["kernel"])], "b": tree, "epoch": 3, "name": "net", 7: np.ones(2)}
    (tmp_path / "w").write_bytes(pickle.dumps(ours, protocol))
    found = files.read(tmp_path / "w")
    assert found.format == "pickle"
    expected = {"a/0": tree["kernel"], "7": np.ones(2)} | {f"b/{name}": leaf for name, leaf in tree.items()}
    assert found.leaves.keys() == expected.keys()
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found.leaves[name], leaf.astype(leaf.dtype.newbyteorder("=")), strict=True)


def test_weights_with_scales_beside_them_are_matched_as_what_they_stand_for(tmp_path):
    rng = np.random.default_rng(0)
    codes, rows = rng.integers(-127, 128, (4, 6), np.int8), rng.random(4, np.float32)
    blocks, zeros = rng.random((4, 2), np.float32), rng.integers(-5, 6, (4, 2)).astype(np.int8)
    narrow = rng.standard_normal((4, 6)).astype(ml_dtypes.float8_e4m3fn)
    leaves = {
        "a.weight": codes, "a.SCB": rows, "a.weight_format": np.array(0, np.uint8), "a.bias": rows,
        "b.weight": codes, "b.weight_scale": blocks, "b.weight_zero_point": zeros,
        "c.weight": narrow, "c.weight_scale": np.array(0.5, np.float32), "d.weight": codes, "SCB": rows,
    }  # fmt: skip
    found = _scaled.dequantised(leaves, {}, 10_000)
    expected = np.array([[np.float32(codes[i, j]) - zeros[i, j // 3] for j in range(6)] for i in range(4)])
    assert found.keys() == {"a.weight", "a.bias", "b.weight", "c.weight", "d.weight", "SCB"}
    np.testing.assert_allclose(found["a.weight"], codes.astype(np.float64) * rows[:, None] / 127, rtol=1e-6)
    np.testing.assert_allclose(found["b.weight"], expected * np.repeat(blocks, 3, 1), rtol=1e-6)
    np.testing.assert_allclose(found["c.weight"], narrow.astype(np.float64) / 2)
    assert found["d.weight"] is codes  # no scales beside it
    with pytest.raises(errors.Undecided, match="take more in float32"):
        _scaled.dequantised(leaves, {}, 200)
    odd = {"a.weight": codes, "a.SCB": np.ones(5, np.float32)}  # in a way that is not known
    assert _scaled.dequantised(odd, {}, 10_000) == odd
    kept = _scaled.dequantised(leaves, {"a.weight": codes, "b.weight": rows}, 10_000)  # the base's own are not floats
    assert kept["a.weight"] is codes and "a.SCB" in kept and kept["b.weight"].dtype == np.float32

    (tmp_path / "w").write_bytes(safetensors.numpy.save(leaves))
    raw = files.read(tmp_path / "w").leaves  # as the file has them, since bases are committed to so
    assert raw.keys() == leaves.keys() and all(raw[name].tobytes() == leaves[name].tobytes() for name in leaves)
    base = {f"{name}.weight": found[f"{name}.weight"] for name in "abc"}
    layout = files.match_layout(raw, base)
    assert all(np.array_equal(layout.leaves[name], leaf) for name, leaf in base.items()) and not layout.missing
    text = {**raw, "a.SCB": np.array(["no", "number"])}  # as somebody may pass it in Python
    assert "a.SCB" in files.match_layout(text, base).unused


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of sparse and nested tensors
def test_what_is_no_real_array_is_left_out_of_suspects_and_refused_in_bases(tmp_path):
    torch = pytest.importorskip("torch")
    more = torch.ones(3)
    for odd in (more * 1j, more.to_sparse(), more.to("meta"), torch.nested.nested_tensor([more, more])):
        torch.save({"w": more, "odd": odd}, tmp_path / "w")
        found = files.read(tmp_path / "w", strict=False)
        assert (found.leaves.keys(), found.foreign) == ({"w"}, ("odd",))
        with pytest.raises(errors.Unreadable, match=r"leaf 'odd' is .*Weights are real arrays"):
            files.read(tmp_path / "w")
    for content, said in ((torch.ones(1).expand(10**12), "take more than"), ({}, "no arrays")):
        torch.save(content, tmp_path / "w")
        with pytest.raises(errors.Unreadable, match=said):
            files.read(tmp_path / "w")


# --- writing in place

WRITTEN = ["state.pt", "state_legacy.pt", "views.pt", "views_legacy.pt", "whole.pt", "whole_legacy.pt", "training.pt",
           "script.pt", "frozen.pt", "float8.pt", "plain5.pkl"]  # fmt: skip


def scaled(leaves):
    """Every leaf of floating point times 1.5, which agrees where leaves share bytes."""
    return {
        name: (leaf.astype(np.float64) * 1.5).astype(leaf.dtype) if leaf.dtype.kind in "fV" else leaf
        for name, leaf in leaves.items()
    }


@pytest.mark.parametrize("name", WRITTEN)
def test_a_copy_is_the_base_byte_for_byte_but_for_the_numbers(name, tmp_path):
    leaves = files.read(DATA / name).leaves
    files.write(tmp_path / "same", leaves, like=DATA / name)
    assert (tmp_path / "same").read_bytes() == (DATA / name).read_bytes()
    files.write(tmp_path / "copy", scaled(leaves), like=DATA / name)
    found = files.read(tmp_path / "copy").leaves
    for leaf, expected in scaled(leaves).items():
        np.testing.assert_array_equal(found[leaf], expected, strict=True)
    before, after = ((path).read_bytes() for path in (DATA / name, tmp_path / "copy"))
    changed = np.flatnonzero(np.frombuffer(before, np.uint8) != np.frombuffer(after, np.uint8))
    numbers = sum(leaf.nbytes for leaf in leaves.values() if leaf.dtype.kind in "fV")
    checksums = 2 * 4 * len(members(DATA / name)) if zipfile.is_zipfile(DATA / name) else 0
    assert 0 < len(changed) <= numbers + checksums and len(before) == len(after)
    if zipfile.is_zipfile(DATA / name):
        with zipfile.ZipFile(tmp_path / "copy") as archive:
            assert archive.testzip() is None


def test_numbers_lie_where_pytorch_keeps_them(tmp_path):
    """Its zip has a member for each storage, here of the kernel in C order."""
    leaves = files.read(DATA / "state.pt").leaves
    kernel = np.arange(leaves["body.0.weight"].size, dtype=np.float32).reshape(leaves["body.0.weight"].shape)
    files.write(tmp_path / "copy", leaves | {"body.0.weight": kernel}, like=DATA / "state.pt")
    ours, theirs = members(tmp_path / "copy"), members(DATA / "state.pt")
    assert [name for name in ours if ours[name] != theirs[name]] == ["state/data/0"]
    assert ours["state/data/0"] == kernel.tobytes()


@pytest.mark.parametrize("name", ["quantised.pt", "torchao_int8.pt", "plain2.pkl"])
def test_leaves_that_cannot_be_written_say_why(name, tmp_path):
    leaves = files.read(DATA / name).leaves
    files.write(tmp_path / "same", leaves, like=DATA / name)
    said = "coded number by number" if name == "plain2.pkl" else "quantised"
    with pytest.raises(errors.SmarkError, match=said):
        files.write(tmp_path / "copy", scaled(leaves), like=DATA / name)


@pytest.mark.filterwarnings("ignore")  # PyTorch deprecates TorchScript
def test_copies_run_in_pytorch(tmp_path):
    torch = pytest.importorskip("torch")
    for name in ("state.pt", "state_legacy.pt", "views.pt", "views_legacy.pt", "training.pt", "float8.pt"):
        expected = scaled(files.read(DATA / name).leaves)
        files.write(tmp_path / name, expected, like=DATA / name)
        theirs = torch.load(tmp_path / name, weights_only=name != "training.pt")
        theirs = (
            {f"state_dict/{key}": leaf for key, leaf in theirs["state_dict"].items()} if "epoch" in theirs else theirs
        )
        for leaf, ours in expected.items():
            np.testing.assert_array_equal(theirs[leaf].detach().double().numpy(), ours.astype(np.float64))
    base = torch.jit.load(DATA / "script.pt")
    expected = scaled(files.read(DATA / "script.pt").leaves)
    files.write(tmp_path / "script.pt", expected, like=DATA / "script.pt")
    copy, images = torch.jit.load(tmp_path / "script.pt"), torch.randn(2, 3, 8, 8)
    for leaf, ours in copy.state_dict().items():
        np.testing.assert_array_equal(ours.numpy(), expected[leaf])
    base.load_state_dict(copy.state_dict())
    torch.testing.assert_close(copy(images), base(images), rtol=0, atol=0)


# --- hostile files


class Canary:
    """A pickle that leaves a folder behind when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def hostile(folder):
    """Files that run code where they are loaded as pickles, and the pickle in each that does."""
    text = lambda name: b"X" + len(str(folder / name)).to_bytes(4, "little") + str(folder / name).encode()  # noqa: E731
    weights = {"w": np.ones(3, np.float32)}
    plain = {f"protocol{n}": pickle.dumps(weights | {"evil": Canary(folder / f"protocol{n}")}, n) for n in (2, 3, 4, 5)}
    plain["first"] = pickle.dumps({"evil": Canary(folder / "first")} | weights)
    plain["arguments"] = pickle.dumps([weights, collections.OrderedDict(a=(1, Canary(folder / "arguments")))])
    plain["instance"] = b"\x80\x02(" + text("instance") + b"ios\nmkdir\n."
    plain["object"] = b"\x80\x02(cos\nmkdir\n" + text("object") + b"o."
    files = {name: (content, content) for name, content in plain.items()}
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    evil = pickle.dumps(collections.OrderedDict(weights, a=Canary(folder / "legacy")), 2)
    files["legacy"] = head + evil + pickle.dumps([]), evil
    for name, member in (("zip", "data.pkl"), ("script", "constants.pkl")):
        evil = pickle.dumps(weights | {"evil": Canary(folder / name)}, 2)
        files[name] = (
            zipped({"net/data.pkl": pickle.dumps(weights, 2), f"net/{member}": evil, "net/version": b"3"}),
            evil,
        )
    return files


def test_a_pickle_that_would_run_code_does_not(tmp_path):
    """Its payload does run where Python loads it, in a process of its own."""
    (tmp_path / "ran").mkdir()
    cases = hostile(tmp_path / "ran")
    outcomes = {}
    for name, (content, _) in cases.items():
        (tmp_path / name).write_bytes(content)
        try:
            outcomes[name] = files.read(tmp_path / name, strict=False).leaves
        except errors.Unreadable as error:
            outcomes[name] = str(error)
    assert list((tmp_path / "ran").iterdir()) == []
    refused = {name for name, outcome in outcomes.items() if isinstance(outcome, str)}
    assert refused == {"instance", "object"} and all("the instruction 0x" in outcomes[name] for name in refused)
    for name in cases.keys() - refused:  # the weights beside the payload are read
        assert any(leaf.tolist() == [1, 1, 1] for leaf in outcomes[name].values()), name

    code = "import pickle, sys; [pickle.loads(bytes.fromhex(line)) for line in sys.stdin]"
    payloads = "\n".join(payload.hex() for _, payload in cases.values())
    subprocess.run([sys.executable, "-c", code], input=payloads, text=True, check=True)
    assert {path.name for path in (tmp_path / "ran").iterdir()} == cases.keys()


MALFORMED = {
    "storage missing": (legacy({"a": ("1", 0, (2,), (1,))}, {}), "it has no storage '1'"),
    "storage cut": (legacy({"a": ("1", 0, (2,), (1,))}, {"1": [1, 2]})[:-1], "goes on after the end"),
    "storage unknown": (legacy({"a": ("1", 0, (1,), (1,))}, {"1": [1], "2": [1]}), "'2', which no tensor takes"),
    "beyond its storage": (legacy({"a": ("1", 1, (2,), (1,))}, {"1": [1, 2]}), "more numbers than its storage"),
    "far beyond": (legacy({"a": ("1", 0, (2, 2), (2**30, 1))}, {"1": [1, 2]}), "more numbers than its storage"),
    "negative shape": (legacy({"a": ("1", 0, (-2,), (1,))}, {"1": [1, 2]}), "has the shape (-2,)"),
    "negative strides": (legacy({"a": ("1", 1, (2,), (-1,))}, {"1": [1, 2]}), "strides (-1,)"),
    "axes": (legacy({"a": ("1", 0, (2, 1), (1,))}, {"1": [1, 2]}), "has the shape (2, 1)"),
    "many axes": (legacy({"a": ("1", 0, (1,) * 40, (1,) * 40)}, {"1": [1, 2]}), "has the shape"),
    "expanded": (legacy({"a": ("1", 0, (2**30, 2**15), (0, 0))}, {"1": [1, 2]}), "take more than"),
    "name": (legacy({"a\x1b[2J": ("1", 0, (1,), (1,))}, {"1": [1]}), "a leaf's name is"),
    "no member": (zipped({"net/data.pkl": members(DATA / "state.pt")["state/data.pkl"]}), "no member 'net/data/0'"),
    "two trees": (zipped({"a/data.pkl": b"", "b/data.pkl": b""}), "2 members data.pkl"),
    "big-endian": (zipped({"a/data.pkl": b"", "a/byteorder": b"big"}), "big-endian"),
    "a reference out": (pickle.dumps(1)[:2] + b"U\x01aQ.", "no arrays"),
    "storage in no file": (
        pickle.dumps(1)[:2] + members(DATA / "state.pt")["state/data.pkl"][2:],
        "which it does not hold",
    ),
    "same name": (pickle.dumps({1: np.ones(1), "1": np.ones(1)}), "'1' occurs twice"),
    "short array": (pickle.dumps(np.ones(99))[:-30] + pickle.dumps(np.ones(99))[-22:], "pickle"),
    "deep": (pickle.dumps({"a": np.ones(1)}, 2)[:-1] + b"\x85" * 100 + b".", "nested more than 64 deep"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_in_one_line_that_says_what_to_do(tmp_path, case):
    content, said = MALFORMED[case]
    (tmp_path / "suspect").write_bytes(content)
    with pytest.raises(errors.Unreadable) as caught:
        files.read(tmp_path / "suspect")
    message = str(caught.value)
    assert said in message and message.endswith((".", "?")) and message.isprintable() and len(message) < 500


def test_20_000_mutations_are_read_or_refused_below_one_gigabyte():
    """In a process of its own, whose peak is seen from outside; the mutations are those of the stress test."""
    code = """
import numpy as np, pathlib, sys
from smark_jax.errors import Unreadable
from smark_jax.files import _sources, _torch
from stress.fuzz import mutations
rng, read, refused = np.random.default_rng(0), 0, 0
valid = [path.read_bytes() for path in sorted(pathlib.Path(sys.argv[1]).glob("*")) if path.stat().st_size < 3_200]
for case in range(20_000):
    broken = mutations.BREAKS[case % len(mutations.BREAKS)](valid[int(rng.integers(len(valid)))], rng)
    try:
        _torch.read(_sources.Source(broken), 2**28)
        read += 1
    except Unreadable as error:
        assert str(error).isprintable()
        refused += 1
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(read, refused, peak)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux's /proc")
    command = [sys.executable, "-W", "error", "-c", code, str(DATA)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr[-2_000:]
    read, refused, peak = map(int, done.stdout.split())
    assert read + refused == 20_000 and min(read, refused) > 2_000 and peak < 1e9


# --- with PyTorch


def test_a_pytorch_network_is_read_from_its_file_to_the_same_logits(tmp_path):
    torch = pytest.importorskip("torch")
    from torch import nn

    cnn = jax.tree.map(np.asarray, models.init(models.CNN(), jax.random.key(0), (28, 28, 1)))
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding="same"), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding="same"),
        nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    state = dict(zip(net.state_dict(), (torch_layout.cnn_leaves(cnn)[name] for name in (
        "conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"
    )), strict=True))  # fmt: skip
    net.load_state_dict({name: torch.from_numpy(leaf.copy()) for name, leaf in state.items()})
    torch.save(net.state_dict(), tmp_path / "net.pt")
    layout = files.match_layout(files.read(tmp_path / "net.pt").leaves, files.flatten(cnn))
    images = np.random.default_rng(0).random((4, 28, 28, 1), np.float32)
    with torch.no_grad():
        expected = net(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    got = models.apply_fn(models.CNN())(files.nest(layout.leaves), images)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


# --- files that would take far more time or memory than their size


def words(text):
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def kept(kind, key):
    return b"(" + words("storage") + f"ctorch\n{kind}\n".encode() + words(key) + words("cpu") + b"K\x04tQ"


def rebuilt(storage, length, stride):
    size = b"\x8a\x06" + length.to_bytes(6, "little")
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + b"\x85K" + bytes([stride]) + b"\x85tR"


def test_a_file_within_a_file_within_a_file_is_refused(tmp_path):
    """A pickle may hold a storage as a file of its own; a thousand within each other ended in a traceback."""
    inner = b"ctorch.storage\n_load_from_bytes\n" * 2_000 + b"B\x04\x00\x00\x00abcd" + b"\x85R" * 2_000
    (tmp_path / "deep.pkl").write_bytes(b"\x80\x02}" + words("w") + rebuilt(inner, 4, 1) + b"s.")
    with pytest.raises(errors.Unreadable, match="not where they should be"):
        files.read(tmp_path / "deep.pkl")


def test_a_file_within_a_pickle_is_read_once(tmp_path):
    """However many tensors share it."""
    head = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    keys = b"\x80\x02" + b"N0" * 2_000 + b"]" + words("0") + b"a."
    inner = head + b"\x80\x02" + kept("FloatStorage", "0") + b"." + keys + (1).to_bytes(8, "little") + bytes(4)
    blob = b"B" + len(inner).to_bytes(4, "little") + inner + b"q\x000"
    each = rebuilt(b"ctorch.storage\n_load_from_bytes\nh\x00\x85R", 1, 1)
    (tmp_path / "shared.pkl").write_bytes(b"\x80\x02" + words("." * 40) + b"0" + blob + b"](" + each * 100 + b"e.")
    found = counted(100_000, lambda: files.read(tmp_path / "shared.pkl"))
    assert len(found.leaves) == 100


def test_scales_that_repeat_one_number_count_as_the_numbers_that_they_are(tmp_path):
    """A stride of 0 makes any number of scales of one: 2 ** 40 of them took 4 TB."""
    state = b"}(" + words("qdata") + rebuilt(kept("CharStorage", "0"), 1, 1)
    state += words("scale") + rebuilt(kept("HalfStorage", "1"), 2**23, 0) + b"u"
    pickled = b"\x80\x02}" + words("w") + b"ctorch._tensor\n_rebuild_from_type_v2\n("
    pickled += b"cm\nf\nN(NNK\x01\x85t" + state + b"tRs."
    data = zipped({"a/data.pkl": pickled, "a/data/0": bytes(4), "a/data/1": bytes(8)})
    (tmp_path / "scales.pt").write_bytes(data)

    def refused():
        with pytest.raises(errors.Unreadable, match="its leaves take more than"):
            files.read(tmp_path / "scales.pt", max_bytes=2**20)

    assert peak(refused) < 2**20


@pytest.mark.parametrize("shape", [(0,), (3,)])
def test_scales_that_do_not_fit_are_not_converted(shape):
    numbers, scales = np.zeros(shape, np.int8), np.ones(2**22, np.uint8)
    assert peak(lambda: _scaled.apply(numbers, scales, np.float32(0))) < 2**20
    leaves = {"a.weight": numbers, "a.weight_scale": scales}
    assert peak(lambda: _scaled.dequantised(leaves, {}, 2**30)) < 2**20


def test_scales_that_are_not_finite_hide_no_weight():
    """A file may have real scales elsewhere, and NaN under a name that other libraries use."""
    base = {"a.weight": np.random.default_rng(0).normal(size=(16, 9)).astype(np.float32)}
    numbers = np.round(base["a.weight"] * 40).astype(np.int8)
    leaves = {"a.weight": numbers, "a.weight_scale": np.full(1, np.nan, np.float32)}
    np.testing.assert_allclose(
        files.match_layout(leaves, base).leaves["a.weight"],
        base["a.weight"],
        atol=0.05 * np.abs(base["a.weight"]).max(),
    )
