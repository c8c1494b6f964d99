"""Reads ONNX: a protocol buffer that holds the nodes of a graph, and its tensors, mostly as their bytes in memory.

References:
  https://github.com/onnx/onnx/blob/main/onnx/onnx.proto for the numbers of fields;
  https://onnx.ai/onnx/operators/ for operators and their versions.
"""

import contextlib
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._sources import Source
from smark_jax.files.networks import graph as graphs
from smark_jax.files.networks.graph import Graph, Node, Tensor, Value
from smark_jax.files.networks.protobuf import ADVICE, BYTES, Reader, Span, expect

# By the numbers of TensorProto.DataType.
DTYPES = {
    number: _limits.DTYPES[name]
    for number, name in {
        1: "F32", 2: "U8", 3: "I8", 4: "U16", 5: "I16", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 12: "U32",
        13: "U64", 16: "BF16", 17: "F8_E4M3", 19: "F8_E5M2",
    }.items()
}  # fmt: skip
_STRINGS, _RAW, _EXTERNAL = 8, 9, 1
_MODEL_FIELDS = {*range(1, 9), 14, 20, 25, 26}
# Positions of arguments that are not weights: statistics, bounds, sizes.
_STATISTICS = {"BatchNormalization": (3, 4)}
_SETTINGS = {"Clip": (1, 2), "Pad": (2,), "Range": (0, 1, 2), "Dropout": (1,), "Pow": (1,)}


class Model(NamedTuple):
    """The parts of an ONNX file: the fields of its graph, and the version of its operators."""

    nodes: list[Node]
    tensors: dict[str, Tensor]
    inputs: dict[str, tuple[int | None, ...]]
    outputs: list[str]
    version: int


