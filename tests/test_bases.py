"""The vault keeps a base in its own form, and issues copies in it."""

import hashlib
import io
import json
import math
import os
import re
import shutil
import zipfile
from pathlib import Path

import flax.serialization
import network_files
import numpy as np
import pytest
import safetensors.numpy
import terminal

from smark_jax import carriers, errors, files, vault
from smark_jax.vault import crypto, customers, issuing, models, verdicts

SECRET = "correct horse battery staple"
DATA = Path(__file__).parent / "data"
CHIPS = 32


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch):
    monkeypatch.setattr(crypto, "_N", 2**10)


@pytest.fixture
def desk(tmp_path):
    vault.create(tmp_path / "vault", SECRET)
    with vault.opened(tmp_path / "vault", SECRET) as desk:
        yield desk


def some(shape, seed=0, dtype: type = np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


LEAVES = {"a.weight": some((20, 8), 1), "a.bias": some(20, 2), "b.weight": some((10, 20), 3, np.float16)}


def npz(folder, save=np.savez):
    with (folder / "net.npz").open("wb") as file:
        save(file, **LEAVES)
    return folder / "net.npz"


def plain(name, content):
    def write(folder):
        (folder / name).write_bytes(content())
        return folder / name

    return write


def sharded(folder):
    """A model as Hugging Face's libraries cut it into files."""
    net = folder / "net"
    net.mkdir()
    names = {name: f"model-0000{1 + name.startswith('b')}-of-00002.safetensors" for name in LEAVES}
    for file in set(names.values()):
        safetensors.numpy.save_file({name: LEAVES[name] for name in LEAVES if names[name] == file}, net / file)
    (net / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (net / "config.json").write_text('{"model_type": "vit"}')
    (net / "tf_model.h5").write_bytes(b"the same weights, which nobody marks")
    return net


def external(folder):
    """An ONNX model whose large tensors lie in a file beside it, which is not called as ONNX files are."""
    (folder / "net").write_bytes(network_files.onnx_in_two_files(folder / "weights", LEAVES))
    return folder / "net"


def taken(name):
    def write(folder):
        return Path(shutil.copy(DATA / name, folder))

    return write


BASES = {
    "safetensors": (plain("net.safetensors", lambda: safetensors.numpy.save(LEAVES, {"by": "us"})), ".safetensors"),
    "without a suffix": (plain("net", lambda: safetensors.numpy.save(LEAVES)), ".safetensors"),
    "npz": (npz, ".npz"),
    "msgpack": (plain("net.msgpack", lambda: flax.serialization.msgpack_serialize(dict(LEAVES))), ".msgpack"),
    "onnx": (plain("net.onnx", lambda: network_files.classifier().onnx()), ".onnx"),
    "onnx in two files": (external, ""),
    "pt2": (plain("net.pt2", lambda: network_files.classifier().exported()), ".pt2"),
    "torch": (taken("torch/state.pt"), ".pt"),
    "keras": (taken("keras/convolutional.keras"), ".keras"),
    "hdf5": (taken("keras/older.h5"), ".h5"),
    "tflite": (taken("tflite/float16.tflite"), ".tflite"),
    "shards": (sharded, ""),
}


def contents(path):
    """The files of a model by name; of one file, with no name."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


@pytest.mark.parametrize("kind", BASES)
def test_copies_have_the_form_of_the_base(desk, tmp_path, kind):
    write, suffix = BASES[kind]
    (tmp_path / "in").mkdir()
    base = write(tmp_path / "in")
    weights = files.read(base)
    largest = max(carriers.select(files.nest(weights.leaves)).leaves, key=lambda leaf: math.prod(leaf.shape))
    match = f"^{re.escape(largest.path)}$"  # one leaf, so that little is compiled
    model = models.add(desk, "net", weights.leaves, num_chips=CHIPS, match=match, form=files.Form(base))
    kept = [path for path in (desk.folder / "models").iterdir() if path.name.startswith("net")]
    assert [path.name for path in kept] == [f"net.{model.settings.base[:16]}{suffix}"]
    assert files.read(kept[0]).sha256 == weights.sha256
    issued = issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Ada", "Grace"]), tmp_path / "out")
    assert [path.name for path in issued.files] == [f"000000-Ada{suffix}", f"000001-Grace{suffix}"]
    assert sorted(os.listdir(tmp_path / "out")) == [path.name for path in issued.files]

    copy = files.read(issued.files[0])
    assert copy.format == weights.format and copy.leaves.keys() == weights.leaves.keys()
    changed = {n for n, leaf in weights.leaves.items() if copy.leaves[n].tobytes() != leaf.tobytes()}
    assert changed == {largest.path}
    whole, ours = contents(kept[0]), contents(issued.files[0])
    assert ours.keys() == whole.keys() and {n: len(c) for n, c in ours.items()} == {n: len(c) for n, c in whole.items()}
    differing = sum(np.count_nonzero(np.frombuffer(ours[n], "u1") != np.frombuffer(whole[n], "u1")) for n in ours)
    assert differing <= sum(weights.leaves[name].nbytes for name in changed) + 12 * len(changed)  # checksums
    if zipfile.is_zipfile(kept[0]):
        assert zipfile.ZipFile(io.BytesIO(ours[""])).testzip() is None

    assert issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Ada"]), tmp_path / "out").written == 0


def test_a_copy_that_is_a_folder_is_traced(desk, tmp_path):
    base = sharded(tmp_path)
    added(desk, "net", base)
    issued = issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Ada", "Grace"]), tmp_path / "out")
    found = verdicts.trace(models.get(desk, "net"), [issued.files[1], base]).suspects
    assert [suspect.verdict for suspect in found] == ["traced", "nobody"]
    assert [accused.customer for accused in found[0].accused] == ["Grace"]
    assert (found[0].format, found[0].sha256) == ("shards", files.read(issued.files[1]).sha256)


def added(desk, name, path):
    return models.add(desk, name, files.read(path).leaves, num_chips=CHIPS, form=files.Form(path))


def test_a_base_that_is_compressed_gives_copies_in_safetensors(desk, tmp_path):
    added(desk, "net", npz(tmp_path, np.savez_compressed))
    (path,) = issuing.issue(models.get(desk, "net"), customers.resolve(desk, ["Ada"]), tmp_path / "out").files
    assert path.name == "000000-Ada.safetensors"
    assert safetensors.numpy.load_file(path).keys() == LEAVES.keys()


def test_a_base_that_is_quantised_is_refused(desk):
    path = DATA / "tflite/int8.tflite"
    with pytest.raises(
        errors.SmarkError, match=r"stored as floats, but got .* quantised\.\nAdd the model that was quantised"
    ) as e:
        added(desk, "net", path)
    assert "--match" in e.value.desk
    assert models.names(desk) == [] and not list((desk.folder / "models").iterdir())


def test_a_base_that_changes_while_it_is_added_is_refused(desk, tmp_path):
    base = BASES["safetensors"][0](tmp_path)
    form, leaves = files.Form(base), files.read(base).leaves
    with base.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"1234")
    with pytest.raises(errors.SmarkError, match="another content than was read"):
        models.add(desk, "net", leaves, num_chips=CHIPS, form=form)
    assert models.names(desk) == []


def test_a_folder_has_its_name_only_when_it_is_complete_and_replaces_nothing(desk, tmp_path, monkeypatch):
    added(desk, "net", sharded(tmp_path))
    out, somebody = tmp_path / "out", customers.resolve(desk, ["Ada"])
    dump, left = files.Form._dump, [2]

    def dies(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return dump(self, *arguments)

    monkeypatch.setattr(files.Form, "_dump", dies)
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **named: None)  # as when the process is killed
    with pytest.raises(KeyboardInterrupt):
        issuing.issue(models.get(desk, "net"), somebody, out)
    assert os.listdir(out) == [".000000-Ada.issuing"] and len(os.listdir(out / ".000000-Ada.issuing")) > 1
    monkeypatch.undo()
    monkeypatch.setattr(crypto, "_N", 2**10)
    assert issuing.issue(models.get(desk, "net"), somebody, out).written == 1
    copy = out / "000000-Ada"
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert os.listdir(out) == ["000000-Ada"] and sorted(os.listdir(copy)) == [*names, "model.safetensors.index.json"]
    lines = [hashlib.sha256((copy / "model.safetensors.index.json").read_bytes()).hexdigest()]
    lines += [f"{hashlib.sha256((copy / name).read_bytes()).hexdigest()}  {name}" for name in names[1:]]
    digest = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert [row for (row,) in desk.connection.execute("SELECT sha256 FROM copies")] == [digest]
    (copy / names[1]).write_bytes(b"damaged")
    with pytest.raises(errors.SmarkError, match="got a folder that is none"):
        issuing.issue(models.get(desk, "net"), somebody, out)
    assert (copy / names[1]).read_bytes() == b"damaged"


def test_the_desk_says_what_copies_will_be(tmp_path):
    sharded(tmp_path)
    npz(tmp_path, np.savez_compressed)
    shutil.copy(DATA / "tflite/int8.tflite", tmp_path)

    def run(*arguments, code=0):
        done = terminal.run(*arguments, folder=tmp_path)
        assert done.code == code, done.err
        return done

    run("init", "vault")
    said = run("add-model", "vault", "whole", "net", "--chips", CHIPS).out
    assert "Copies will be shards, like the base: the same bytes but for weights that carry." in said
    issued = json.loads(run("issue", "vault", "whole", "Ada", "--out", "copies", "--json").out)
    assert issued["files"] == ["copies/000000-Ada"]
    assert json.loads((tmp_path / "copies/000000-Ada/config.json").read_text()) == {"model_type": "vit"}
    said = run("add-model", "vault", "packed", "net.npz", "--chips", CHIPS).out
    assert "Copies will be safetensors: the carrying weights of this npz base cannot be changed in place." in said
    said = run("add-model", "vault", "rounded", "int8.tflite", "--chips", CHIPS, code=1).err
    assert "choose leaves of floats with --match" in " ".join(said.split())
