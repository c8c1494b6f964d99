"""Content hashes of bases in every format, pinned: owners' vaults are committed to them.

The pins are the first version's of each reader; other tests compare what is read with other libraries.
"""

import io
import json
import zipfile
from pathlib import Path

import flax.serialization
import ml_dtypes
import network_files
import numpy as np
import pytest
import safetensors.numpy
import tflite_files
from network_files import Step, field

from smark_jax import files
from smark_jax.files import formats

DATA = Path(__file__).parent / "data"


def numbers(*shape: int, dtype: type = np.float32) -> np.ndarray:
    """The same on every machine, and exact in every dtype."""
    return (np.arange(np.prod(shape, dtype=int)) * 5 % 13 - 6).reshape(shape).astype(dtype)


LEAVES = {
    "conv/kernel": numbers(3, 3, 2, 4),
    "conv/bias": numbers(4, dtype=np.float64),
    "dense/kernel": numbers(8, 5, dtype=np.float16),
    "empty": numbers(0, 2),
    "step": np.array(7, np.int64),
}
NARROW = {name: numbers(4, 3).astype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")}
NET = network_files.Classifier(
    {
        "conv.weight": numbers(4, 2, 3, 2), "bn.weight": numbers(4), "bn.bias": numbers(4), "deep.bias": numbers(4),
        "deep.weight": numbers(4, 1, 3, 3), "fc.weight": numbers(5, 12), "fc.bias": numbers(5),
    },
    {"bn.running_mean": numbers(4), "bn.running_var": numbers(4) ** 2 + np.float32(1)},
)  # fmt: skip


def npz(leaves, save=np.savez):
    file = io.BytesIO()
    save(file, **leaves)
    return file.getvalue()


def coded_onnx():
    """Tensors whose numbers are coded one by one, a packed list of floats, and the number of a node."""
    coded = field(1, 3) + field(2, 10) + b"".join(field(5, n) for n in (0x3C00, 0xC000, 0x3800)) + field(8, "halves")
    packed = field(1, 2) + field(2, 1) + field(4, np.float32([0.5, -3]).tobytes()) + field(8, "floats")
    steps = [Step("Constant", [], ["half"], {"value": np.float32([0.5, 1])}), Step("Mul", ["x", "half"], ["y"])]
    return network_files.onnx(steps, {"w": numbers(2, 3)}, ("n", 2), "y", more=field(5, coded) + field(5, packed))


def whole_onnx():
    """A convolution of whole numbers, as onnxruntime's QOperator form has it."""
    taken = {"k": numbers(4, 2, 3, 3, dtype=np.int8), "b": numbers(4, dtype=np.int32)}
    taken |= {"xs": np.float32(0.5), "ks": np.float32([0.25, 0.5, 1.5, 3]), "ys": np.float32(2)}
    taken |= {"xz": np.uint8(3), "kz": np.zeros(4, np.int8), "yz": np.uint8(9)}
    steps = [Step("QuantizeLinear", ["x", "xs", "xz"], ["q"])]
    steps += [Step("QLinearConv", ["q", "xs", "xz", "k", "ks", "kz", "ys", "yz", "b"], ["p"])]
    steps += [Step("DequantizeLinear", ["p", "ys", "yz"], ["y"])]
    return network_files.onnx(steps, taken, ("n", 2, 6, 5), "y")


def tflite():
    """Tensors of each width, with one scale or several; names that repeat, and bytes that two tensors share."""
    tensors = {
        "channels": numbers(3, 2, dtype=np.int8), "bytes": np.uint8([[0, 7], [3, 255]]), "plain": numbers(4),
        "nibbles": np.uint8([0x21, 0xF8, 0x07]), "bias": numbers(2, dtype=np.int32), "shared": numbers(4),
        "again": numbers(5),
    }  # fmt: skip
    quantised = tflite_files.quantised
    scales = {"channels": quantised([0.5, 0.1, 3], [0, 2, -1]), "bytes": quantised(0.1, 3), "bias": quantised(0.3, 0)}
    change = {"nibbles": {0: np.int32([5]), 1: tflite_files.byte(17)}, "again": {3: "plain"}}
    change["shared"] = {1: tflite_files.byte(2), 2: tflite_files.Number("<I", 3)}
    steps = [tflite_files.Step(19, ["x"], ["y"])]
    return tflite_files.tflite(steps, tensors, [1], ["y"], scales | {"nibbles": quantised(0.5, 1)}, change)


MADE = {
    "safetensors": lambda: safetensors.numpy.save(LEAVES, {"by": "us"}),
    "safetensors, narrow": lambda: safetensors.numpy.save(NARROW),
    "msgpack": lambda: flax.serialization.msgpack_serialize(files.nest(LEAVES) | {"list": [numbers(2)], "rate": 0.5}),
    "npz": lambda: npz({name: np.array(leaf, order="F") for name, leaf in LEAVES.items()}),
    "npz, big-endian": lambda: npz({name: leaf.astype(leaf.dtype.newbyteorder(">")) for name, leaf in LEAVES.items()}),
    "npz, compressed": lambda: npz(LEAVES, np.savez_compressed),
    "onnx": NET.onnx,
    "onnx, QDQ": lambda: NET.onnx(quantised=True),
    "onnx, QOperator": whole_onnx,
    "onnx, coded": coded_onnx,
    "pt2": NET.exported,
    "tflite": tflite,
    "keras, weights": lambda: zipfile.ZipFile(DATA / "keras/convolutional.keras").read("model.weights.h5"),
}


def sharded(folder: Path) -> None:
    """A folder of an index and two files."""
    shard = {name: f"model-0000{1 + name.startswith('conv')}-of-00002.safetensors" for name in LEAVES}
    for file in set(shard.values()):
        content = safetensors.numpy.save({name: leaf for name, leaf in LEAVES.items() if shard[name] == file})
        (folder / file).write_bytes(content)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard}))