def matches(data: bytes) -> bool:
    """Whether the content is a message with the fields of an ONNX model, a graph among them."""
    if data[0] & 7 not in (0, 2):  # at a glance: no varint and no message begins here
        return False
    with contextlib.suppress(Unreadable):
        found = set()
        for number, _, _, _ in Reader(data).fields():
            found.add(number)
            if number not in _MODEL_FIELDS:
                return False
        return 7 in found
    return False


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The tensors by name."""
    del max_bytes  # each tensor is a piece of the file, but for small ones whose numbers are coded one by one
    model = _model(source.data)
    return graphs.all_leaves(model.tensors, _leaves(model))


def load(source: Source, max_bytes: int) -> Graph:
    """The network in a file.

    Raises:
      Unreadable: when the content is no ONNX model of one input, or is beyond a limit.
    """
    del max_bytes  # as for read
    model = _model(source.data)
    if len(model.inputs) != 1 or not model.outputs:
        raise Unreadable(f"it has {len(model.inputs)} inputs and {len(model.outputs)} outputs", "It must take images.")
    ((image, shape),) = model.inputs.items()
    graph = Graph(tuple(model.nodes), model.tensors, _leaves(model), image, shape, model.outputs[0])
    graph = graphs.needed(_without_softmax(graph))
    nodes = tuple(_of_version(node, model.version) for node in graph.nodes)
    return graph._replace(nodes=nodes)


def _without_softmax(graph: Graph) -> Graph:
    """Leaves out a last Softmax, so that the result is logits."""
    makers = {output: node for node in graph.nodes for output in node.outputs}
    last = makers.get(graph.output)
    if last is not None and last.op == "Softmax" and len(last.arguments) == 1 and isinstance(last.arguments[0], Value):
        return graph._replace(output=last.arguments[0].name)
    return graph


def _of_version(node: Node, version: int) -> Node:
    """A node whose operator or settings depend on the version of operators or on the number of results."""
    if node.op in ("Softmax", "LogSoftmax") and version < 13:
        return node._replace(op=f"{node.op} before version 13")
    if node.op == "Split" and len(node.arguments) < 2 and "split" not in node.settings:
        return node._replace(settings={"num_outputs": len(node.outputs), **node.settings})
    return node


def _leaves(model: Model) -> dict[str, str]:
    """The names in the tree of weights, by tensor: floating-point tensors but for numbers that only set something."""
    settings, statistics = set(), set()
    for node in model.nodes:
        for table, found in ((_SETTINGS, settings), (_STATISTICS, statistics)):
            places = [node.arguments[i] for i in table.get(node.op, ()) if i < len(node.arguments)]
            found.update(value.name for value in places if isinstance(value, Value))
    leaves = {}
    for name, tensor in model.tensors.items():
        array = tensor.array
        weight = not isinstance(array, Foreign) and array.size > 1 and np.issubdtype(_wide(array.dtype), np.floating)
        if weight and name not in settings:
            leaves[name] = graphs.leaf_name(name, name not in statistics)
    return leaves


def _wide(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32) if dtype in (DTYPES[16], DTYPES[17], DTYPES[19]) else dtype


def _model(data: bytes) -> Model:
    reader, spans, version = Reader(data), [], 1
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
            raise Unreadable("it has sparse tensors", "Export it with dense ones.")
    for name in model.tensors.keys() & model.inputs.keys():  # before version 4, tensors were listed as inputs too
        del model.inputs[name]
    return model


def _add_tensor(name: str, tensor: Tensor, model: Model) -> None:
    if name in model.tensors or not name:
        raise Unreadable(f"the tensor {shown(name)} occurs twice, or has no name", ADVICE)
    model.tensors[name] = tensor
    _limits.check_number(len(model.tensors))


def _add_node(reader: Reader, span: Span, model: Model) -> None:
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
        found = value if isinstance(value, Tensor) else Tensor(_as_array(value, name))
        return _add_tensor(outputs[0], found, model)
    for key, value in settings.items():
        if isinstance(value, Tensor):
            settings[key] = value.array
    arguments = tuple(Value(name) if name else None for name in inputs)
    model.nodes.append(Node(op, name or outputs[0], arguments, settings, tuple(outputs)))


def _as_array(value: Any, node: str) -> np.ndarray:
    """The array of a constant that is given as a number or a list of numbers."""
    kinds = value if isinstance(value, list) else [value]
    expect(value is not None and all(type(kind) in (int, float) for kind in kinds), "the constant", node)
    return np.asarray(value, np.float32 if any(isinstance(kind, float) for kind in kinds) else np.int64)


def _attribute(reader: Reader, span: Span) -> tuple[str, Any]:
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
            found[2] = reader.integers(wire, value, place)[0]
        elif number == 4:
            found[3] = reader.text(place)
        elif number == 5:
            found[4] = _tensor(reader, place)[1]
        elif number == 7:
            floats += reader.floats(wire, place).tolist()
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


def _tensor(reader: Reader, span: Span) -> tuple[str, Tensor]:
    """A tensor and its name."""
    name, kind, shape, raw, external = "", 0, [], None, False
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
        elif number in (_STRINGS, _RAW):
            expect(wire == BYTES, f"field {number}", "a tensor")
            name, raw = (reader.name(place), raw) if number == 8 else (name, place)
        elif number == 10 and wire == BYTES:
            raw = place  # packed doubles have the bytes that raw data has
        elif number == 14:
            external = value == _EXTERNAL
    if external:
        raise Unreadable(f"the numbers of {shown(name)} lie in another file", "Save it as one file (onnx.save_model).")
    dtype = DTYPES.get(kind)
    if dtype is None:
        return name, Tensor(Foreign(f"tensor {shown(name)} is of data type {kind}", "Export it with float weights."))
    if len(floats) == 1 and raw is None:
        raw = floats[0][1]
    elif floats and raw is None:
        packed = np.concatenate([values for values, _ in floats]).astype(dtype)
        return name, Tensor(packed.reshape(_limits.check_shape(name, shape, dtype, packed.nbytes)))
    if raw is not None:
        whole = _limits.check_shape(name, shape, dtype, raw[1] - raw[0])
        return name, Tensor(np.frombuffer(reader.data[raw[0] : raw[1]], dtype).reshape(whole).copy(), raw)
    return name, Tensor(_coded(name, integers, dtype, shape))


def _coded(name: str, integers: list[int], dtype: np.dtype, shape: list[int]) -> np.ndarray:
    """The array of numbers that are coded one by one; two-byte floats are coded by their bits."""
    halves = dtype in (DTYPES[10], DTYPES[16])
    with np.errstate(all="ignore"):
        numbers = np.array(integers, np.int64)
        array = numbers.astype(np.uint16).view(dtype) if halves else numbers.astype(dtype)
    return array.reshape(_limits.check_shape(name, shape, dtype, array.nbytes))
