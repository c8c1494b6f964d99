"""Malformed weights files: valid ones broken at random, and forgeries made by hand."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import msgpack
import network_files
import numpy as np
import safetensors.numpy
import tflite_files

_KERAS = Path(__file__).parents[2] / "data/keras"
Make = Callable[[np.random.Generator], bytes]


class Canary:
    """A pickle that leaves a folder behind when it is loaded."""

    path = ""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def canary() -> bytes:
    return pickle.dumps(Canary())


def tree(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A few small leaves of mixed dtypes."""
    kinds = ("f4", "f2", "f8", "i4", "u1", "?")
    found = {}
    for name in ("Conv_0/kernel", "Conv_0/bias", "step")[: int(rng.integers(1, 4))]:
        shape = tuple(int(n) for n in rng.integers(1, 5, int(rng.integers(0, 4))))
        found[name] = np.asarray(rng.standard_normal(shape) * 10).astype(str(rng.choice(kinds)))
    return found


SHARD = "model-00001-of-00001.safetensors"


def safetensors_file(rng: np.random.Generator) -> bytes:
    return safetensors.numpy.save(tree(rng))


def msgpack_file(rng: np.random.Generator) -> bytes:
    nested = {
        name: msgpack.ExtType(1, msgpack.packb((leaf.shape, leaf.dtype.name, leaf.tobytes())) or b"")
        for name, leaf in tree(rng).items()
    }
    return msgpack.packb({"params": nested, "step": 3, "name": "cnn"}) or b""


def zipped(members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip, in which a name may occur twice."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that occurs twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


def npy(text: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text.encode() + content


def npy_header(descr: str = "'<f4'", shape: str = "(1,)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def npz_file(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    (np.savez if rng.integers(2) else np.savez_compressed)(file, **tree(rng))  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def shard_index(rng: np.random.Generator) -> bytes:
    """An index of the leaves in :data:`SHARD`."""
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tree(rng), SHARD)}).encode()


def onnx_file(rng: np.random.Generator) -> bytes:
    return network_files.classifier(int(rng.integers(100))).onnx(quantised=bool(rng.integers(2)))


def tflite_file(rng: np.random.Generator) -> bytes:
    """A convolution and a dense layer, quantised or not."""
    kernel, matrix = rng.integers(-128, 128, (4, 3, 3, 2)).astype(np.int8), rng.normal(size=(3, 4)).astype(np.float32)
    options = {0: tflite_files.byte(1), 1: tflite_files.whole(1), 2: tflite_files.whole(2), 3: tflite_files.byte(1)}
    steps = [
        tflite_files.Step(3, ["x", "kernel"], ["a"], options, 1),
        tflite_files.Step(40, ["a", "axes"], ["b"], {}, 27),
        tflite_files.Step(9, ["b", "matrix", "bias"], ["y"], {}, 8),
    ]
    tensors = {"matrix": matrix, "bias": matrix[:, 0].copy(), "axes": np.array([1, 2], np.int32)}
    many = int(rng.integers(2))
    scales = {"kernel": tflite_files.quantised(rng.random(4 if many else 1), np.zeros(4 if many else 1))}
    return tflite_files.tflite(steps, {"kernel": kernel, **tensors}, [-1, 9, 8, 2], ["y"], scales)


def keras_file(rng: np.random.Generator) -> bytes:
    return (_KERAS / str(rng.choice(["int8.keras", "attentive.keras"]))).read_bytes()


def hdf5_file(rng: np.random.Generator) -> bytes:
    """Both of Keras' layouts, the newer one mostly: it is smaller, and has more groups for its numbers."""
    if rng.integers(4) == 0:
        return (_KERAS / "older.h5").read_bytes()
    return zipfile.ZipFile(_KERAS / "int8.keras").read("model.weights.h5")


def exported_program(rng: np.random.Generator) -> bytes:
    return network_files.classifier(int(rng.integers(100))).exported()


_TORCH = Path(__file__).parents[2] / "data/torch"


def torch_file(rng: np.random.Generator) -> bytes:
    """One that PyTorch wrote: with zip or without, a whole model, a TorchScript, quantised."""
    paths = sorted(_TORCH.glob("*.pt"))
    return paths[int(rng.integers(len(paths)))].read_bytes()


def pickle_file(rng: np.random.Generator) -> bytes:
    protocol = int(rng.integers(2, 6))
    if rng.integers(2):
        return (_TORCH / ("plain2.pkl" if protocol < 4 else "plain5.pkl")).read_bytes()
    return pickle.dumps({"params": tree(rng), "step": 3, "name": "cnn"}, protocol)


def gguf_file(rng: np.random.Generator) -> bytes:
    return (_TORCH.parent / "small.gguf").read_bytes()


# Ways to break a valid file.


def cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    broken = bytearray(data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 9))):
        broken[place] ^= 1 << int(rng.integers(8))
    return bytes(broken)


