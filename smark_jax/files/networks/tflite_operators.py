"""TFLite's operators that image classifiers use, over JAX arrays whose last axis is the channels.

What is known without weights and images stays a NumPy array (see ``static``). An operator's options are keyword
arguments under the names of ``tflite_schema``.

References:
  https://ai.google.dev/edge/litert/conversion/tensorflow/ops_compatibility
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from smark_jax.files.networks import layers
from smark_jax.files.networks.layers import Window
from smark_jax.files.networks.static import elementwise, fold, integers, is_static, library
from smark_jax.files.networks.tflite import DTYPES

# By the numbers of the schema's ActivationFunctionType.
_ACTIVATIONS: dict[int, Callable[[Any], Any]] = {
    0: lambda x: x,
    1: lambda x: jnp.maximum(x, 0),
    2: lambda x: jnp.clip(x, -1, 1),
    3: lambda x: jnp.clip(x, 0, 6),
    4: jnp.tanh,
}


def _activated(x: Any, activation: int) -> Any:
    """What an operator's fused activation makes of its result."""
    if activation not in _ACTIVATIONS:
        raise NotImplementedError(f"fused activation {activation} is not supported")
    return _ACTIVATIONS[activation](x)


def _window(x: Any, size: Sequence[int], strides: Sequence[int], padding: int, dilations: Sequence[int]) -> Window:
    """The window of a convolution or a pool; ``padding`` is 0 for SAME, 1 for VALID."""
    same = layers.same_padding(x.shape[1:3], size, strides, dilations)
    return Window(size, strides, [(0, 0), (0, 0)] if padding else same, dilations)


def _conv(
    x: Any,
    w: Any,
    bias: Any = None,
    *,
    padding: int,
    stride_w: int,
    stride_h: int,
    activation: int,
    dilation_w: int,
    dilation_h: int,
    depthwise: bool = False,
) -> Any:
    """A convolution with a kernel [O H W I], or with one [1 H W O] for each channel."""
    window = _window(x, w.shape[1:3], (stride_h, stride_w), padding, (dilation_h, dilation_w))
    groups = x.shape[3] // (1 if depthwise else w.shape[3])
    return _activated(layers.convolution_last(x, w, bias, window, groups, "IHWO" if depthwise else "OHWI"), activation)


def _depthwise(x: Any, w: Any, bias: Any = None, **settings: Any) -> Any:
    return _conv(x, w, bias, **settings, depthwise=True)


def _pool(kind: str) -> Callable[..., Any]:
    def pool(
        x: Any, *, padding: int, stride_w: int, stride_h: int, filter_w: int, filter_h: int, activation: int
    ) -> Any:
        window = _window(x, (filter_h, filter_w), (stride_h, stride_w), padding, (1, 1))
        mean = kind == "mean"
        pooled = layers.mean_pool(x, window, [(0, 0), (0, 0)], 1) if mean else layers.max_pool(x, window, 1)
        return _activated(pooled, activation)

    return pool


def _dense(x: Any, w: Any, bias: Any = None, *, activation: int, weights_format: int, keep_dims: int) -> Any:
    """A dense layer with a kernel [O I]; without ``keep_dims`` it takes all axes but the last together."""
    if weights_format:
        raise NotImplementedError("shuffled weights are not supported")
    out = jnp.matmul(x if keep_dims or x.ndim == 2 else x.reshape(-1, w.shape[1]), w.T)
    return _activated(out if bias is None else elementwise("add")(out, bias), activation)


def _binary(name: str) -> Callable[..., Any]:
    operation = elementwise(name)
    return lambda a, b, *, activation: _activated(operation(a, b), activation)


def _divide(a: Any, b: Any, *, activation: int) -> Any:
    whole = np.issubdtype(a.dtype, np.integer)
    return _activated(elementwise("floor_divide" if whole else "divide")(a, b), activation)


def _reduction(name: str) -> Callable[..., Any]:
    def reduce(x: Any, axes: Any, *, keep_dims: int) -> Any:
        return getattr(library(x), name)(x, axis=tuple(integers(axes)), keepdims=bool(keep_dims))

    return reduce


def _reshape(x: Any, shape: Any = None, *, new_shape: Sequence[int]) -> Any:
    return x.reshape(list(new_shape) if shape is None else integers(shape))


def _pairs(widths: Any) -> layers.Padding:
    numbers = integers(widths)
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _pad(x: Any, widths: Any, value: Any = None) -> Any:
    return layers.padded(x, _pairs(widths), "constant", 0 if value is None else value)


def _mirror_pad(x: Any, widths: Any, *, mode: int) -> Any:
    return layers.padded(x, _pairs(widths), "symmetric" if mode else "reflect", 0)