def sharded_torch(folder: Path) -> None:
    """A folder of an index and two files of PyTorch."""
    shard = {"body.0.weight": "a.bin", "e4m3": "b.bin"}
    for name, file in (("state.pt", "a.bin"), ("float8.pt", "b.bin")):
        (folder / file).write_bytes((DATA / "torch" / name).read_bytes())
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard}))


def external(folder: Path) -> None:
    """An ONNX model whose tensors lie in a file beside it."""
    leaves = {name: leaf for name, leaf in NET.weights.items() if leaf.ndim > 1}
    (folder / "net.onnx").write_bytes(network_files.onnx_in_two_files(folder / "weights", leaves))


FOLDERS = {"shards": sharded, "shards of PyTorch": sharded_torch, "onnx in two files": external}
FIXTURES = [
    str(path.relative_to(DATA))
    for path in sorted(DATA.rglob("*"))
    if path.is_file() and path.suffix not in (".md", ".npz", ".zip")  # the npz are answers, the zips whole vaults
]

PINNED = {
    "safetensors": "38ba949a32bb8eb9",
    "safetensors, narrow": "7e434693e6f4511f",
    "msgpack": "6710dd5522e0b558",
    "npz": "38ba949a32bb8eb9",
    "npz, big-endian": "38ba949a32bb8eb9",
    "npz, compressed": "38ba949a32bb8eb9",
    "onnx": "15a559435ecc56f4",
    "onnx, QDQ": "156e82d4b9f23e5e",
    "onnx, QOperator": "66dbd59b1ce96aef",
    "onnx, coded": "f298eed38fe4047a",
    "pt2": "4465964e41557c63",
    "tflite": "d4bd452f0ec64650",
    "keras, weights": "4f4289c22da2d53c",
    "shards": "38ba949a32bb8eb9",
    "shards of PyTorch": "92fa7ecdd16199e2",
    "onnx in two files": "49542df73bb17c64",
    "keras/attentive.keras": "eb8be1d789b60781",
    "keras/convolutional.keras": "4f4289c22da2d53c",
    "keras/int8.keras": "1124f862b87e58e3",
    "keras/older.h5": "4f4289c22da2d53c",
    "small.gguf": "6a8399b1d0185a2f",
    "tflite/dynamic.tflite": "11c42b8e92c97631",
    "tflite/float16.tflite": "d4e70456eaa13981",
    "tflite/float32.tflite": "e41302c4a669b0e3",
    "tflite/int8.tflite": "c8216c128690985c",
    "torch/float8.pt": "2e15647b1c96697f",
    "torch/frozen.pt": "d8158f15efe0b237",
    "torch/plain2.pkl": "7e8aec4f4e8b1332",
    "torch/plain5.pkl": "7e8aec4f4e8b1332",
    "torch/quantised.pt": "4054fd63424223e6",
    "torch/quantised_whole.pt": "e132dfc18b344cb2",
    "torch/script.pt": "cee82d34c436b323",
    "torch/state.pt": "7e8aec4f4e8b1332",
    "torch/state_legacy.pt": "7e8aec4f4e8b1332",
    "torch/torchao_float8.pt": "811850c9a956e2de",
    "torch/torchao_int8.pt": "2df768129004331e",
    "torch/training.pt": "4c689ef5c0e3ef56",
    "torch/views.pt": "3624c262c300ac3f",
    "torch/views_legacy.pt": "3624c262c300ac3f",
    "torch/whole.pt": "7e8aec4f4e8b1332",
    "torch/whole_legacy.pt": "7e8aec4f4e8b1332",
}


def base(name: str, folder: Path) -> Path:
    """The file or folder of a base."""
    if name in FOLDERS:
        FOLDERS[name](folder)
        return folder
    if name in MADE:
        (folder / "base").write_bytes(MADE[name]())
        return folder / "base"
    return DATA / name


@pytest.mark.parametrize("name", [*MADE, *FOLDERS, *FIXTURES])
def test_a_base_is_read_to_the_leaves_that_vaults_are_committed_to(name, tmp_path):
    found = files.content_hash(files.read(base(name, tmp_path)).leaves)
    assert found[:16] == PINNED.get(name), (
        f"{name} is read to other leaves than before: another name, dtype, shape or number. A vault opens a model only "
        "if its base has the leaves that were committed to when it was added, so this change locks owners out of their "
        "models, and voids their evidence. Do not change the pin: give the leaves as they were. If they must become "
        "others, keep the old read-out beside the new one, as a version that each model names "
        f"(smark_jax/vault/versions.py). A new format or fixture is pinned here once: {found[:16]}."
    )


def test_every_format_that_is_read_is_pinned(tmp_path):
    read = set()
    for number, name in enumerate(PINNED):
        (tmp_path / str(number)).mkdir()
        read.add(files.read(base(name, tmp_path / str(number))).format)
    assert read == {format.name for format in formats.FORMATS if format.suffixes}
