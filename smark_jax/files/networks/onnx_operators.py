"""ONNX's operators that image classifiers use, over JAX arrays.

What is known without weights and images stays a NumPy array (see ``static``). An operator's settings are keyword
arguments under ONNX's names. Where a newer version takes a setting as an input, the parameter of that name takes both.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from smark_jax.files.networks import layers, onnx_fused, onnx_norms, onnx_resizing
from smark_jax.files.networks.layers import Window
from smark_jax.files.networks.onnx_model import DTYPES
from smark_jax.files.networks.static import MAX_STATIC, elementwise, fold, integers, is_static, library


def _divide(a: Any, b: Any) -> Any:
    if not np.issubdtype(a.dtype, np.integer):
        return elementwise("divide")(a, b)
    whole = elementwise("floor_divide")(abs(a), abs(b))  # towards zero, as in C
    return elementwise("where")((a < 0) != (b < 0), -whole, whole)


def _clip(x: Any, min: Any = None, max: Any = None) -> Any:
    return library(x, min, max).clip(x, min, max)


def _cast(x: Any, *, to: int, saturate: int = 1) -> Any:
    return x.astype(jax.dtypes.canonicalize_dtype(DTYPES[to]) if not is_static(x) else DTYPES[to])


def _shape(x: Any, *, start: int = 0, end: int | None = None) -> np.ndarray:
    return np.array(np.shape(x), np.int64)[start:end]


def _constant_of_shape(shape: Any, *, value: Any = None) -> Any:
    number = np.zeros(1, np.float32) if value is None else value
    return np.broadcast_to(number.reshape(-1)[0], integers(shape))  # a view of one number, however large


def _range(start: Any, limit: Any, delta: Any) -> np.ndarray:
    if not is_static(start, limit, delta) or not 0 <= (limit - start) / delta <= MAX_STATIC:
        raise ValueError(f"expected a range of at most {MAX_STATIC:,} numbers that depends on no image")
    return np.arange(start.item(), limit.item(), delta.item()).astype(start.dtype)


def _concat(*values: Any, axis: int) -> Any:
    return library(*values).concatenate(values, axis)


def _gather(x: Any, indices: Any, *, axis: int = 0) -> Any:
    if np.ndim(indices) == 0 and is_static(indices):
        pick = np.take if is_static(x) else lambda array, i, place: lax.index_in_dim(array, i, place, False)
        return pick(x, int(indices), axis)
    return library(x, indices).take(x, indices, axis)


def _expand(x: Any, shape: Any) -> Any:
    return library(x).broadcast_to(x, np.broadcast_shapes(np.shape(x), tuple(integers(shape))))


def _tile(x: Any, repeats: Any) -> Any:
    return jnp.tile(x, integers(repeats))


def _transpose(x: Any, *, perm: Sequence[int] | None = None) -> Any:
    return x.transpose(perm or range(x.ndim)[::-1])


def _reshape(x: Any, shape: Any, *, allowzero: int = 0) -> Any:
    return x.reshape([x.shape[i] if n == 0 and not allowzero else n for i, n in enumerate(integers(shape))])


def _flatten(x: Any, *, axis: int = 1) -> Any:
    return x.reshape(math.prod(x.shape[: axis % x.ndim if axis != x.ndim else axis]), -1)


def _squeeze(x: Any, axes: Any = None) -> Any:
    return library(x).squeeze(x, None if axes is None else tuple(integers(axes)))


def _unsqueeze(x: Any, axes: Any) -> Any:
    return library(x).expand_dims(x, tuple(integers(axes)))


def _slice(x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    begin, end = integers(starts), integers(ends)
    cut = [slice(None)] * x.ndim
    places = range(len(begin)) if axes is None else integers(axes)
    for axis, first, last, step in zip(
        places, begin, end, [1] * len(begin) if steps is None else integers(steps), strict=True
    ):
        past_start = step < 0 and last < -x.shape[axis]
        cut[axis] = slice(first, None if past_start else last, step)
    return x[tuple(cut)]


def _split(x: Any, split: Any = None, *, axis: int = 0, num_outputs: int = 1) -> list[Any]:
    length = x.shape[axis]
    part = -(-length // layers.countable(num_outputs))
    sizes = [min(part, length - i * part) for i in range(num_outputs)] if split is None else integers(split)
    ends = np.cumsum(sizes)[:-1].tolist()
    return library(x).split(x, ends, axis)


def _pad(
    x: Any, pads: Any, constant: Any = None, axes: Any = None, *, mode: str = "constant", value: float = 0.0
) -> Any:
    widths, sizes = [(0, 0)] * x.ndim, integers(pads)
    places = list(range(x.ndim)) if axes is None else integers(axes)
    for i, axis in enumerate(places):
        widths[axis] = (sizes[i], sizes[i + len(places)])
    return layers.padded(x, widths, mode, value if constant is None else constant)


def _where(condition: Any, a: Any, b: Any) -> Any:
    return elementwise("where")(condition, a, b)


def _gemm(
    a: Any, b: Any, c: Any = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Any:
    out = jnp.matmul(a.T if transA else a, b.T if transB else b)
    out = out if alpha == 1 else out * alpha
    return out if c is None else elementwise("add")(out, c if beta == 1 else c * beta)


def _reduction(name: str) -> Callable[..., Any]:
    def reduce(x: Any, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
        places = [] if axes is None else integers(axes)
        if not places and noop_with_empty_axes:
            return x
        return getattr(library(x), name)(x, axis=tuple(places) or None, keepdims=bool(keepdims))

    return reduce


def _norm(before: Callable[..., Any], after: Callable[..., Any]) -> Callable[..., Any]:
    """What ``after`` makes of the sum of what ``before`` makes of each value."""

    def reduce(x: Any, axes: Any = None, **settings: Any) -> Any:
        return after(_reduction("sum")(before(x), axes, **settings))

    return reduce


def _log_sum_exp(x: Any, axes: Any = None, **settings: Any) -> Any:
    return _norm(lambda y: jnp.exp(y - x.max()), jnp.log)(x, axes, **settings) + x.max()


def _depth_to_space(x: Any, *, blocksize: int, mode: str = "DCR") -> Any:
    batch, channels, height, width = x.shape
    n, rest = blocksize, channels // blocksize**2
    order, shape = ((0, 3, 4, 1, 5, 2), (n, n, rest)) if mode == "DCR" else ((0, 1, 4, 2, 5, 3), (rest, n, n))
    return x.reshape(batch, *shape, height, width).transpose(order).reshape(batch, rest, height * n, width * n)


def _space_to_depth(x: Any, *, blocksize: int, mode: str = "DCR") -> Any:
    batch, channels, height, width = x.shape
    n = blocksize
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    parts = x.reshape(batch, channels, height // n, n, width // n, n).transpose(order)
    return parts.reshape(batch, channels * n * n, height // n, width // n)


def _einsum(*values: Any, equation: str) -> Any:
    layers.countable(1000 * len(values))  # the search for an order grows fast
    return jnp.einsum(equation, *values)


def _trilu(x: Any, k: Any = None, *, upper: int = 1) -> Any:
    (diagonal,) = [0] if k is None else integers(k)
    return (jnp.triu if upper else jnp.tril)(x, diagonal)


def _mod(a: Any, b: Any, *, fmod: int = 0) -> Any:
    return elementwise("fmod" if fmod else "mod")(a, b)


def _flat(softmax: Callable[..., Any]) -> Callable[..., Any]:
    """Softmax as it was before version 13: over all axes from ``axis`` on together."""

    def apply(x: Any, *, axis: int = 1) -> Any:
        return softmax(x.reshape(math.prod(x.shape[:axis]), -1), -1).reshape(x.shape)

    return apply


def _window(
    x: Any,
    size: Sequence[int],
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
) -> Window:
    """The window of a convolution or a pool; automatic padding makes the result the image's length over the stride."""
    axes = len(size)
    strides, dilations, pads = strides or [1] * axes, dilations or [1] * axes, pads or [0] * 2 * axes
    padding = list(zip(pads[:axes], pads[axes:], strict=True))
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        padding = layers.same_padding(x.shape[2:], size, strides, dilations)
        padding = padding if auto_pad == "SAME_UPPER" else [(after, before) for before, after in padding]
    return Window(size, strides, padding, dilations)