def _space_to_batch(x: Any, block: Any, widths: Any) -> Any:
    """Each image as its pieces of every ``block`` pixels, one after another: how the converter writes dilations."""
    steps = integers(block)
    x = layers.padded(x, [(0, 0), *_pairs(widths), *[(0, 0)] * (x.ndim - 1 - len(steps))], "constant", 0)
    count, *lengths = x.shape
    split = [n for length, step in zip(lengths, steps, strict=False) for n in (length // step, step)]
    x = x.reshape(count, *split, *lengths[len(steps) :])
    within, across = range(2, 2 * len(steps) + 1, 2), range(1, 2 * len(steps), 2)
    x = x.transpose(*within, 0, *across, *range(2 * len(steps) + 1, x.ndim))
    return x.reshape(-1, *split[::2], *lengths[len(steps) :])


def _batch_to_space(x: Any, block: Any, crops: Any) -> Any:
    """The images of such pieces; ``crops`` are cut off their sides."""
    steps = integers(block)
    lengths, rest = x.shape[1 : 1 + len(steps)], x.shape[1 + len(steps) :]
    x = x.reshape(*steps, -1, *lengths, *rest)
    order = [n for i in range(len(steps)) for n in (len(steps) + 1 + i, i)]
    x = x.transpose(len(steps), *order, *range(2 * len(steps) + 1, x.ndim))
    x = x.reshape(-1, *(length * step for length, step in zip(lengths, steps, strict=True)), *rest)
    cuts = [slice(left, size - right) for (left, right), size in zip(_pairs(crops), x.shape[1:], strict=False)]
    return x[(slice(None), *cuts)]


def _concatenate(*values: Any, axis: int, activation: int) -> Any:
    return _activated(library(*values).concatenate(values, axis), activation)


def _split(axis: Any, x: Any, *, num: int) -> list[Any]:
    return library(x).split(x, layers.countable(num), integers(axis)[0])


def _split_by_sizes(x: Any, sizes: Any, axis: Any) -> list[Any]:
    (place,), lengths = integers(axis), integers(sizes)
    rest = x.shape[place] - sum(length for length in lengths if length >= 0)
    return library(x).split(x, np.cumsum([rest if n < 0 else n for n in lengths])[:-1].tolist(), place)


def _unpack(x: Any, *, num: int, axis: int) -> list[Any]:
    return [x[(slice(None),) * (axis % x.ndim) + (i,)] for i in range(layers.countable(num))]


def _slice(x: Any, begin: Any, size: Any) -> Any:
    starts, sizes = integers(begin), integers(size)
    return x[tuple(slice(start, None if n < 0 else start + n) for start, n in zip(starts, sizes, strict=True))]


def _strided_slice(
    x: Any,
    begin: Any,
    end: Any,
    strides: Any,
    *,
    begin_mask: int,
    end_mask: int,
    ellipsis_mask: int,
    new_axis_mask: int,
    shrink_axis_mask: int,
    offset: int,
) -> Any:
    """Indexing as in NumPy; bit i of a mask says that an end of entry i is absent, or that the entry is no slice."""
    if offset:
        raise NotImplementedError("a slice whose end is counted from its beginning is not supported")
    index: list[Any] = []
    for i, (start, stop, step) in enumerate(zip(integers(begin), integers(end), integers(strides), strict=True)):
        if ellipsis_mask >> i & 1:
            index.append(...)
        elif new_axis_mask >> i & 1:
            index.append(None)
        elif shrink_axis_mask >> i & 1:
            index.append(start)
        else:
            index.append(slice(None if begin_mask >> i & 1 else start, None if end_mask >> i & 1 else stop, step))
    return x[tuple(index)]


def _gather(x: Any, indices: Any, *, axis: int, batch_dims: int) -> Any:
    if batch_dims:
        raise NotImplementedError("gathering within batches is not supported")
    return library(x, indices).take(x, indices, axis)


def _broadcast_to(x: Any, shape: Any) -> Any:
    return library(x).broadcast_to(x, integers(shape))


def _fill(shape: Any, value: Any) -> Any:
    return np.broadcast_to(value, integers(shape)) if is_static(value) else jnp.broadcast_to(value, integers(shape))


def _matmul(a: Any, b: Any, *, adjoint_x: int, adjoint_y: int) -> Any:
    return jnp.matmul(jnp.swapaxes(a, -1, -2) if adjoint_x else a, jnp.swapaxes(b, -1, -2) if adjoint_y else b)


def _cast(x: Any, *, to: int) -> Any:
    return x.astype(DTYPES[to] if is_static(x) else jax.dtypes.canonicalize_dtype(DTYPES[to]))


def _real(x: Any) -> Any:
    """Quantised values are real numbers already; stored half precision becomes float32."""
    return x.astype(np.float32)


def _unit(x: Any, *, activation: int = 0) -> Any:
    """Vectors along the last axis, of length one."""
    return _activated(x / jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12)), activation)


