"""Reads TensorFlow Lite: tensors, most of them as their bytes in memory, and the operators of a graph.

A quantised tensor is read as the real numbers :math:`s (q - z)` that its whole numbers q stand for, with a scale s and
a zero point z for the whole tensor or for each channel. A quantised network is run in real numbers, too: its results
differ from the runtime's by the rounding of activations.

References:
  https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits, _places
from smark_jax.files._limits import Foreign, shown
from smark_jax.files._sources import Source
from smark_jax.files.networks import graph as graphs
from smark_jax.files.networks import tflite_schema
from smark_jax.files.networks.flatbuffer import ADVICE, Reader, Span, Table
from smark_jax.files.networks.graph import Graph, Node, Tensor, Value

_INT4 = 17  # two numbers in a byte, the lower half first
# By the numbers of the schema's TensorType.
DTYPES = {
    number: _limits.DTYPES[name]
    for number, name in {
        0: "F32", 1: "F16", 2: "I32", 3: "U8", 4: "I64", 6: "BOOL", 7: "I16", 9: "I8", 10: "F64", 12: "U64", 15: "U32",
        16: "U16", _INT4: "I8", 18: "BF16",
    }.items()
}  # fmt: skip
_FLOATS = (0, 1, 10, 18)
_MAX_NAME = 900
_MOST_UNPACKED = 8  # bytes of float32 for a byte of two four-bit numbers


class _Leaf(NamedTuple):
    """A tensor whose numbers are in the file.

    Attributes:
      name: in the tree of weights.
      numbers: its entries in the graph's list of tensors; those of one type and shape over the same bytes are one leaf.
      tensor: what it holds, and where that lies unless it is quantised.
      carries: whether it is a weight. One that is written in place and shares its bytes with another leaf is not: a
        mark would change both.
    """

    name: str
    numbers: Sequence[int]
    tensor: Tensor
    carries: bool


def matches(data: bytes) -> bool:
    """Whether the content has the mark of TensorFlow Lite."""
    return data[4:8] == b"TFL3"


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The tensors by name."""
    root = Reader(source.data).root()
    return {leaf.name: leaf.tensor.array for leaf in _leaves(root, _graph(root), max_bytes)}


def places(source: Source) -> _places.Places:
    """Where the tensors lie that are not quantised."""
    root = Reader(source.data).root()
    leaves = _leaves(root, _graph(root), _MOST_UNPACKED * len(source.data))
    return {leaf.name: leaf.tensor.place for leaf in leaves if not isinstance(leaf.tensor.array, Foreign)}


def load(source: Source, max_bytes: int) -> Graph:
    """The network in a file.

    Raises:
      Unreadable: when the content is no model of one input, or is beyond a limit.
    """
    root = Reader(source.data).root()
    graph = _graph(root)
    inputs, outputs = graph.integers(1), graph.integers(2)
    if len(inputs) != 1 or not outputs:
        raise Unreadable(f"it has {len(inputs)} inputs and {len(outputs)} outputs", "It must take images.")
    codes, tables = [tflite_schema.name(code) for code in root.tables(1)], graph.tables(0)
    values = [Value(str(number)) for number in range(len(tables))]
    nodes = [_node(operator, codes, tables, values) for operator in graph.tables(3, graphs.MAX_NODES)]
    found = _leaves(root, graph, max_bytes)
    tensors = {str(number): leaf.tensor for leaf in found for number in leaf.numbers}
    weights = {str(number): leaf.name for leaf in found for number in leaf.numbers if leaf.carries}
    image, result = _at(tables, inputs[0], "tensor"), _at(values, outputs[0], "tensor")
    shape = tuple(n if n > 0 else None for n in image.integers(7) or image.integers(0))
    network = Graph(tuple(nodes), tensors, weights, str(inputs[0]), shape, result.name)
    return graphs.needed(graphs.without_softmax(network, "SOFTMAX", ("QUANTIZE", "DEQUANTIZE")))


def _graph(root: Table) -> Table:
    """The first graph, which is the network; others are the branches of its conditions and loops."""
    return _at(root.tables(2), 0, "graph")


def _node(operator: Table, codes: list[str], tensors: list[Table], values: list[Value]) -> Node:
    op = _at(codes, operator.number(0, "<I"), "operator")
    arguments = tuple(None if number == -1 else _at(values, number, "tensor") for number in operator.integers(1))
    outputs = operator.integers(2)
    results = tuple(_at(values, number, "tensor").name for number in outputs)
    name = tensors[outputs[0]].text(3) if outputs else op
    return Node(op, name, arguments, tflite_schema.settings(op, operator.table(4)), results)


def _at(entries: list[Any], number: int, what: str) -> Any:
    if not 0 <= number < len(entries):
        raise Unreadable(f"it names {what} {number:,} of {len(entries):,}", ADVICE)
    return entries[number]