def _conv(x: Any, w: Any, b: Any = None, *, group: int = 1, kernel_shape: Any = None, **window: Any) -> Any:
    return layers.convolution(x, w, b, _window(x, w.shape[2:], **window), group)


def _fused_conv(
    x: Any,
    w: Any,
    b: Any = None,
    added: Any = None,
    *,
    activation: str = "",
    activation_params: Any = (),
    **window: Any,
) -> Any:
    out = _conv(x, w, b, **window)
    out = out if added is None else out + added
    return onnx_fused.activated(out, activation, activation_params) if activation else out


def _fused_gemm(a: Any, b: Any, c: Any = None, *, activation: str = "", **settings: Any) -> Any:
    parameters = [settings.pop(name) for name in ("activation_alpha", "activation_beta") if name in settings]
    out = _gemm(a, b, c, **settings)
    return onnx_fused.activated(out, activation, parameters) if activation else out


def _max_pool(x: Any, *, kernel_shape: Any, ceil_mode: int = 0, storage_order: int = 0, **window: Any) -> Any:
    found = _window(x, kernel_shape, **window)
    return layers.max_pool(x, layers.rounded_up(found, x.shape[2:]) if ceil_mode else found)


def _average_pool(x: Any, *, kernel_shape: Any, ceil_mode: int = 0, count_include_pad: int = 0, **window: Any) -> Any:
    found = _window(x, kernel_shape, **window)
    counted = found.padding if count_include_pad else [(0, 0)] * len(kernel_shape)
    return layers.mean_pool(x, layers.rounded_up(found, x.shape[2:]) if ceil_mode else found, counted)


