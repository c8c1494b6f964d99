"""The parts of an ONNX file: a protocol buffer that holds the nodes of a graph, and its tensors.

References:
  https://github.com/onnx/onnx/blob/main/onnx/onnx.proto for the numbers of fields.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _places
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._sources import Source
from smark_jax.files.networks import graph as graphs
from smark_jax.files.networks.graph import Node, Tensor, Value
from smark_jax.files.networks.protobuf import ADVICE, BYTES, Reader, Span, expect

# By the numbers of TensorProto.DataType.
DTYPES = {
    number: _limits.DTYPES[name]
    for number, name in {
        1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
        13: "U64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2",
    }.items()
}  # fmt: skip
_HALF_BYTES = {21: np.dtype(np.uint8), 22: np.dtype(np.int8)}  # in four bits each; they are read into eight
_NAME, _RAW, _EXTERNAL = 8, 9, 1


class Model(NamedTuple):
    """The parts of an ONNX file: the fields of its graph, and the version of its operators."""

    nodes: list[Node]
    tensors: dict[str, Tensor]
    inputs: dict[str, tuple[int | None, ...]]
    outputs: list[str]
    version: int


def array(value: Any, tensors: Mapping[str, Tensor]) -> np.ndarray | None:
    """The numbers of an argument that is a constant; None if it is none."""
    tensor = tensors.get(value.name) if isinstance(value, Value) else None
    return None if tensor is None or isinstance(tensor.array, Foreign) else tensor.array


class _Reader(Reader):
    """Reads the messages of an ONNX file, whose tensors together take ``max_bytes`` at most."""

    def __init__(self, source: Source, max_bytes: int) -> None:
        super().__init__(source.data)
        self.source, self._left = source, max_bytes

    def take(self, size: int) -> None:
        """Counts the bytes of a tensor that is about to be made."""
        self._left -= size
        if self._left < 0:
            raise _limits.too_large("its tensors take more bytes than are allowed")


def parsed(source: Source, max_bytes: int) -> Model:
    """The parts of a file; its tensors may lie in files beside it.

    Raises:
      Unreadable: when the content is no ONNX model, or is beyond a limit.
    """
    reader, spans, version = _Reader(source, max_bytes), [], 1
    for number, wire, _, span in reader.fields():
        if number == 7:
            expect(wire == BYTES, "the graph", "the model")
            spans.append(span)
        elif number == 8:
            domain, found = "", 1
            for part, _, value, place in reader.fields(span):
                domain, found = (reader.name(place), found) if part == 1 else (domain, value if part == 2 else found)
            version = found if domain in ("", "ai.onnx") else version
    if len(spans) != 1:
        raise Unreadable(f"it has {len(spans)} graphs", ADVICE)
    model = Model([], {}, {}, [], version)
    for number, wire, _, span in reader.fields(spans[0]):
        if number in (1, 5, 11, 12):
            expect(wire == BYTES, f"field {number}", "the graph")
        if number == 1:
            _add_node(reader, span, model)
        elif number == 5:
            _add_tensor(*_tensor(reader, span), model)
        elif number == 11:
            name, shape = _input(reader, span)
            model.inputs[name] = shape
        elif number == 12:
            model.outputs.append(_input(reader, span)[0])
        elif number == 15:
            _add_tensor(*_sparse(reader, span), model)
    for name in model.tensors.keys() & model.inputs.keys():  # before version 4, tensors were listed as inputs too
        del model.inputs[name]
    return model


def _add_tensor(name: str, tensor: Tensor, model: Model) -> None:
    """Adds a tensor; of several with one name the last counts, as in onnxruntime, and the others are no weights."""
    if name in model.tensors or not name:
        odd = Foreign(f"a tensor {shown(name)} occurs twice, or has no name", ADVICE)
        model.tensors[f"{name} ({len(model.tensors)})"] = Tensor(odd)
    if name:
        model.tensors[name] = tensor
    _limits.check_number(len(model.tensors))


def _sparse(reader: _Reader, span: Span) -> tuple[str, Tensor]:
    """A tensor of zeros but for some values (1, whose name it has) at places (2), and its shape (3)."""
    parts: dict[int, tuple[str, Tensor]] = {}
    shape: list[int] = []
    for number, wire, value, place in reader.fields(span):
        if number == 3:
            shape += reader.integers(wire, value, place)
        elif number in (1, 2):
            expect(wire == BYTES, f"field {number}", "a sparse tensor")
            parts[number] = _tensor(reader, place)
    expect(len(parts) == 2, "the parts", "a sparse tensor")
    (name, (values, _)), (_, (places, _)) = parts[1], parts[2]
    if isinstance(values, Foreign) or isinstance(places, Foreign):
        return name, Tensor(Foreign(f"the sparse tensor {shown(name)} holds no numbers", "Export it with dense ones."))
    whole = _limits.check_shape(name, shape, values.dtype, values.dtype.itemsize * math.prod(shape))
    reader.take(values.dtype.itemsize * math.prod(whole) + 8 * places.size)
    fits = values.ndim == 1 and np.issubdtype(places.dtype, np.integer) and len(whole) > 0
    fits = fits and places.shape in ((len(values),), (len(values), len(whole)))
    expect(fits, "the places", name)
    places = places.astype(np.int64)  # onnxruntime writes narrower ones where they fit
    limits = np.array(math.prod(whole) if places.ndim == 1 else whole, np.int64)
    expect(bool(((places >= 0) & (places < limits)).all()), "the places", name)
    dense = np.zeros(whole, values.dtype)
    if places.ndim == 1:
        dense.reshape(-1)[places] = values
    else:
        dense[tuple(places.T)] = values
    return name, Tensor(dense)


def _add_node(reader: _Reader, span: Span, model: Model) -> None:
    """Adds a node to a model; a constant becomes a tensor."""
    inputs, outputs, texts, settings = [], [], {3: "", 4: "", 7: ""}, {}
    for number, wire, _, place in reader.fields(span):
        if number in (1, 2, 3, 4, 5, 7):
            expect(wire == BYTES, f"field {number}", "a node")
        if number == 1:
            inputs.append(reader.name(place))
        elif number == 2:
            outputs.append(reader.name(place))
        elif number in texts:
            texts[number] = reader.name(place)
        elif number == 5:
            key, value = _attribute(reader, place)
            settings[key] = value
    name, op, domain = texts[3], texts[4], texts[7]
    if domain not in ("", "ai.onnx"):
        op = f"{domain}.{op}"
    if len(outputs) == 0 or len(model.nodes) >= graphs.MAX_NODES:
        raise Unreadable(f"node {shown(name)} makes nothing, or is one of more than {graphs.MAX_NODES:,}", ADVICE)
    if op == "Constant":
        value = next((value for key, value in settings.items() if key.startswith("value")), None)
        found = value if isinstance(value, Tensor) else Tensor(_as_array(value, outputs[0]))
        return _add_tensor(outputs[0], found, model)
    for key, value in settings.items():
        if isinstance(value, Tensor):
            settings[key] = value.array
    arguments = tuple(Value(name) if name else None for name in inputs)
    model.nodes.append(Node(op, name or outputs[0], arguments, settings, tuple(outputs)))


def _as_array(value: Any, name: str) -> np.ndarray | Foreign:
    """The array of a constant that is given as a number or a list of numbers."""
    kinds = value if isinstance(value, list) else [value]
    if value is None or not all(type(kind) in (int, float) for kind in kinds):
        return Foreign(f"the constant {shown(name)} is of another kind than numbers", "Export it with float weights.")
    return np.asarray(value, np.float32 if any(isinstance(kind, float) for kind in kinds) else np.int64)


def _attribute(reader: _Reader, span: Span) -> tuple[str, Any]:
    """A setting of a node: a number, text, a tensor, or a list of numbers; what is none of these stands as its kind."""
    name, kind, found = "", 0, {}
    integers: list[int] = []
    floats: list[float] = []
    for number, wire, value, place in reader.fields(span):
        if number in (1, 4, 5):
            expect(wire == BYTES, f"field {number}", "an attribute")
        if number == 1:
            name = reader.name(place)
        elif number == 20:
            kind = value
        elif number == 2:
            found[1] = reader.one_float(wire, place)
        elif number == 3:
            numbers = reader.integers(wire, value, place)
            expect(bool(numbers), "the number", "a setting")
            found[2] = numbers[0]
        elif number == 4:
            found[3] = reader.text(place)
        elif number == 5:
            found[4] = _tensor(reader, place)[1]
        elif number == 7:
            floats += reader.listed_floats(wire, place)
        elif number == 8:
            integers += reader.integers(wire, value, place)
    lists = {6: floats, 7: integers}
    absent = {1: 0.0, 2: 0, 3: ""}
    if kind == 0:  # before the format had kinds
        kind = next(iter(found), 6 if floats else 7)
    return name, lists[kind] if kind in lists else found.get(kind, absent.get(kind, f"attribute of type {kind}"))


def _input(reader: Reader, span: Span) -> tuple[str, tuple[int | None, ...]]:
    """The name and shape of an input or output: in its type (2), a tensor (1), a shape (2), axes (1), lengths (1)."""
    name, shape = "", []
    for number, wire, _, place in reader.fields(span):
        if number == 1:
            expect(wire == BYTES, "the name", "an input")
            name = reader.name(place)
        elif number == 2 and wire == BYTES:
            tensors = _messages(reader, place, 1)
            shapes = [found for tensor in tensors for found in _messages(reader, tensor, 2)]
            for axis in (found for one in shapes for found in _messages(reader, one, 1)):
                lengths = [value for part, _, value, _ in reader.fields(axis) if part == 1]
                shape.append(lengths[0] if lengths and 0 < lengths[0] < 2**31 else None)
    return name, tuple(shape)


def _messages(reader: Reader, span: Span, number: int) -> list[Span]:
    return [place for found, wire, _, place in reader.fields(span) if found == number and wire == BYTES]


def _tensor(reader: _Reader, span: Span) -> tuple[str, Tensor]:
    """A tensor and its name."""
    name, kind, shape, raw, outside = "", 0, [], None, False
    entries: dict[str, str] = {}
    floats: list[tuple[np.ndarray, Span]] = []
    integers: list[int] = []
    for number, wire, value, place in reader.fields(span):
        if number == 1:
            shape += reader.integers(wire, value, place)
        elif number == 2:
            kind = value
        elif number == 4:
            floats.append((reader.floats(wire, place), place))
        elif number in (5, 7, 11):
            integers += reader.integers(wire, value, place)
        elif number in (_NAME, _RAW):
            expect(wire == BYTES, f"field {number}", "a tensor")
            name, raw = (reader.name(place), raw) if number == _NAME else (name, place)
        elif number == 10 and wire == BYTES:
            raw = place  # packed doubles have the bytes that raw data has
        elif number == 13 and wire == BYTES:
            texts = {part: reader.text(found) for part, kind_, _, found in reader.fields(place) if kind_ == BYTES}
            entries[texts.get(1, "")] = texts.get(2, "")
        elif number == 14:
            outside = value == _EXTERNAL
    dtype = DTYPES.get(kind) or _HALF_BYTES.get(kind)
    if dtype is None:
        return name, Tensor(Foreign(f"tensor {shown(name)} is of data type {kind}", "Export it with float weights."))
    if outside:
        return name, _outside(reader, name, kind, shape, entries)
    if len(floats) == 1 and raw is None:
        raw = floats[0][1]
    elif floats and raw is None:
        whole = _limits.check_shape(name, shape, dtype, dtype.itemsize * sum(len(values) for values, _ in floats))
        reader.take(dtype.itemsize * math.prod(whole))
        return name, Tensor(np.concatenate([values for values, _ in floats], dtype=dtype).reshape(whole))
    if raw is not None:
        return name, _raw(reader, name, kind, shape, reader.data, raw)
    coded = _coded(name, integers, dtype, shape)
    reader.take(coded.nbytes)
    return name, Tensor(coded)


def _outside(reader: _Reader, name: str, kind: int, shape: list[int], entries: dict[str, str]) -> Tensor:
    """A tensor whose numbers lie in a file beside the main one, which entries name."""
    file, start, length = (entries.get(key, "") for key in ("location", "offset", "length"))
    numbers = (start or "0", length or "0")
    if not all(number.isascii() and number.isdecimal() and len(number) < 16 for number in numbers):
        raise Unreadable(f"the numbers of {shown(name)} lie at byte {shown(start)} of another file", ADVICE)
    content, first, size = reader.source.beside(file), *map(int, numbers)
    end = first + size if length else len(content)
    if not first <= end <= len(content):
        raise Unreadable(f"the numbers of {shown(name)} lie behind the end of {shown(file)}", ADVICE)
    return _raw(reader, name, kind, shape, memoryview(content), (first, end), file)


def _raw(
    reader: _Reader, name: str, kind: int, shape: list[int], content: memoryview, span: Span, file: str = ""
) -> Tensor:
    """A tensor whose numbers lie side by side in a file."""
    start, end = span
    if kind in _HALF_BYTES:
        size = math.prod(_limits.check_shape(name, shape, _HALF_BYTES[kind], math.prod(shape)))
        expect(end - start == -(-size // 2), "the length", name)
        reader.take(3 * size)  # with what it takes to unpack them
        pairs: Any = np.frombuffer(content[start:end], _HALF_BYTES[kind])  # the first of two is in the lower bits
        return Tensor((np.stack([pairs << 4, pairs], -1).reshape(-1)[:size] >> 4).reshape(shape))
    whole = _limits.check_shape(name, shape, DTYPES[kind], end - start)
    reader.take(end - start)
    array = np.frombuffer(content[start:end], DTYPES[kind]).reshape(whole).copy()
    return Tensor(array, _places.in_order(start, array.dtype, whole, file))


def _coded(name: str, integers: list[int], dtype: np.dtype, shape: list[int]) -> np.ndarray:
    """The array of numbers that are coded one by one; two-byte floats are coded by their bits."""
    halves = dtype in (DTYPES[10], DTYPES[16])
    with np.errstate(all="ignore"):
        numbers = np.array(integers, np.int64)
        array = numbers.astype(np.uint16).view(dtype) if halves else numbers.astype(dtype)
    return array.reshape(_limits.check_shape(name, shape, dtype, array.nbytes))
