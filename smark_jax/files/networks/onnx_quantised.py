"""Quantised ONNX graphs as graphs of real numbers: each quantised weight becomes the float32 leaf that it stands for.

A tensor q of whole numbers stands for ``(q - zero_point) * scale``, with one scale for the whole tensor, for each entry
of an axis, or for each block of them. Quantisers write graphs in three forms:

- QDQ: ``DequantizeLinear`` before and ``QuantizeLinear`` behind operators on real numbers;
- QOperator: operators on whole numbers that take the scales of their operands and of their result;
- dynamic: products of whole numbers, which later nodes multiply by both scales.

All become QDQ here, and then each ``DequantizeLinear`` of a constant becomes a leaf.

References:
  https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
  https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import functools
import operator
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from smark_jax.files import _limits, _scaled
from smark_jax.files._places import Unwritable
from smark_jax.files.networks.graph import Node, Tensor, Value, references
from smark_jax.files.networks.onnx_model import Model, array

_MICROSOFT = "com.microsoft."
_SUFFIX = re.compile("_quantized$|(_DQ)?_Q[248]$")  # which onnxruntime adds to the name of a weight
_SCALES = "product of scales"  # a node of ours


class _Form(NamedTuple):
    """How an operator on whole numbers takes its operands and gives its result: positions among its arguments.

    Attributes:
      op: the operator on real numbers.
      operands: of each the value, the scale and the zero point.
      result: the scale and the zero point of the result, unless that is real.
      bias: a bias in whole numbers, which stand for real ones by the product of the operands' scales.
      addend: a real term that is added to a real result.
    """

    op: str
    operands: Sequence[tuple[int, int, int]]
    result: tuple[int, int] | None = None
    bias: int | None = None
    addend: int | None = None


_ONE, _PAIR = [(0, 1, 2)], [(0, 1, 2), (3, 4, 5)]
_FORMS = {
    "QLinearConv": _Form("Conv", _PAIR, (6, 7), bias=8),
    "QLinearMatMul": _Form("MatMul", _PAIR, (6, 7)),
    f"{_MICROSOFT}QGemm": _Form("Gemm", _PAIR, (7, 8), bias=6),
    f"{_MICROSOFT}MatMulIntegerToFloat": _Form("MatMul", [(0, 2, 4), (1, 3, 5)], addend=6),
    **{f"{_MICROSOFT}QLinear{op}": _Form(op, _PAIR, (6, 7)) for op in ("Add", "Mul")},
    **{
        f"{_MICROSOFT}QLinear{op}": _Form(op, _ONE, (3, 4))
        for op in ("AveragePool", "GlobalAveragePool", "LeakyRelu", "ReduceMean", "Sigmoid", "Softmax")
    },
}
_CONCAT = f"{_MICROSOFT}QLinearConcat"  # its operands are as many as there are
_DYNAMIC = f"{_MICROSOFT}DynamicQuantizeMatMul"
_PRODUCTS = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}
# What some nodes say although it is the only way here: the channels are on axis 1, the version is the graph's.
_SAID = (("channels_last", 0), ("opset", None))


def lowered(model: Model, max_bytes: int) -> Model:
    """The model on real numbers, without the tensors that its nodes then do not take.

    A node that is not as quantisers write it stays as it is.

    Raises:
      Unreadable: when the leaves in float32 take more than ``max_bytes``.
    """
    nodes = [new for node in _without_late_scales(model.nodes) for new in _real(node)]
    nodes, tensors = _folded(nodes, model.tensors, max_bytes)
    before, after = ({name for node in some for name in references([*node.arguments])} for some in (model.nodes, nodes))
    kept = {name: tensor for name, tensor in tensors.items() if name in after or name not in before}
    return model._replace(nodes=nodes, tensors=kept)


def _without_late_scales(nodes: Sequence[Node]) -> list[Node]:
    """The nodes, where real products replace those of whole numbers that later nodes multiply by both scales.

    Those come as ``q, s, z = DynamicQuantizeLinear(x)``, ``p = MatMulInteger(q, w, z, zero)`` and
    ``Cast(p) * (s * scale)``.
    """
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for name in references([*node.arguments]):
            users.setdefault(name, []).append(node)
    makers = {output: node for node in nodes for output in node.outputs}
    new: dict[str, list[Node]] = {}
    for node in nodes:
        if node.op not in _PRODUCTS or len(node.arguments) < 2:
            continue
        casts = users.get(node.outputs[0], [])
        scalings = users.get(casts[0].outputs[0], []) if len(casts) == 1 and casts[0].op == "Cast" else []
        if len(scalings) != 1 or scalings[0].op != "Mul":
            continue
        scale = _other(scalings[0], casts[0].outputs[0])
        product, ranges = makers.get(scale), makers.get(getattr(node.arguments[0], "name", ""))
        if product is None or product.op != "Mul" or ranges is None or len(ranges.outputs) != 3:
            continue
        left = ranges.outputs[1]
        right = Value(_other(product, left))
        zeros = (_argument(node, place) for place in (2, 3))
        form = _Form(_PRODUCTS[node.op], [(0, 2, 4), (1, 3, 5)])
        new[node.outputs[0]] = _between(
            node._replace(arguments=(*node.arguments[:2], Value(left), right, *zeros)), form
        )
        new[scalings[0].outputs[0]] = [scalings[0]._replace(op="Identity", arguments=(Value(casts[0].outputs[0]),))]
        if len(users[scale]) == 1:
            new[scale] = []
    return [replaced for node in nodes for replaced in new.get(node.outputs[0], [node])]


def _other(node: Node, name: str) -> str:
    """The argument of a product that is not this one; empty if there is none."""
    names = references([*node.arguments]) if len(node.arguments) == 2 else []
    return names[1 - names.index(name)] if len(names) == 2 and name in names else ""


def _real(node: Node) -> list[Node]:
    """A node, or one on real numbers in its place with nodes that convert operands and result."""
    if node.op == _DYNAMIC:
        whole = [f"{node.outputs[0]}, {part}" for part in ("quantised", "scale", "zero point")]
        value, scale, zero = map(Value, whole)
        weights, scales, zeros, addend = (_argument(node, place) for place in (1, 2, 3, 4))
        product = node._replace(
            op=f"{_MICROSOFT}MatMulIntegerToFloat", arguments=(value, weights, scale, scales, zero, zeros, addend)
        )
        ranges = Node("DynamicQuantizeLinear", node.name, node.arguments[:1], {}, tuple(whole))
        return [ranges, *_real(product)]
    if node.op == _CONCAT:
        return _between(node, _Form("Concat", [(i, i + 1, i + 2) for i in range(2, len(node.arguments), 3)], (0, 1)))
    return _between(node, _FORMS[node.op]) if node.op in _FORMS else [node]


def _between(node: Node, form: _Form) -> list[Node]:
    """The operator on real numbers between nodes that convert."""
    output, new, arguments = node.outputs[0], [], []
    # A kernel has the scales of its first axis, the right operand of a product those of its last.
    axis = -1 if form.op == "MatMul" or (form.op == "Gemm" and not node.settings.get("transB")) else 0
    for number, (value, scale, zero) in enumerate(form.operands):
        real = f"{output}, operand {number}"
        whole = tuple(_argument(node, place) for place in (value, scale, zero))
        new.append(Node("DequantizeLinear", node.name, whole, {"axis": axis}, (real,)))
        arguments.append(Value(real))
    bias = None if form.bias is None else _argument(node, form.bias)
    if bias is not None:
        real, factors = f"{output}, bias", [_argument(node, scale) for _, scale, _ in form.operands]
        new.append(Node("DequantizeLinear", node.name, (bias, factors), {"axis": 0}, (real,)))
        arguments.append(Value(real))
    said = dict(_SAID)
    settings = {key: value for key, value in node.settings.items() if key not in said or value not in (said[key],)}
    scale, zero = (None, None) if form.result is None else (_argument(node, place) for place in form.result)
    addend = None if form.addend is None else _argument(node, form.addend)
    if scale is None and addend is None:
        return [*new, Node(form.op, node.name, tuple(arguments), settings, node.outputs)]
    real = f"{output}, real"
    new.append(Node(form.op, node.name, tuple(arguments), settings, (real,)))
    if addend is not None:
        return [*new, Node("Add", node.name, (Value(real), addend), {}, node.outputs)]
    return [*new, Node("QuantizeLinear", node.name, (Value(real), scale, zero), {}, node.outputs)]


def _argument(node: Node, place: int) -> Any:
    """An argument; None where it is left out."""
    return node.arguments[place] if place < len(node.arguments) else None


def _folded(
    nodes: Sequence[Node], tensors: Mapping[str, Tensor], max_bytes: int
) -> tuple[list[Node], dict[str, Tensor]]:
    """The nodes without those that dequantise a constant, and the tensors with the leaves that they make."""
    found, kept = dict(tensors), []
    same: dict[str, str] = {}  # the leaf for each result of a node that has gone
    for node in nodes:
        node = node._replace(arguments=tuple(_renamed(argument, same) for argument in node.arguments))
        leaf = _leaf(node, tensors, max_bytes) if node.op == "DequantizeLinear" else None
        if leaf is None:
            kept.append(node)
            continue
        max_bytes -= leaf.nbytes
        ((whole, *_), output) = references([node.arguments[0]]), node.outputs[0]
        name = _SUFFIX.sub("", whole)
        known = found.get(name)
        if known is not None and (known.place is not Unwritable.QUANTISED or not np.array_equal(known.array, leaf)):
            name = output
        found[name], same[output] = Tensor(leaf, Unwritable.QUANTISED), name
    return kept, found


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(part, names) for part in value]
    return Value(names.get(value.name, value.name)) if isinstance(value, Value) else value


def _leaf(node: Node, tensors: Mapping[str, Tensor], max_bytes: int) -> np.ndarray | None:
    """What a node makes that dequantises a constant; None if an argument is no constant, or of a shape that is odd.

    Raises:
      Unreadable: when it takes more than ``max_bytes``.
    """
    scale, zero = _argument(node, 1), _argument(node, 2)
    whole = array(_argument(node, 0), tensors)
    factors = [array(factor, tensors) for factor in (scale if isinstance(scale, list) else [scale])]
    shift = np.zeros(()) if zero is None else array(zero, tensors)
    axis, block = node.settings.get("axis", 1), node.settings.get("block_size", 0)
    if whole is None or shift is None or not isinstance(axis, int) or not -whole.ndim <= axis < max(whole.ndim, 2):
        return None
    if 4 * whole.size > max_bytes:
        raise _limits.too_large("its leaves in float32 take more bytes than are allowed")
    if any(factor is None or factor.size > max(whole.size, 1) for factor in (shift, *factors)):
        return None
    shaped = [None if factor is None else _along(factor, whole.shape, axis, block) for factor in (shift, *factors)]
    if any(factor is None for factor in shaped):
        return None
    first, *others = (factor for factor in shaped if factor is not None)
    return _scaled.apply(whole, functools.reduce(operator.mul, others), first)


def _along(factor: np.ndarray, shape: tuple[int, ...], axis: int, block: Any) -> np.ndarray | None:
    """Scales or zero points with the axes of their numbers: one for all, or one for each entry or block of an axis."""
    factor, axes = factor.astype(np.float32), len(shape)
    if factor.size == 1:
        return factor.reshape(())
    if block:
        if not isinstance(block, int) or block < 1 or axis >= axes:
            return None
        length, blocks = shape[axis], list(shape)
        blocks[axis] = -(-length // block)
        if factor.shape != tuple(blocks):
            return None
        return np.repeat(factor, min(block, length), axis).take(range(length), axis)  # the last block may be shorter
    return (
        factor.reshape(*[1] * (axis % axes), -1, *[1] * (axes - 1 - axis % axes)) if factor.ndim == 1 and axes else None
    )