def _leaves(root: Table, graph: Table, max_bytes: int) -> list[_Leaf]:
    """The tensors of a graph whose numbers are in the file; together they take at most ``max_bytes``."""
    buffers, tables = [_buffer(table) for table in root.tables(4)], graph.tables(0)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, table in enumerate(tables):
        span, shape = _at(buffers, table.number(2, "<I"), "buffer"), tuple(table.integers(0))
        if span.start < span.end or 0 in shape:  # else it is the image, or the result of a node
            apart = None if _quantisation(table) is None else number
            groups.setdefault((span, table.number(1, "b"), shape, apart), []).append(number)
    _limits.check_number(len(groups))
    owners = Counter(span for span, *_ in groups)
    names = _names({numbers[0]: tables[numbers[0]].text(3) for numbers in groups.values()})
    found = []
    for (span, kind, shape, _), numbers in groups.items():
        name = names[numbers[0]]
        tensor = _tensor(name, tables[numbers[0]], span, shape, max_bytes)
        array, carries = tensor.array, False
        if not isinstance(array, Foreign):
            max_bytes -= array.nbytes
            is_real = array.size > 1 and array.dtype in [DTYPES[n] for n in _FLOATS]
            carries = is_real and (array.dtype != DTYPES[kind] or owners[span] == 1)
        found.append(_Leaf(graphs.leaf_name(name, carries), numbers, tensor, carries))
    _limits.check_names(leaf.name for leaf in found)
    return found


def _names(texts: dict[int, str]) -> dict[int, str]:
    """A name for each tensor by its number, which is added where a name is not alone or begins another's path."""
    texts = {number: text[:_MAX_NAME] or "tensor" for number, text in texts.items()}
    counts = Counter(texts.values())
    # In this order the paths that a name begins follow it at once.
    paths = sorted(f"{text}/" for text in counts)
    begins = {name[:-1] for name, following in itertools.pairwise(paths) if following.startswith(name)}
    alone = {text for text, count in counts.items() if count == 1 and text not in begins}
    return {n: _limits.check_name(text if text in alone else f"{text}:{n}") for n, text in texts.items()}


def _buffer(table: Table) -> Span:
    """Where the bytes of a buffer lie: in its vector or, in files above 2 GB, after all tables."""
    start, size = table.number(1, "<Q"), table.number(2, "<Q")
    if start <= 1:
        return table.span(0)
    if start + size > len(table.reader.data):
        raise Unreadable(f"its buffer at byte {start:,} does not fit into the file", ADVICE)
    return Span(start, start + size)


def _quantisation(table: Table) -> Table | None:
    """How a tensor's whole numbers stand for real ones, if they do."""
    found = table.table(4)
    return None if found is None or table.number(1, "b") in _FLOATS or not len(found.vector(2, "<f4")) else found


def _tensor(name: str, table: Table, span: Span, shape: tuple[int, ...], max_bytes: int) -> Tensor:
    """A tensor, which takes at most ``max_bytes``."""
    kind, quantisation = table.number(1, "b"), _quantisation(table)
    dtype = DTYPES.get(kind)
    if dtype is None:
        return Tensor(Foreign(f"tensor {shown(name)} is of type {kind}", "Convert it with float weights."))
    if table.table(6) is not None or table.number(10, "<I"):
        return Tensor(Foreign(f"tensor {shown(name)} is sparse, or in another file", "Convert it with dense weights."))
    length, size = span.end - span.start, math.prod(shape)
    packed = kind == _INT4 and length == -(-size // 2)
    _limits.check_shape(name, shape, dtype, size if packed else length)
    if size * (dtype.itemsize if quantisation is None else 4) > max_bytes:
        raise _limits.too_large("its tensors take more bytes than are allowed")
    array: Any = np.frombuffer(table.reader.data, np.int8 if packed else dtype, length if packed else size, span.start)
    if packed:
        array = np.stack([array << 4, array], -1).reshape(-1)[:size] >> 4
    if quantisation is None:
        return Tensor(array.reshape(shape).copy(), _places.in_order(span.start, array.dtype, shape))
    return Tensor(_dequantised(name, array.reshape(shape), quantisation), _places.Unwritable.QUANTISED)


def _dequantised(name: str, numbers: np.ndarray, quantisation: Table) -> np.ndarray | Foreign:
    """The real numbers that whole numbers stand for, in float32."""
    if quantisation.number(4, "b"):
        return Foreign(
            f"tensor {shown(name)} is quantised in a rare way", "Convert it with one scale for each channel."
        )
    scales, zeros, axis = quantisation.vector(2, "<f4"), quantisation.vector(3, "<i8"), quantisation.number(6, "<i")
    channels = numbers.shape[axis] if 0 <= axis < numbers.ndim else 1
    if len(scales) not in (1, channels) or len(zeros) not in (0, 1, channels):
        raise Unreadable(f"tensor {shown(name)} of shape {shown(numbers.shape)} has {len(scales):,} scales", ADVICE)
    along = lambda numbers_: numbers_.astype(np.float32).reshape(-1, *[1] * (numbers.ndim - 1 - axis))  # noqa: E731
    with np.errstate(all="ignore"):
        real = numbers.astype(np.float32)
        if zeros.any():
            real -= along(zeros) if len(zeros) > 1 else np.float32(zeros[0])
        real *= along(scales) if len(scales) > 1 else scales[0]
    return real
