"""Keras' layers that image classifiers use, over JAX arrays.

A layer gets its configuration, its inputs, and its weights by name. Of a configuration a layer takes the settings that
concern inference; data augmentation, dropout and noise do nothing there.

References:
  https://keras.io/api/layers/
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smark_jax.files.networks import layers
from smark_jax.files.networks.layers import Window
from smark_jax.files.networks.static import elementwise, fold

Config = Mapping[str, Any]


def _last(operation: Callable[..., Any]) -> Callable[..., Any]:
    """The layer that moves channels behind the other axes, if they stand before them, and back afterwards."""

    def layer(x: Any, *, config: Config, **weights: Any) -> Any:
        if config.get("data_format") != "channels_first":
            return operation(x, config=config, **weights)
        out = operation(jnp.moveaxis(x, 1, -1), config=config, **weights)
        return jnp.moveaxis(out, -1, 1) if out.ndim == x.ndim else out

    return layer


def _many(value: Any, number: int) -> Sequence[int]:
    return [value] * number if isinstance(value, int) else list(value)


def _window(x: Any, config: Config, size: Sequence[int], strides: Any) -> Window:
    """The window of a convolution or a pool over images [B ... C]."""
    number = len(size)
    steps, dilations = _many(strides, number), _many(config.get("dilation_rate", 1), number)
    if config["padding"] == "valid":
        return Window(size, steps, [(0, 0)] * number, dilations)
    if config["padding"] != "same":
        raise NotImplementedError(f"padding {config['padding']} is not supported")
    return Window(size, steps, layers.same_padding(x.shape[1:-1], size, steps, dilations), dilations)


def _convolved(x: Any, config: Config, kernel: Any, bias: Any, groups: int) -> Any:
    window = _window(x, config, kernel.shape[:-2], config["strides"])
    return layers.convolution_last(x, kernel, bias, window, groups, "DHW"[5 - kernel.ndim :] + "IO")


def _conv(x: Any, *, config: Config, kernel: Any, bias: Any = None) -> Any:
    return _convolved(x, config, kernel, bias, config.get("groups", 1))


def _depthwise(x: Any, *, config: Config, kernel: Any = None, depthwise_kernel: Any = None, bias: Any = None) -> Any:
    """A convolution of each channel by kernels of its own; Keras 2 calls them ``depthwise_kernel``."""
    own = kernel if depthwise_kernel is None else depthwise_kernel
    # With one kernel for each channel, this is a plain exchange of axes, which alignment follows.
    flat = jnp.swapaxes(own, -1, -2) if own.shape[-1] == 1 else own.reshape(*own.shape[:-2], 1, -1)
    return _convolved(x, config, flat, bias, x.shape[-1])


def _separable(x: Any, *, config: Config, depthwise_kernel: Any, pointwise_kernel: Any, bias: Any = None) -> Any:
    own = _depthwise(x, config=config, kernel=depthwise_kernel)
    return _convolved(own, {"padding": "valid", "strides": 1}, pointwise_kernel, bias, 1)


def _dense(x: Any, *, config: Config, kernel: Any, bias: Any = None) -> Any:
    out = jnp.matmul(x, kernel)
    return out if bias is None else out + _along(bias, -1, out)


def _along(vector: Any, axis: int, x: Any) -> Any:
    """A vector in the shape in which its entries stand along one axis of ``x``."""
    return vector.reshape([-1 if place == axis % x.ndim else 1 for place in range(x.ndim)])


def _axis(config: Config) -> int:
    axis = config.get("axis", -1)
    (place,) = axis if isinstance(axis, list) else [axis]
    return place


def _batch_norm(
    x: Any, *, config: Config, moving_mean: Any, moving_variance: Any, gamma: Any = None, beta: Any = None
) -> Any:
    if gamma is None and config["scale"]:  # of three vectors, the first is taken for beta
        gamma, beta = beta, None
    place = _axis(config)
    out = layers.batch_norm(jnp.moveaxis(x, place, 1), gamma, beta, moving_mean, moving_variance, config["epsilon"])
    return jnp.moveaxis(out, 1, place)


def _layer_norm(x: Any, *, config: Config, gamma: Any = None, beta: Any = None) -> Any:
    axis = config.get("axis", -1)
    places = sorted(place % x.ndim for place in (axis if isinstance(axis, list) else [axis]))
    if places != list(range(places[0], x.ndim)) or config.get("rms_scaling"):
        raise NotImplementedError("layer norm over other axes than the last ones is not supported")
    return layers.layer_norm(x, gamma, beta, places[0], config["epsilon"])


def _group_norm(x: Any, *, config: Config, gamma: Any = None, beta: Any = None) -> Any:
    place = _axis(config)
    moved = jnp.moveaxis(x, place, 1)
    groups = moved.shape[1] if config["groups"] == -1 else config["groups"]
    return jnp.moveaxis(layers.group_norm(moved, groups, gamma, beta, config["epsilon"]), 1, place)


def _normalization(x: Any, *, config: Config, mean: Any = None, variance: Any = None, count: Any = None) -> Any:
    """By a mean and a variance that are weights, or settings."""
    if config.get("invert"):
        raise NotImplementedError("inverted normalization is not supported")
    if mean is None:
        mean, variance = (np.asarray(config[name], np.float32) for name in ("mean", "variance"))
    place = _axis(config)
    spread = jnp.maximum(jnp.sqrt(_along(variance, place, x)), 1e-7)
    return (x - _along(mean, place, x)) / spread


def _rescaling(x: Any, *, config: Config) -> Any:
    scale, offset = (np.asarray(config[name], np.float32) for name in ("scale", "offset"))
    return elementwise("add")(elementwise("multiply")(x, scale), offset)


def _pool(mean: bool) -> Callable[..., Any]:
    def pool(x: Any, *, config: Config) -> Any:
        size = _many(config["pool_size"], x.ndim - 2)
        window = _window(x, config, size, config.get("strides") or size)
        return layers.mean_pool(x, window, [(0, 0)] * len(size), 1) if mean else layers.max_pool(x, window, 1)

    return _last(pool)


def _global_pool(name: str) -> Callable[..., Any]:
    def pool(x: Any, *, config: Config) -> Any:
        return getattr(jnp, name)(x, axis=tuple(range(1, x.ndim - 1)), keepdims=config.get("keepdims", False))

    return _last(pool)


def _merge(name: str) -> Callable[..., Any]:
    """A function of several inputs, whether they come as one list (layers) or one by one (operations on tensors)."""
    operation = fold(name)

    def layer(*inputs: Any, config: Config) -> Any:
        return operation(*(inputs[0] if isinstance(inputs[0], list) else inputs))

    return layer


def _average(inputs: list[Any], *, config: Config) -> Any:
    return fold("add")(*inputs) / len(inputs)


def _attention(
    query: Any, value: Any = None, key: Any = None, *, config: Config, attention_mask: Any = None, **weights: Any
) -> Any:
    """Attention of several heads over tokens [B T D], with kernels [D H K] and [H K D]."""
    if query.ndim != 3 or config.get("attention_axes") not in (None, [1]):
        raise NotImplementedError("attention over other axes than that of tokens is not supported")
    value = query if value is None else value

    def heads(x: Any, name: str) -> Any:
        bias, out = weights.get(f"{name}/bias"), jnp.tensordot(x, weights[f"{name}/kernel"], 1)
        return (out if bias is None else out + bias[None, None]).transpose(0, 2, 1, 3)

    found = heads(query, "query"), heads(value if key is None else key, "key"), heads(value, "value")
    mixed = layers.attention(*found, attention_mask, None).transpose(0, 2, 1, 3)
    out, bias = jnp.tensordot(mixed, weights["attention_output/kernel"], 2), weights.get("attention_output/bias")
    return out if bias is None else out + bias[None, None]


def _reshape(x: Any, *, config: Config) -> Any:
    return x.reshape(x.shape[0], *config["target_shape"]) if "target_shape" in config else x.reshape(config["newshape"])


def _pad(x: Any, *, config: Config) -> Any:
    widths = [pair if isinstance(pair, list) else [pair, pair] for pair in _many(config["padding"], x.ndim - 2)]
    pairs = [(before, after) for before, after in widths]
    return layers.padded(x, [(0, 0), *pairs, (0, 0)], "constant", 0)


def _crop(x: Any, *, config: Config) -> Any:
    cuts = [pair if isinstance(pair, list) else [pair, pair] for pair in _many(config["cropping"], x.ndim - 2)]
    ends = [slice(before, length - after) for (before, after), length in zip(cuts, x.shape[1:-1], strict=True)]
    return x[(slice(None), *ends)]


def _upsample(x: Any, *, config: Config) -> Any:
    if config.get("interpolation", "nearest") != "nearest":
        raise NotImplementedError(f"interpolation {config['interpolation']} is not supported")
    for axis, times in enumerate(_many(config["size"], x.ndim - 2), 1):
        x = jnp.repeat(x, layers.countable(times), axis)
    return x


def _mean(x: Any, *, config: Config) -> Any:
    axis = config["axis"]
    return x.mean(tuple(axis) if isinstance(axis, list) else axis, keepdims=config["keepdims"])


def _get_item(x: Any, index: Any, *, config: Config) -> Any:
    return x[tuple(index) if isinstance(index, list) else index]


def _relu(x: Any, *, config: Config) -> Any:
    """Zero below a threshold, or a part of what lies below; the layer and the function have the same settings."""
    slope, threshold, top = (config.get(name) or 0 for name in ("negative_slope", "threshold", "max_value"))
    if slope or threshold:
        x = jnp.where(x >= threshold, x, slope * (x - threshold))
    return (
        jnp.clip(x, None if slope else 0, top) if config.get("max_value") is not None else jnp.maximum(x, slope and x)
    )


def _leaky(x: Any, *, config: Config, otherwise: float) -> Any:
    slope = next((config[name] for name in ("negative_slope", "alpha") if name in config), otherwise)
    return jnp.where(x >= 0, x, x * slope)


def _prelu(x: Any, *, config: Config, alpha: Any) -> Any:
    return jnp.where(x >= 0, x, elementwise("multiply")(x, alpha))


def _softmax(x: Any, *, config: Config) -> Any:
    return jax.nn.softmax(x, _axis(config))


def _same(x: Any, *, config: Config, **weights: Any) -> Any:
    return x


def _hard_sigmoid(x: Any) -> Any:
    return jnp.clip(x / 6 + 0.5, 0, 1)


# Functions of one value, by the names of activations; operations on tensors have the same in other spelling.
_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "linear": lambda x: x,
    "relu6": lambda x: jnp.clip(x, 0, 6),
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "hard_silu": lambda x: x * _hard_sigmoid(x),
    "hard_swish": lambda x: x * _hard_sigmoid(x),
    "hard_sigmoid": _hard_sigmoid,
    "hard_sigmoid of Keras 2": lambda x: jnp.clip(0.2 * x + 0.5, 0, 1),
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "softsign": jax.nn.soft_sign,
    "mish": jax.nn.mish,
    "exponential": jnp.exp,
    "log_softmax": lambda x: jax.nn.log_softmax(x, -1),
}
_WITHOUT_EFFECT = (
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "AlphaDropout", "GaussianDropout",
    "GaussianNoise", "ActivityRegularization", "StochasticDepth", "RandomBrightness", "RandomContrast", "RandomFlip",
    "RandomRotation", "RandomTranslation", "RandomZoom", "Identity",
)  # fmt: skip
_MERGES = {"Add": "add", "Subtract": "subtract", "Multiply": "multiply", "Maximum": "maximum", "Minimum": "minimum"}
_PLAIN = {name: lambda x, *, config, function=function: function(x) for name, function in _ACTIVATIONS.items()}


OPERATORS: dict[str, Callable[..., Any]] = {
    **_PLAIN,
    **{"".join(part.capitalize() for part in name.split("_")): function for name, function in _PLAIN.items()},
    **dict.fromkeys(_WITHOUT_EFFECT, _same),
    **{name: _merge(function) for name, function in _MERGES.items()},
    **dict.fromkeys(("Divide", "TrueDivide"), _merge("divide")),
    **dict.fromkeys(("Conv1D", "Conv2D", "Conv3D"), _last(_conv)),
    **dict.fromkeys(("DepthwiseConv1D", "DepthwiseConv2D"), _last(_depthwise)),
    **dict.fromkeys(("SeparableConv1D", "SeparableConv2D"), _last(_separable)),
    **{f"MaxPooling{n}D": _pool(False) for n in (1, 2, 3)},
    **{f"AveragePooling{n}D": _pool(True) for n in (1, 2, 3)},
    **{f"GlobalMaxPooling{n}D": _global_pool("max") for n in (1, 2, 3)},
    **{f"GlobalAveragePooling{n}D": _global_pool("mean") for n in (1, 2, 3)},
    **{f"ZeroPadding{n}D": _last(_pad) for n in (1, 2, 3)},
    **{f"Cropping{n}D": _last(_crop) for n in (1, 2, 3)},
    **{f"UpSampling{n}D": _last(_upsample) for n in (1, 2, 3)},
    **dict.fromkeys(("relu", "Relu", "ReLU"), _relu),
    **dict.fromkeys(("leaky_relu", "LeakyRelu"), lambda x, *, config: _leaky(x, config=config, otherwise=0.2)),
    **dict.fromkeys(("elu", "Elu", "ELU"), lambda x, *, config: jax.nn.elu(x, config.get("alpha", 1.0))),
    **dict.fromkeys(("gelu", "Gelu"), lambda x, *, config: jax.nn.gelu(x, config.get("approximate", False))),
    "LeakyReLU": lambda x, *, config: _leaky(x, config=config, otherwise=0.3),
    "PReLU": _prelu,
    "softmax": _softmax,
    "Dense": _dense,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "Normalization": _normalization,
    "LayerScale": lambda x, *, config, gamma: x * _along(gamma, -1, x),
    "MultiHeadAttention": _attention,
    "Rescaling": _rescaling,
    "Average": _average,
    "Concatenate": lambda inputs, *, config: jnp.concatenate(inputs, config["axis"]),
    "Flatten": lambda x, *, config: x.reshape(x.shape[0], -1),
    "Reshape": _reshape,
    "Permute": lambda x, *, config: x.transpose(0, *config["dims"]),
    "Transpose": lambda x, *, config: x.transpose(config["axes"]),
    "Mean": _mean,
    "GetItem": _get_item,
}
"""By the names of classes of Keras, and of activations."""
