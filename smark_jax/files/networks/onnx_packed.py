"""Products with a matrix of few bits, as onnxruntime's quantiser writes them, as dequantised matrices and products.

``MatMulNBits`` takes a matrix [N K] whose rows are cut into blocks. Its codes lie in bytes, the first in the lowest
bits. Each block has a scale and may have a zero point, which is packed alike unless it is a real number; without one it
is half of the codes' range.

References:
  https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from collections.abc import Mapping

import numpy as np

from smark_jax.files.networks.graph import Node, Tensor, Value, references
from smark_jax.files.networks.onnx_model import Model, array

_OP = "com.microsoft.MatMulNBits"


def unpacked(model: Model) -> Model:
    """The model with ``DequantizeLinear`` nodes and ordinary products; a node of another form stays as it is."""
    nodes: list[Node] = []
    tensors = dict(model.tensors)
    for node in model.nodes:
        parts = _parts(node, model.tensors) if node.op == _OP else None
        if parts is None:
            nodes.append(node)
            continue
        image, packed, scales, zeros, _, bias = (*node.arguments, None, None, None)[:6]
        zeros = zeros or Value(f"{node.outputs[0]}, zero points")
        matrix, product = (Value(f"{node.outputs[0]}, {part}") for part in ("matrix", "product"))
        tensors.update(zip(references([packed, scales, zeros]), map(Tensor, parts), strict=True))
        blocks = {"axis": 1, "block_size": node.settings.get("block_size", 4)}
        nodes.append(Node("DequantizeLinear", node.name, (packed, scales, zeros), blocks, (matrix.name,)))
        made = node.outputs if bias is None else (product.name,)
        nodes.append(Node("com.microsoft.FusedMatMul", node.name, (image, matrix), {"transB": 1}, made))
        if bias is not None:
            nodes.append(Node("Add", node.name, (product, bias), {}, node.outputs))
    return model._replace(nodes=nodes, tensors=tensors)


def _parts(node: Node, tensors: Mapping[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The codes [N K], and the scales and zero points of their blocks; None if a shape or a setting does not fit."""
    bits, rows, columns, block = (node.settings.get(key, 4) for key in ("bits", "N", "K", "block_size"))
    _, *given, order = (*node.arguments, *[None] * 5)[:5]
    codes, scales, zeros = (array(value, tensors) for value in given)
    if bits not in (2, 4, 8) or not all(isinstance(number, int) and number > 0 for number in (rows, columns, block)):
        return None
    if codes is None or scales is None or order is not None or (zeros is None) != (given[2] is None):
        return None
    codes, blocks = _codes(codes, rows, bits), -(-columns // block)
    if codes.shape != (rows, blocks * block) or scales.size != rows * blocks:
        return None
    if zeros is None:
        zeros = np.full((rows, blocks), 2 ** (bits - 1), np.float32)
    elif zeros.dtype == np.uint8:
        zeros = _codes(zeros, rows, bits)
    if zeros.size % rows or zeros.size < rows * blocks:
        return None
    return codes[:, :columns], scales.reshape(rows, blocks), zeros.reshape(rows, -1)[:, :blocks]


def _codes(packed: np.ndarray, rows: int, bits: int) -> np.ndarray:
    """The codes in rows of bytes; as they are, if the bytes are no rows."""
    if packed.dtype != np.uint8 or packed.size % rows:
        return packed
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return (packed.reshape(rows, -1, 1) >> shifts & np.uint8(2**bits - 1)).reshape(rows, -1)
