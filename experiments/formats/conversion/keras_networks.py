"""Each network once more, in Keras, with the weights of a copy: what somebody writes who moves a model there by hand.

Layers keep the names that Keras gives them, so that nothing but shapes and content tells which is which.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

State = Mapping[str, np.ndarray]
"""Leaves by PyTorch's names; for OpenNSFW the graph's, in the order in which it uses them."""


class _Port:
    """Layers that take their weights from a state dict of PyTorch."""

    def __init__(self, state: State) -> None:
        self.state = state

    def leaf(self, name: str) -> np.ndarray:
        return np.asarray(self.state[name])

    def bias(self, name: str) -> list[np.ndarray]:
        return [self.leaf(f"{name}.bias")] if f"{name}.bias" in self.state else []

    def conv(self, x: Any, name: str, stride: int = 1, padding: str = "same") -> Any:
        """A convolution, or a depthwise one where kernels have one input channel and images have several."""
        kernel, bias = self.leaf(f"{name}.weight").transpose(2, 3, 1, 0), self.bias(name)
        settings = {"strides": stride, "padding": padding, "use_bias": bool(bias)}
        if kernel.shape[2] == 1 < x.shape[-1]:
            layer = layers.DepthwiseConv2D(kernel.shape[:2], **settings)
            kernel = kernel.transpose(0, 1, 3, 2)
        else:
            layer = layers.Conv2D(kernel.shape[3], kernel.shape[:2], **settings)
        return _with(layer, x, [kernel, *bias])

    def dense(self, x: Any, name: str) -> Any:
        kernel = self.leaf(f"{name}.weight").T
        return _with(layers.Dense(kernel.shape[1]), x, [kernel, self.leaf(f"{name}.bias")])

    def batch_norm(self, x: Any, name: str) -> Any:
        parts = ("weight", "bias", "running_mean", "running_var")
        return _with(layers.BatchNormalization(epsilon=1e-3), x, [self.leaf(f"{name}.{part}") for part in parts])

    def layer_norm(self, x: Any, name: str) -> Any:
        leaves = [self.leaf(f"{name}.{part}") for part in ("weight", "bias")]
        return _with(layers.LayerNormalization(epsilon=1e-6), x, leaves)

    def prelu(self, x: Any, name: str) -> Any:
        slopes = self.leaf(f"{name}.weight")
        axes = [1, 2] if len(x.shape) == 4 else None
        return _with(layers.PReLU(shared_axes=axes), x, [slopes.reshape(1, 1, -1) if axes else slopes])

    def attention(self, x: Any, name: str, heads: int) -> Any:
        """PyTorch's fused query, key and value are three kernels [d, heads, d / heads] in Keras."""
        dim = x.shape[-1]
        split = (heads, dim // heads)
        fused = zip(
            np.split(self.leaf(f"{name}.qkv.weight"), 3), np.split(self.leaf(f"{name}.qkv.bias"), 3), strict=True
        )
        leaves = [leaf for w, b in fused for leaf in (w.T.reshape(dim, *split), b.reshape(split))]
        leaves += [self.leaf(f"{name}.proj.weight").T.reshape(*split, dim), self.leaf(f"{name}.proj.bias")]
        layer = layers.MultiHeadAttention(heads, dim // heads)
        found = layer(x, x)
        layer.set_weights(leaves)
        return found

    def rows(self, places: Any, name: str) -> Any:
        """The rows of a table at these places."""
        table = self.leaf(name)[0]
        return _with(layers.Embedding(*table.shape), places, [table])


def _with(layer: Any, x: Any, leaves: list[np.ndarray]) -> Any:
    found = layer(x)
    layer.set_weights(leaves)
    return found


def _onet(port: _Port) -> keras.Model:
    images = keras.Input((48, 48, 3))
    x = port.prelu(port.conv(images, "conv1", padding="valid"), "prelu1")
    x = layers.MaxPooling2D(3, 2, "same")(x)
    x = port.prelu(port.conv(x, "conv2", padding="valid"), "prelu2")
    x = layers.MaxPooling2D(3, 2)(x)
    x = port.prelu(port.conv(x, "conv3", padding="valid"), "prelu3")
    x = port.prelu(port.conv(layers.MaxPooling2D(2, 2)(x), "conv4", padding="valid"), "prelu4")
    x = layers.Flatten()(layers.Permute((2, 1, 3))(x))
    x = port.prelu(port.dense(x, "dense5"), "prelu5")
    return keras.Model(images, layers.Concatenate()([port.dense(x, f"dense6_{head}") for head in (1, 2, 3)]))


_STAGES = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1))


