"""Writes networks as TFLite by hand, from the descriptions of FlatBuffers and of TFLite's schema alone."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# By the schema's TensorType.
DTYPES = {"f4": 0, "f2": 1, "i4": 2, "u1": 3, "i8": 4, "b1": 6, "i2": 7, "i1": 9}


class Number(NamedTuple):
    """A number in a table, of a kind of the module ``struct``."""

    kind: str
    value: Any


def byte(value: int) -> Number:
    return Number("<b", value)


def whole(value: int) -> Number:
    return Number("<i", value)


def real(value: float) -> Number:
    return Number("<f", value)


def flatbuffer(root: Mapping[int, Any], mark: bytes) -> bytes:
    """A file whose root table has these fields: numbers, texts, arrays, tables (dicts) and lists of tables."""
    out = bytearray(4) + mark
    struct.pack_into("<I", out, 0, _placed(out, root))
    return bytes(out)


def _padded(out: bytearray, to: int, plus: int = 0) -> None:
    out += bytes(-(len(out) + plus) % to)


def _placed(out: bytearray, value: Any) -> int:
    """Appends what a field refers to, and gives its position."""
    if isinstance(value, Mapping):
        return _table(out, value)
    if isinstance(value, list):
        _padded(out, 4)
        start = len(out)
        out += struct.pack("<I", len(value)) + bytes(4 * len(value))
        places: dict[int, int] = {}  # an entry that a list has several times is written once
        for place, entry in zip(range(start + 4, start + 4 + 4 * len(value), 4), value, strict=True):
            if id(entry) not in places:
                places[id(entry)] = _placed(out, entry)
            struct.pack_into("<I", out, place, places[id(entry)] - place)
        return start
    content = value.encode() + b"\0" if isinstance(value, str) else np.ascontiguousarray(value).tobytes()
    _padded(out, 16, 4)
    start = len(out)
    out += struct.pack("<I", len(value)) + content
    return start


def _table(out: bytearray, fields: Mapping[int, Any]) -> int:
    places, size = [0] * (1 + max(fields, default=-1)), 4
    for field, value in fields.items():
        width = struct.calcsize(value.kind) if isinstance(value, Number) else 4
        places[field] = size = -(-size // width) * width
        size += width
    _padded(out, 8, 4 + 2 * len(places))
    start = len(out) + 4 + 2 * len(places)
    out += struct.pack(f"<HH{len(places)}Hi", 4 + 2 * len(places), size, *places, 4 + 2 * len(places)) + bytes(size - 4)
    for field, value in fields.items():
        place = start + places[field]
        if isinstance(value, Number):
            struct.pack_into(value.kind, out, place, value.value)
        else:
            struct.pack_into("<I", out, place, _placed(out, value) - place)
    return start


class Step(NamedTuple):
    """An operator by its number, with inputs and outputs by name; ``options`` by field, of a table of a type."""

    op: int
    inputs: Sequence[str]
    outputs: Sequence[str]
    options: Mapping[int, Any] = {}
    options_type: int = 0
    version: int = 1


def quantised(scales: Any, zeros: Any, axis: int = 0) -> dict[int, Any]:
    """How a tensor is quantised."""
    return {2: np.float32(scales).reshape(-1), 3: np.int64(zeros).reshape(-1), 6: whole(axis)}


def tflite(
    steps: Sequence[Step],
    tensors: Mapping[str, np.ndarray],
    image: Sequence[int],
    outputs: Sequence[str],
    quantisation: Mapping[str, Mapping[int, Any]] | None = None,
    change: Mapping[str, Mapping[int, Any]] | None = None,
) -> bytes:
    """A model whose input is called ``x``.

    Args:
      steps: the operators in order.
      tensors: constants by name.
      image: the input's shape; -1 for any length.
      outputs: names of results.
      quantisation: of constants, by name.
      change: further fields of tensors, by name.
    """
    names = ["x", *tensors, *(name for step in steps for name in step.outputs)]
    number = {name: i for i, name in enumerate(names)}
    buffers, entries = [{}], []
    for name in names:
        entry: dict[int, Any] = {3: name, 1: byte(0), 2: Number("<I", 0)}
        if name == "x":
            entry |= {0: np.maximum(np.int32(image), 1), 7: np.int32(image)}
        if name in tensors:
            array = tensors[name]
            entry |= {0: np.int32(array.shape), 1: byte(DTYPES[array.dtype.str[1:]]), 2: Number("<I", len(buffers))}
            buffers.append({0: np.frombuffer(array.tobytes(), np.uint8)})
        entry |= {4: quantisation[name]} if quantisation and name in quantisation else {}
        entries.append(entry | dict((change or {}).get(name, {})))
    versions = {step.op: step.version for step in steps}
    codes = sorted(versions)
    operators = []
    for step in steps:
        found: dict[int, Any] = {0: Number("<I", codes.index(step.op))}
        found |= {
            1 + i: np.int32([number.get(n, -1) for n in part]) for i, part in enumerate((step.inputs, step.outputs))
        }
        if step.options_type:
            found |= {3: Number("<B", step.options_type), 4: step.options}
        operators.append(found)
    ends = {1: np.int32([0]), 2: np.int32([number.get(name, name) for name in outputs])}
    graph = {0: entries, **ends, 3: operators}
    listed = [{0: byte(min(code, 127)), 2: whole(versions[code]), 3: whole(code)} for code in codes]
    return flatbuffer({0: Number("<I", 3), 1: listed, 2: [graph], 4: buffers}, b"TFL3")