_SAME_NAMES = {
    "Add": "add", "Sub": "subtract", "Mul": "multiply", "Pow": "power", "Sqrt": "sqrt", "Neg": "negative", "Abs": "abs",
    "Exp": "exp", "Log": "log", "Floor": "floor", "Ceil": "ceil", "Round": "round", "Equal": "equal",
    "Not": "logical_not",
    "Greater": "greater", "GreaterOrEqual": "greater_equal", "Less": "less", "LessOrEqual": "less_equal",
    "And": "logical_and", "Or": "logical_or", "Tanh": "tanh", "Sin": "sin", "Cos": "cos", "Reciprocal": "reciprocal",
    "Sign": "sign", "Xor": "logical_xor",
}  # fmt: skip
_REDUCTIONS = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceMin": "min", "ReduceProd": "prod"}


OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: elementwise(same) for name, same in _SAME_NAMES.items()},
    **{name: _reduction(same) for name, same in _REDUCTIONS.items()},
    "Div": _divide,
    "Max": fold("maximum"),
    "Min": fold("minimum"),
    "Sum": fold("add"),
    "ReduceL1": _norm(abs, lambda x: x),
    "ReduceL2": _norm(lambda x: x * x, jnp.sqrt),
    "ReduceSumSquare": _norm(lambda x: x * x, lambda x: x),
    "ReduceLogSum": _norm(lambda x: x, jnp.log),
    "ReduceLogSumExp": _log_sum_exp,
    "Mod": _mod,
    "Mean": lambda *values: fold("add")(*values) / len(values),
    "Where": _where,
    "Clip": _clip,
    "Cast": _cast,
    "CastLike": lambda x, like, *, saturate=1: x.astype(like.dtype),
    "Identity": lambda x: x,
    "Dropout": lambda x, ratio=None, training=None, **settings: x,
    "Relu": lambda x: jnp.maximum(x, 0),
    "LeakyRelu": lambda x, *, alpha=0.01: jnp.where(x >= 0, x, x * alpha),
    "PRelu": lambda x, slope: jnp.where(x >= 0, x, elementwise("multiply")(x, slope)),
    "ThresholdedRelu": lambda x, *, alpha=1.0: jnp.where(x > alpha, x, 0),
    "Celu": lambda x, *, alpha=1.0: jax.nn.celu(x, alpha),
    "Swish": lambda x, *, alpha=1.0: x * jax.nn.sigmoid(alpha * x),
    "Elu": lambda x, *, alpha=1.0: jax.nn.elu(x, alpha),
    "Selu": lambda x, *, alpha=1.67326319217681884765625, gamma=1.05070102214813232421875: gamma * jax.nn.elu(x, alpha),
    "Sigmoid": jax.nn.sigmoid,
    "HardSigmoid": lambda x, *, alpha=0.2, beta=0.5: jnp.clip(alpha * x + beta, 0, 1),
    "HardSwish": lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
    "Gelu": lambda x, *, approximate="none": jax.nn.gelu(x, approximate=approximate == "tanh"),
    "Erf": lax.erf,
    "Softplus": jax.nn.softplus,
    "Softsign": jax.nn.soft_sign,
    "Mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "Softmax": lambda x, *, axis=-1: jax.nn.softmax(x, axis),
    "LogSoftmax": lambda x, *, axis=-1: jax.nn.log_softmax(x, axis),
    "Softmax before version 13": _flat(jax.nn.softmax),
    "LogSoftmax before version 13": _flat(jax.nn.log_softmax),
    "Shape": _shape,
    "Size": lambda x: np.int64(math.prod(np.shape(x))),
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _trilu,
    "MatMul": lambda a, b: jnp.matmul(a, b),
    "Einsum": _einsum,
    "Gemm": _gemm,
    "Conv": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.ndim)), keepdims=True),
    "GlobalMaxPool": lambda x: x.max(tuple(range(2, x.ndim)), keepdims=True),
    "com.microsoft.FusedConv": _fused_conv,
    "com.microsoft.FusedGemm": _fused_gemm,
    **onnx_norms.OPERATORS,
    **onnx_resizing.OPERATORS,
    **onnx_fused.OPERATORS,
}
"""By ONNX's names; "before version 13" are operators whose meaning has changed."""