def _efficientnet(port: _Port) -> keras.Model:
    images = keras.Input((64, 64, 3))

    def block(x: Any, conv: str, norm: str, stride: int = 1, relu: bool = True) -> Any:
        x = port.batch_norm(port.conv(x, conv, stride), norm)
        return layers.ReLU(6.0)(x) if relu else x

    x = block(images, "_conv_stem", "_bn0", 2)
    strides = [first if n == 0 else 1 for blocks, first in _STAGES for n in range(blocks)]
    for number, stride in enumerate(strides):
        name, start = f"_blocks.{number}", x
        if number:
            x = block(x, f"{name}._expand_conv", f"{name}._bn0")
        x = block(x, f"{name}._depthwise_conv", f"{name}._bn1", stride)
        x = block(x, f"{name}._project_conv", f"{name}._bn2", relu=False)
        x = layers.Add()([x, start]) if x.shape == start.shape else x
    x = layers.GlobalAveragePooling2D()(block(x, "_conv_head", "_bn1"))
    return keras.Model(images, port.dense(x, "_fc"))


def _vit(port: _Port) -> keras.Model:
    images = keras.Input((32, 32, 3))
    dim, patch = port.leaf("patch_embed.proj.weight").shape[0], port.leaf("patch_embed.proj.weight").shape[2]
    x = port.conv(images, "patch_embed.proj", patch, "valid")
    x = layers.Reshape((-1, dim))(x)
    tokens = port.leaf("pos_embed").shape[1]
    number = ops.cast(x[:, :1, 0] * 0, "int32")
    x = layers.Concatenate(1)([port.rows(number, "cls_token"), x])
    x = x + port.rows(ops.cumsum(ops.ones_like(x[:, :tokens, 0], dtype="int32"), axis=1) - 1, "pos_embed")
    for block in _numbered(port, "blocks.{}"):
        x = x + port.attention(port.layer_norm(x, f"{block}.norm1"), f"{block}.attn", heads=3)
        y = layers.Activation("gelu")(port.dense(port.layer_norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + port.dense(y, f"{block}.mlp.fc2")
    return keras.Model(images, port.dense(port.layer_norm(x, "norm")[:, 0], "head"))


def _convnext(port: _Port) -> keras.Model:
    images = keras.Input((64, 64, 3))
    x = port.layer_norm(port.conv(images, "stem.0", 4, "valid"), "stem.1")
    for stage in _numbered(port, "stages.{}"):
        if f"{stage}.downsample.1.weight" in port.state:
            x = port.conv(port.layer_norm(x, f"{stage}.downsample.0"), f"{stage}.downsample.1", 2, "valid")
        for block in _numbered(port, f"{stage}.blocks.{{}}"):
            y = port.layer_norm(port.conv(x, f"{block}.conv_dw"), f"{block}.norm")
            y = port.dense(layers.Activation("gelu")(port.dense(y, f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
            gain = port.leaf(f"{block}.gamma").reshape(1, 1, -1, 1)  # Keras has no layer of gains alone
            x = x + _with(layers.DepthwiseConv2D(1, use_bias=False), y, [gain])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, port.dense(port.layer_norm(x, "head.norm"), "head.fc"))


def _numbered(port: _Port, pattern: str) -> Iterator[str]:
    """The names that the state holds something of, from number 0 on."""
    number = 0
    while any(leaf.startswith(f"{pattern.format(number)}.") for leaf in port.state):
        yield pattern.format(number)
        number += 1


def _opennsfw(port: _Port) -> keras.Model:
    images = keras.Input((224, 224, 3))
    leaves = iter(port.state.values())

    def conv(x: Any, stride: int = 1) -> Any:
        kernel, bias = next(leaves).transpose(2, 3, 1, 0), next(leaves)
        layer = layers.Conv2D(
            kernel.shape[3], kernel.shape[:2], strides=stride, padding="valid" if stride > 1 else "same"
        )
        return _with(layer, x, [kernel, bias])

    x = layers.ReLU()(conv(layers.ZeroPadding2D(3)(images), 2))
    x = layers.MaxPooling2D(3, 2, "same")(x)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 < stage else 1
            start = x if block else conv(x, stride)
            x = layers.ReLU()(conv(x, stride))
            x = layers.Add()([conv(layers.ReLU()(conv(x))), start])
            x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    kernel, bias = leaves
    return keras.Model(images, layers.Softmax()(_with(layers.Dense(2), x, [kernel, bias])))


_NETWORKS: Mapping[str, Callable[[_Port], keras.Model]] = {
    "EfficientNet-Lite0": _efficientnet,
    "O-Net": _onet,
    "ViT": _vit,
    "ConvNeXt": _convnext,
    "OpenNSFW": _opennsfw,
}


def network(name: str, state: State) -> keras.Model:
    """A network with these weights."""
    return _NETWORKS[name](_Port(state))
