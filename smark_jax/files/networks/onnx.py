"""Reads ONNX: a graph whose nodes name an operator each, and tensors, mostly as their bytes in memory.

References:
  https://onnx.ai/onnx/operators/ for operators and their versions.
"""

import contextlib

import numpy as np

from smark_jax.errors import Unreadable
from smark_jax.files import _limits
from smark_jax.files._limits import Foreign
from smark_jax.files._places import Places
from smark_jax.files._sources import Source
from smark_jax.files.networks import graph as graphs
from smark_jax.files.networks import onnx_blocked, onnx_model, onnx_packed, onnx_quantised
from smark_jax.files.networks.graph import Graph, Node, Value
from smark_jax.files.networks.onnx_model import DTYPES, Model
from smark_jax.files.networks.protobuf import Reader

_MODEL_FIELDS = {*range(1, 9), 14, 20, 25, 26}
# Positions of arguments that are not weights: statistics, bounds, sizes.
_STATISTICS = {"BatchNormalization": (3, 4)}
_SETTINGS = {"Clip": (1, 2), "Pad": (2,), "Range": (0, 1, 2), "Dropout": (1,), "Pow": (1,), "Resize": (1, 2, 3),
             "Upsample": (1,)}  # fmt: skip


def matches(data: bytes) -> bool:
    """Whether the content is a message with the fields of an ONNX model, a graph among them; others may follow."""
    if data[0] & 7 not in (0, 2):  # at a glance: no varint and no message begins here
        return False
    with contextlib.suppress(Unreadable):
        found = set()
        for number, _, _, _ in Reader(data).fields():
            found.add(number)
            if number not in _MODEL_FIELDS and not found >= {1, 7, 8}:
                return False
        return 7 in found
    return False


def read(source: Source, max_bytes: int) -> dict[str, np.ndarray | Foreign]:
    """The tensors by name."""
    model = _model(source, max_bytes)
    return graphs.all_leaves(model.tensors, _leaves(model))


def places(source: Source) -> Places:
    """Where the tensors lie, by name."""
    model = _model(source, _limits.ANY_SIZE)
    return graphs.all_places(model.tensors, _leaves(model))


def load(source: Source, max_bytes: int) -> Graph:
    """The network in a file.

    Raises:
      Unreadable: when the content is no ONNX model of one input, or is beyond a limit.
    """
    model = _model(source, max_bytes)
    if len(model.inputs) != 1 or not model.outputs:
        raise Unreadable(f"it has {len(model.inputs)} inputs and {len(model.outputs)} outputs", "It must take images.")
    ((image, shape),) = model.inputs.items()
    graph = Graph(tuple(model.nodes), model.tensors, _leaves(model), image, shape, model.outputs[0])
    graph = graphs.needed(graphs.without_softmax(graph, "Softmax", ("Identity", "QuantizeLinear", "DequantizeLinear")))
    nodes = tuple(_of_version(node, model.version) for node in graph.nodes)
    return graph._replace(nodes=nodes)


def _model(source: Source, max_bytes: int) -> Model:
    """The graph on real numbers in their usual order."""
    plain = onnx_packed.unpacked(onnx_blocked.unblocked(onnx_model.parsed(source, max_bytes)))
    return onnx_quantised.lowered(plain, max_bytes)


def _of_version(node: Node, version: int) -> Node:
    """A node whose operator or settings depend on the version of operators or on the number of results."""
    if node.op in ("Softmax", "LogSoftmax") and version < 13:
        return node._replace(op=f"{node.op} before version 13")
    if node.op == "Resize" and version < 11:
        return node._replace(op="Resize before version 11")
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