def overwrite(data: bytes, rng: np.random.Generator) -> bytes:
    """Puts a number at the edge of its range, or noise, somewhere: lengths, offsets, sizes."""
    edges = (b"\xff" * 8, b"\xff\xff\xff\x7f", bytes(8), b"\x80", b"\xff" * 4, rng.bytes(int(rng.integers(1, 16))))
    piece, place = edges[int(rng.integers(len(edges)))], int(rng.integers(0, len(data)))
    return data[:place] + piece + data[place + len(piece) :]


def splice(data: bytes, rng: np.random.Generator) -> bytes:
    """Repeats, drops or moves a piece."""
    a, b = sorted(int(n) for n in rng.integers(0, len(data) + 1, 2))
    place = int(rng.integers(0, len(data)))
    pieces = (data[:b] + data[a:], data[:a] + data[b:], data[:place] + data[a:b] + data[place:])
    return pieces[int(rng.integers(3))]


def begin_alike(data: bytes, rng: np.random.Generator) -> bytes:
    """Keeps the beginning, by which a format is told, and goes on with noise."""
    return data[: int(rng.integers(1, 64))] + rng.bytes(int(rng.integers(0, 256)))


BREAKS = (cut, flip, flip, overwrite, splice, begin_alike)


# Forgeries.


def forged_header(rng: np.random.Generator) -> bytes:
    """A safetensors header that is JSON, and wrong."""
    numbers = (-1, 0, 1, 4, 8, 2**31, 2**40, 2**63, 2**64, 10**400, 1.5, True, None, "4", [], {})
    pick = lambda: numbers[int(rng.integers(len(numbers)))]  # noqa: E731
    dtypes = ("F32", "F32", "F64", "BF16", "C64", "F4", "object", "", 7, None, ["F32"])
    entries = [
        {
            "dtype": dtypes[int(rng.integers(len(dtypes)))],
            "shape": [pick() for _ in range(int(rng.integers(0, 5)))] if rng.integers(4) else pick(),
            "data_offsets": [pick(), pick()] if rng.integers(4) else pick(),
        }
        for _ in range(2)
    ]
    names = ("a", "b", "a", "__metadata__", "../../etc/passwd", "\x1b[2J", "\ud800", "x" * 5000, "")
    first, second = (json.dumps(names[int(i)]) for i in rng.integers(0, len(names), 2))
    text = f"{{{first}:{json.dumps(entries[0])},{second}:{json.dumps(entries[1])}}}".encode()
    length = len(text) if rng.integers(4) else int(rng.integers(0, 2**40))
    return struct.pack("<Q", length) + text + bytes(int(rng.integers(0, 16)))


def absurd_shapes(rng: np.random.Generator) -> bytes:
    """A shape that does not fit its data, in any of the formats; sometimes overlapping offsets."""
    shape = [int(2 ** rng.uniform(0, 62)) * int(rng.choice([0, 1, 1, -1])) for _ in range(int(rng.integers(1, 40)))]
    kind = rng.integers(4)
    if kind == 0:
        overlap = {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}
        text = json.dumps(overlap).encode()
        return struct.pack("<Q", len(text)) + text + bytes(4)
    if kind == 1:
        text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
        return struct.pack("<Q", len(text)) + text + bytes(4)
    if kind == 2:
        dtype = str(rng.choice(["float32", "object", "V8", "complex64", "bfloat16", "<f4", "", "datetime64[s]"]))
        return msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb((shape, dtype, bytes(4))) or b"")}) or b""
    descr = str(rng.choice(["'<f4'", "'|O'", "'<V2'", "'<U9'", "[('a', '<f4')]", "'<c8'", "'<M8[s]'", "__import__"]))
    return zipped([("a.npy", npy(npy_header(descr, f"({', '.join(map(str, shape))},)"), bytes(4)))])


def depth_bomb(rng: np.random.Generator) -> bytes:
    """Levels upon levels: maps, arrays, extensions, JSON, .npy headers."""
    depth = int(2 ** rng.uniform(4, 16))
    bombs = (
        b"\x91" * depth,
        b"\x81\xa1a" * depth + b"\x01",
        b"\xdd\x7f\xff\xff\xff" * depth,
        b"\xdf\x7f\xff\xff\xff\xa1a" * depth,
        struct.pack("<Q", 7 * depth) + b'{"a":' + b"[" * (7 * depth - 5),
        struct.pack("<Q", 5 * depth) + b'{"a":' * depth,
        zipped([("a.npy", npy("(" * min(depth, 60_000)))]),
        msgpack.packb({"a": msgpack.ExtType(1, b"\x93" + b"\x91" * depth)}) or b"",
    )
    return bombs[int(rng.integers(len(bombs)))]


