"""ONNX graphs that onnxruntime saved at its highest level, as the ordinary graphs from which they were made.

There, convolutions and pools are of the domain ``com.microsoft.nchwc``: their images hold channels in blocks of B = 8
or 16, whichever suits the processor. Kernels [O I H W] are stored as

- ``OIHWBiBo``, [O/B I/B H W B B], whose two inner axes are a block's input and output channels;
- ``OIHWBo``, [O/B I H W B], where the images are in no blocks yet (I < B), and in depthwise convolutions (I = 1).

Zeros fill the last block of channels. A stored kernel's shape is [O I H W] with these counted. No field says what B is
or, inside the network, how many channels there are.

References:
  https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/optimizer/nchwc_transformer.cc
  https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/mlas/lib/reorder.cpp
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smark_jax.files.networks.graph import Node, Tensor, Value, references
from smark_jax.files.networks.onnx_model import Model, array

_DOMAIN = "com.microsoft.nchwc."
_CONV, _INPUT, _OUTPUT = (f"{_DOMAIN}{op}" for op in ("Conv", "ReorderInput", "ReorderOutput"))
_BLOCKS = (8, 16)
# What images may pass between blocks without a change of channels.
_ALONE = {"MaxPool", "AveragePool", "Relu", "Clip", "Sigmoid", "Identity", _INPUT}
_TINY = 1e-30

_Axis = tuple[str, int]
"""An axis of channels: that of an image (axis 1), of a kernel (0: outputs, 1: inputs) or of a bias (0)."""


class _Layer(NamedTuple):
    """A convolution whose kernel is stored in blocks.

    Attributes:
      name: of the kernel.
      stored: the kernel, in the shape that the file gives.
      bias: its name and numbers, or nothing.
      blocks: whether input channels are stored in blocks, too.
      depthwise: whether each channel has a kernel of its own.
      group: the number of groups.
    """

    name: str
    stored: np.ndarray
    bias: Mapping[str, np.ndarray]
    blocks: bool
    depthwise: bool
    group: int


class _Channels(NamedTuple):
    """What a graph says about its numbers of channels.

    Attributes:
      same: of each axis another one with as many channels; one of each class refers to itself.
      said: numbers that nodes name.
      full: axes without channels that fill up.
    """

    same: dict[_Axis, _Axis]
    said: dict[_Axis, int]
    full: set[_Axis]

    def of(self, axis: _Axis) -> _Axis:
        """The axis that stands for all with as many channels."""
        while (other := self.same.setdefault(axis, axis)) != axis:
            self.same[axis] = self.same[other]
            axis = other
        return axis

    def tie(self, axes: Iterable[_Axis]) -> None:
        """Notes that axes have as many channels."""
        first, *others = map(self.of, axes)
        for other in others:
            self.same[self.of(other)] = self.of(first)


def unblocked(model: Model) -> Model:
    """The model with ordinary operators and kernels [O I H W]; as it is, if it has none in blocks, or is malformed.

    The number of an axis' channels is that which a node names. Else it ends with the last channel in which one of the
    kernels and biases that make or take it is not zero.
    """
    if not any(node.op.startswith(_DOMAIN) for node in model.nodes):
        return model
    inside = _in_blocks(model)
    layers = {n: _layer(node, model.tensors, inside) for n, node in enumerate(model.nodes) if node.op == _CONV}
    known = [layer for layer in layers.values() if layer is not None]
    if len(known) < len(layers):
        return model
    channels = _channels(model, layers, inside)
    block = _block(known, channels)
    if block is None:
        return model
    tensors, numbers = dict(model.tensors), _numbers(known, channels, block)
    for layer in known:
        outputs = numbers[channels.of((layer.name, 0))]
        inputs = numbers[channels.of((layer.name, 1))] if layer.blocks else None
        kernel = _decoded(layer, block)[:outputs, :inputs]
        tensors[layer.name] = Tensor(np.ascontiguousarray(kernel))
        for name, bias in layer.bias.items():
            tensors[name] = Tensor(bias[:outputs].copy()) if len(bias) > outputs else tensors[name]
    nodes = [
        _ordinary(node, inside) if node.op != _CONV else _convolution(node, layers[n], tensors)
        for n, node in enumerate(model.nodes)
    ]
    return model._replace(nodes=nodes, tensors=tensors)


def _images(node: Node, tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name in references([*node.arguments]) if name not in tensors]


def _in_blocks(model: Model) -> set[str]:
    """The values whose channels are in blocks."""
    inside: set[str] = set()
    for node in model.nodes:
        made = node.op.startswith(_DOMAIN) or not inside.isdisjoint(references([*node.arguments]))
        inside.update(node.outputs if made and node.op != _OUTPUT else ())
    return inside


def _layer(node: Node, tensors: Mapping[str, Tensor], inside: set[str]) -> _Layer | None:
    """A convolution; None if it is not as onnxruntime writes it."""
    image, kernels, biases = (references([*node.arguments[part]]) for part in (slice(1), slice(1, 2), slice(2, 3)))
    arrays = {name: array(Value(name), tensors) for name in (*kernels, *biases)}
    kernel, group = arrays[kernels[0]] if kernels else None, node.settings.get("group", 1)
    bias = {name: numbers for name in biases if (numbers := arrays[name]) is not None}
    if kernel is None or kernel.ndim != 4 or not kernel.size or not isinstance(group, int):
        return None
    if not image or image[0] in tensors or len(bias) < len(biases):
        return None
    if any(numbers.shape != kernel.shape[:1] for numbers in bias.values()):
        return None
    depthwise = kernel.shape[1] == 1 and group == len(kernel)
    return _Layer(kernels[0], kernel, bias, image[0] in inside and not depthwise, depthwise, group)


def _channels(model: Model, layers: Mapping[int, _Layer | None], inside: set[str]) -> _Channels:
    channels = _Channels({}, {}, set())
    for n, node in enumerate(model.nodes):
        images, result = [(name, 1) for name in _images(node, model.tensors)], (node.outputs[0], 1)
        layer = layers.get(n)
        if layer is not None:
            channels.tie([result, (layer.name, 0), *((name, 0) for name in layer.bias), *images[1:]])
            if layer.depthwise:
                channels.tie([result, images[0]])
            elif layer.group > 1:
                channels.full.update([result, images[0], (layer.name, 1)])
            elif layer.blocks:
                channels.tie([(layer.name, 1), images[0]])
        elif node.op == "Concat" and result[0] in inside:
            channels.full.update([result, *images])
        elif (images and all(name in inside for name, _ in images)) or (node.op in _ALONE and len(images) == 1):
            channels.tie([result, *images])
        if node.op == _OUTPUT:
            channels.said[result] = node.settings.get("channels", 0)
    return channels


def _widths(layers: Sequence[_Layer], channels: _Channels) -> dict[_Axis, int]:
    """The numbers of channels with those that fill up."""
    outputs = {channels.of((layer.name, 0)): layer.stored.shape[0] for layer in layers}
    return outputs | {channels.of((layer.name, 1)): layer.stored.shape[1] for layer in layers if layer.blocks}


def _block(layers: Sequence[_Layer], channels: _Channels) -> int | None:
    """The number of channels in a block; None if no number fits."""
    widths = _widths(layers, channels)
    classes = [(number, channels.of(axis)) for axis, number in channels.said.items()]
    said = [(number, widths[axis]) for number, axis in classes if axis in widths]
    direct = [layer.stored.shape[1] for layer in layers if not layer.blocks]
    fits = [
        block
        for block in _BLOCKS
        if all(width % block == 0 for width in widths.values())
        and all(isinstance(number, int) and width - block < number <= width for number, width in said)
        and all(number < block for number in direct)
    ]
    return min(fits, key=lambda block: _likeness(layers, block), default=None)


def _likeness(layers: Sequence[_Layer], block: int) -> float:
    """How alike output channels are in size: a wrong block mixes them up, which makes them more alike."""
    total = 0.0
    for layer in layers:
        kernel = _decoded(layer, block)
        squares = np.square(kernel.reshape(len(kernel), -1), dtype=np.float64).mean(1)
        total += kernel.size * np.log(squares + _TINY).mean()
    return total


def _decoded(layer: _Layer, block: int) -> np.ndarray:
    """A kernel [O I H W], with the channels that fill up."""
    outputs, inputs, *space = layer.stored.shape
    if layer.blocks:
        parts = layer.stored.reshape(outputs // block, inputs // block, *space, block, block)
        return parts.transpose(0, 5, 1, 4, 2, 3).reshape(layer.stored.shape)
    parts = layer.stored.reshape(outputs // block, inputs, *space, block)
    return parts.transpose(0, 4, 1, 2, 3).reshape(layer.stored.shape)


def _numbers(layers: Sequence[_Layer], channels: _Channels, block: int) -> dict[_Axis, int]:
    """The numbers of channels by the axis that stands for others."""
    widths = _widths(layers, channels)
    numbers = {axis: width - block + 1 for axis, width in widths.items()}
    for layer in layers:
        kernel = _decoded(layer, block) != 0
        used = {(layer.name, 0): kernel.any((1, 2, 3))} | {(name, 0): bias != 0 for name, bias in layer.bias.items()}
        used |= {(layer.name, 1): kernel.any((0, 2, 3))} if layer.blocks else {}
        for axis, channel in used.items():
            last = np.flatnonzero(channel)
            axis = channels.of(axis)
            numbers[axis] = max(numbers[axis], int(last[-1]) + 1 if len(last) else 0)
    numbers.update((channels.of(axis), number) for axis, number in channels.said.items())
    full = {channels.of(axis) for axis in channels.full} & widths.keys()
    return numbers | {axis: widths[axis] for axis in full}


def _convolution(node: Node, layer: _Layer | None, tensors: Mapping[str, Tensor]) -> Node:
    settings, fused = dict(node.settings), len(node.arguments) > 3 or "activation" in node.settings
    if layer is not None and layer.depthwise:
        settings["group"] = len(np.asarray(tensors[layer.name].array))
    return node._replace(op="com.microsoft.FusedConv" if fused else "Conv", settings=settings)


def _ordinary(node: Node, inside: set[str]) -> Node:
    """A node on images [N C H W]."""
    if node.op in (_INPUT, _OUTPUT):
        if not node.settings.get("channels_last"):
            return node._replace(op="Identity", settings={})
        return node._replace(op="Transpose", settings={"perm": [0, 3, 1, 2] if node.op == _INPUT else [0, 2, 3, 1]})
    if node.op == "Reshape" and not inside.isdisjoint(references([*node.arguments])):
        return node._replace(op="Identity", arguments=node.arguments[:1], settings={})  # blocks as an axis of their own
    return node._replace(op=node.op.removeprefix(_DOMAIN))