_SAME_NAMES = {
    "ABS": "abs", "NEG": "negative", "EXP": "exp", "LOG": "log", "SQRT": "sqrt", "SQUARE": "square", "SIN": "sin",
    "COS": "cos", "FLOOR": "floor", "CEIL": "ceil", "ROUND": "round", "SIGN": "sign", "POW": "power",
    "MAXIMUM": "maximum", "MINIMUM": "minimum", "FLOOR_DIV": "floor_divide", "FLOOR_MOD": "mod", "EQUAL": "equal",
    "NOT_EQUAL": "not_equal", "LESS": "less", "LESS_EQUAL": "less_equal", "GREATER": "greater",
    "GREATER_EQUAL": "greater_equal", "LOGICAL_AND": "logical_and", "LOGICAL_OR": "logical_or",
    "LOGICAL_NOT": "logical_not", "SELECT": "where", "SELECT_V2": "where",
}  # fmt: skip
_REDUCTIONS = {"MEAN": "mean", "SUM": "sum", "REDUCE_MAX": "max", "REDUCE_MIN": "min", "REDUCE_PROD": "prod"}


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: elementwise(same) for name, same in _SAME_NAMES.items()},
    **{name: _reduction(same) for name, same in _REDUCTIONS.items()},
    "ADD": _binary("add"),
    "SUB": _binary("subtract"),
    "MUL": _binary("multiply"),
    "DIV": _divide,
    "ADD_N": fold("add"),
    "SQUARED_DIFFERENCE": lambda a, b: jnp.square(elementwise("subtract")(a, b)),
    "RSQRT": lax.rsqrt,
    "RELU": _ACTIVATIONS[1],
    "RELU_N1_TO_1": _ACTIVATIONS[2],
    "RELU6": _ACTIVATIONS[3],
    "RELU_0_TO_1": lambda x: jnp.clip(x, 0, 1),
    "LEAKY_RELU": lambda x, *, alpha: jnp.where(x >= 0, x, x * alpha),
    "PRELU": lambda x, slope: jnp.where(x >= 0, x, elementwise("multiply")(x, slope)),
    "ELU": jax.nn.elu,
    "GELU": lambda x, *, approximate: jax.nn.gelu(x, bool(approximate)),
    "HARD_SWISH": lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
    "LOGISTIC": jax.nn.sigmoid,
    "TANH": jnp.tanh,
    "SOFTMAX": lambda x, *, beta: jax.nn.softmax(x * beta, -1),
    "LOG_SOFTMAX": lambda x: jax.nn.log_softmax(x, -1),
    "CONV_2D": _conv,
    "DEPTHWISE_CONV_2D": _depthwise,
    "AVERAGE_POOL_2D": _pool("mean"),
    "MAX_POOL_2D": _pool("max"),
    "FULLY_CONNECTED": _dense,
    "BATCH_MATMUL": _matmul,
    "L2_NORMALIZATION": _unit,
    "QUANTIZE": _real,
    "DEQUANTIZE": _real,
    "CAST": _cast,
    "SHAPE": lambda x: np.array(np.shape(x), np.int32),
    "RESHAPE": _reshape,
    "TRANSPOSE": lambda x, axes: x.transpose(integers(axes)),
    "EXPAND_DIMS": lambda x, axis: library(x).expand_dims(x, integers(axis)[0]),
    "SQUEEZE": lambda x, *, axes: library(x).squeeze(x, tuple(axes) or None),
    "CONCATENATION": _concatenate,
    "PACK": lambda *values, axis: library(*values).stack(values, axis),
    "UNPACK": _unpack,
    "SPLIT": _split,
    "SPLIT_V": _split_by_sizes,
    "SLICE": _slice,
    "STRIDED_SLICE": _strided_slice,
    "GATHER": _gather,
    "BROADCAST_TO": _broadcast_to,
    "TILE": lambda x, repeats: jnp.tile(x, integers(repeats)),
    "FILL": _fill,
    "SPACE_TO_BATCH_ND": _space_to_batch,
    "BATCH_TO_SPACE_ND": _batch_to_space,
    "PAD": _pad,
    "PADV2": _pad,
    "MIRROR_PAD": _mirror_pad,
}
"""By the schema's names."""