def zip_bomb(rng: np.random.Generator) -> bytes:
    """Zeros that unpack a thousand-fold, sizes that lie, members upon members."""
    size = int(2 ** rng.uniform(10, 22))
    header = npy(npy_header(shape=f"({size // 4},)"))
    good = zipped([("a.npy", header + bytes(size // 4 * 4))], zipfile.ZIP_DEFLATED)
    lies = good.replace(struct.pack("<I", len(header) + size // 4 * 4), rng.bytes(3) + b"\x7f")
    many = [(f"{i}.npy", b"") for i in range(int(rng.integers(1, 300)))]
    quoted = zipped([("a.npy", good), ("b.npy", zipped([("a.npy", good)], zipfile.ZIP_DEFLATED))])
    return (good, lies, lies, zipped(many), quoted)[int(rng.integers(5))]


def path_trick(rng: np.random.Generator) -> bytes:
    """Members that point outside, twice the same, or under odd names."""
    names = (
        "../a.npy",
        "/a.npy",
        "C:\\a.npy",
        "a/../../b.npy",
        "..\\a.npy",
        "a.npy",
        "a.npy",
        "\x1b[2J.npy",
        ".npy",
        "",
    )
    chosen = [names[int(i)] for i in rng.integers(0, len(names), int(rng.integers(1, 4)))]
    return zipped([(name or "x", npy(npy_header(), bytes(4))) for name in chosen])


def hidden_pickle(rng: np.random.Generator) -> bytes:
    """A pickle that would leave a folder behind, wherever one could be loaded."""
    bomb = canary()
    objects = npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", bomb)
    text = json.dumps({"a": {"dtype": "U8", "shape": [len(bomb)], "data_offsets": [0, len(bomb)]}}).encode()
    forms = (
        bomb,
        zipped([("archive/data.pkl", bomb), ("archive/version", b"3")]),
        zipped([("a.npy", objects)]),
        zipped([("a.npy", bomb)]),
        msgpack.packb({"a": bomb, "b": msgpack.ExtType(int(rng.integers(0, 5)), bomb)}) or b"",
        struct.pack("<Q", len(text)) + text + bomb,
    )
    return forms[int(rng.integers(len(forms)))]


_CALLS = """builtins len, collections OrderedDict, torch._utils _rebuild_tensor_v2, numpy dtype,
torch._utils _rebuild_tensor_v3, torch._utils _rebuild_qtensor, torch._utils _rebuild_parameter, torch Size,
torch._tensor _rebuild_from_type_v2, torch.storage _load_from_bytes, torch FloatStorage, torch QInt8Storage,
numpy._core.multiarray _reconstruct, numpy._core.numeric _frombuffer, _codecs encode, torch per_tensor_affine,
torch per_channel_affine, torch float8_e4m3fn, torch._utils _rebuild_wrapper_subclass, __torch__ Net"""
_NAMES = b"w storage 0 _parameters _modules _buffers state qdata scale zero_point f4 < latin1".split()


def described(rng: np.random.Generator, depth: int = 0) -> bytes:
    """The instructions of a value: at random, with calls of all that rebuilds tensors."""
    values = lambda most: [described(rng, depth + 1) for _ in range(int(rng.integers(0, most)))]  # noqa: E731
    name = _NAMES[int(rng.integers(len(_NAMES)))]
    call = b"c" + b"\n".join(str(rng.choice(_CALLS.replace("\n", " ").split(", "))).encode().split()) + b"\n"
    text = b"\x8c" + bytes([len(name)]) + name
    whole = b"J" + int(rng.choice([0, 1, 2, 3, 4, -1, 2**31 - 1])).to_bytes(4, "little", signed=True)
    storage = b"(\x8c\x07storagectorch\nFloatStorage\n\x8c\x010\x8c\x03cpuK\x04tQ"
    kind = int(rng.integers(6 if depth > 5 else 14))
    if kind < 6:
        return (whole, whole, text, storage, call, b"C\x04\0\0\x80?")[kind]
    if kind < 8:
        return b"(" + whole * int(rng.integers(0, 4)) + b"t"
    if kind < 9:
        return b"(" + b"".join(values(5)) + (b"t", b"l")[int(rng.integers(2))]
    if kind < 10:
        return b"}(" + b"".join(b"\x8c\x01" + bytes([97 + n]) + value for n, value in enumerate(values(4))) + b"u"
    if kind < 11:
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + whole + b"(" + whole + b"t(" + whole + b"ttR"
    state = b"}" + text + described(rng, depth + 1) + b"sb" if kind < 12 else b""
    return call + b"(" + b"".join(values(8)) + b"tR" + state


def pickle_program(rng: np.random.Generator) -> bytes:
    """A pickle that calls what rebuilds tensors with anything; alone, as a legacy file or in a zip."""
    program = b"\x80\x04" + described(rng) + b"."
    heads = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    legacy = heads + program + pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + bytes(16)
    return (program, legacy, zipped([("a/data.pkl", program), ("a/data/0", bytes(16))]))[int(rng.integers(3))]


def noise(rng: np.random.Generator) -> bytes:
    return rng.bytes(int(rng.integers(0, 300)))


FORGERIES: tuple[Make, ...] = (
    forged_header, absurd_shapes, depth_bomb, zip_bomb, path_trick, hidden_pickle, pickle_program, noise
)  # fmt: skip
