"""PyTorch's operators (its library ATen) that image classifiers use, over JAX arrays.

Arguments come in the order of ATen's schemas, and sizes as plain numbers.

References:
  https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from smark_jax.files.networks import layers
from smark_jax.files.networks.layers import Window, aligned
from smark_jax.files.networks.pt2 import DTYPES
from smark_jax.files.networks.static import of_sizes, operand, power


def _each(value: Any, axes: int) -> list[int]:
    """A setting for each spatial axis, where one number may stand for all."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    return numbers * axes if len(numbers) == 1 else numbers


def _pair(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(a: Any, b: Any) -> Any:
        return function(*aligned(operand(a), operand(b)))

    return apply


def _scaled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A sum or difference whose second term may have a factor."""

    def apply(a: Any, b: Any, alpha: Any = 1) -> Any:
        return function(*aligned(operand(a), operand(b) if alpha == 1 else operand(b) * operand(alpha)))

    return apply


def _pad_spatial(padding: Any, axes: int) -> Any:
    return padding.upper() if isinstance(padding, str) else [(n, n) for n in _each(padding, axes)]


def _conv(
    x: Any, w: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    axes = w.ndim - 2
    window = Window(w.shape[2:], _each(stride, axes), _pad_spatial(padding, axes), _each(dilation, axes))
    return layers.convolution(x, w, bias, window, groups)


def _convolution(
    x: Any,
    w: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    if transposed:
        raise NotImplementedError("transposed convolutions are not supported")
    return _conv(x, w, bias, stride, padding, dilation, groups)


def _batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn: bool = False,
) -> Any:
    if training:
        raise NotImplementedError("the network was exported in training mode: call eval() first")
    return layers.batch_norm(x, weight, bias, mean, variance, eps)


def _native_batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> list[Any]:
    return [layers.batch_norm(x, weight, bias, mean, variance, eps)]


def _layer_norm(
    x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = False
) -> Any:
    return layers.layer_norm(x, weight, bias, x.ndim - len(shape), eps)


def _group_norm(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = False
) -> Any:
    return layers.group_norm(x, groups, weight, bias, eps)


def _pool_window(x: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Window:
    axes = x.ndim - 2
    size = _each(kernel, axes)
    window = Window(size, _each(stride, axes) if stride else size, _pad_spatial(padding, axes), _each(dilation, axes))
    return layers.rounded_up(window, x.shape[2:]) if ceil else window


def _max_pool(x: Any, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False) -> Any:
    return layers.max_pool(x, _pool_window(x, kernel, stride, padding, dilation, ceil))


def _mean_pool(
    x: Any,
    kernel: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil: bool = False,
    count_pad: bool = True,
    divisor: int | None = None,
) -> Any:
    if divisor is not None:
        raise NotImplementedError("a divisor of its own is not supported")
    counted = _pad_spatial(padding if count_pad else 0, x.ndim - 2)
    return layers.mean_pool(x, _pool_window(x, kernel, stride, padding, 1, ceil), counted)


def _adaptive_mean_pool(x: Any, size: Any) -> Any:
    """Means over n cells of each axis: cell i has the entries from floor(i L / n) to ceil((i + 1) L / n)."""
    for axis, count in enumerate(_each(size, x.ndim - 2), start=2):
        length = x.shape[axis]
        if length % layers.countable(count) == 0:
            x = x.reshape(*x.shape[:axis], count, length // count, *x.shape[axis + 1 :]).mean(axis + 1)
        else:
            cells = [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]
            means = [lax.slice_in_dim(x, a, b, axis=axis).mean(axis, keepdims=True) for a, b in cells]
            x = jnp.concatenate(means, axis)
    return x


def _attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if enable_gqa and k.shape[-3] != q.shape[-3]:
        raise NotImplementedError("attention with fewer keys than queries is not supported")
    if causal:
        mask = jnp.tri(q.shape[-2], k.shape[-2], dtype=bool)
    return layers.attention(q, k, v, mask, scale)


def _pad(x: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Any:
    """Padding by pairs from the last axis on; negative numbers cut."""
    widths = [(0, 0)] * x.ndim
    for i in range(len(pad) // 2):
        widths[-1 - i] = (pad[2 * i], pad[2 * i + 1])
    same = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return layers.padded(x, widths, same[mode], value or 0)


def _constant_pad(x: Any, pad: Sequence[int], value: float = 0) -> Any:
    return _pad(x, pad, "constant", value)


def _flatten(x: Any, start: int = 0, end: int = -1) -> Any:
    first, last = start % x.ndim, end % x.ndim
    return x.reshape(*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :])


def _unflatten(x: Any, axis: int, sizes: Sequence[int]) -> Any:
    axis %= x.ndim
    known = math.prod(n for n in sizes if n != -1)
    lengths = [x.shape[axis] // known if n == -1 else n for n in sizes]
    return x.reshape(*x.shape[:axis], *lengths, *x.shape[axis + 1 :])


def _slice(x: Any, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    cut = [slice(None)] * x.ndim
    cut[axis] = slice(start, end, step)
    return x[tuple(cut)]


def _expand(x: Any, sizes: Sequence[int], implicit: bool = False) -> Any:
    lead = len(sizes) - x.ndim
    return jnp.broadcast_to(x, [x.shape[i - lead] if n == -1 else n for i, n in enumerate(sizes)])


def _split(x: Any, sizes: Any, axis: int = 0) -> list[Any]:
    length = x.shape[axis]
    if isinstance(sizes, int):
        layers.countable(length // sizes)
    ends = list(range(sizes, length, sizes)) if isinstance(sizes, int) else np.cumsum(sizes)[:-1].tolist()
    return jnp.split(x, ends, axis)


def _mean(x: Any, axes: Any = None, keepdim: bool = False, *, dtype: int | None = None) -> Any:
    return x.mean(tuple(axes) if axes else None, keepdims=keepdim)


def _sum(x: Any, axes: Any = None, keepdim: bool = False, *, dtype: int | None = None) -> Any:
    return x.sum(tuple(axes) if axes else None, keepdims=keepdim)


def _largest(x: Any, axes: Any = (), keepdim: bool = False) -> Any:
    return x.max(tuple(axes) if axes else None, keepdims=keepdim)


def _squeeze(x: Any, axes: Any = None) -> Any:
    given = range(x.ndim) if axes is None else _each(axes, 1)
    return jnp.squeeze(x, tuple(axis for axis in given if x.shape[axis] == 1))


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    out = jnp.matmul(x, weight.T)
    return out if bias is None else operator.add(*aligned(out, bias))


def _addmm(bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    out = jnp.matmul(a, b)
    return operator.add(*aligned(bias if beta == 1 else bias * beta, out if alpha == 1 else out * alpha))


def _to(x: Any, *settings: Any, dtype: int | None = None, **others: Any) -> Any:
    kinds = [dtype, *(setting for setting in settings if type(setting) is int)]
    kind = next((kind for kind in kinds if kind is not None), None)
    return x if kind is None else x.astype(jax.dtypes.canonicalize_dtype(DTYPES[kind]))


def _in_evaluation(x: Any, rate: float = 0.5, train: bool = False) -> Any:
    if train:
        raise NotImplementedError("the network was exported in training mode: call eval() first")
    return x


def _prelu(x: Any, slope: Any) -> Any:
    return jnp.where(x >= 0, x, x * (slope.reshape(()) if slope.size == 1 else layers.per_channel(slope, x.ndim)))


def _same(x: Any, *settings: Any, **others: Any) -> Any:
    return x


OPERATORS: dict[str, Callable[..., Any]] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _convolution,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _native_batch_norm,
    "layer_norm": _layer_norm,
    "native_layer_norm": lambda *arguments: [_layer_norm(*arguments)],
    "group_norm": _group_norm,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": lambda *arguments: [_max_pool(*arguments)],
    "avg_pool2d": _mean_pool,
    "adaptive_avg_pool2d": _adaptive_mean_pool,
    "scaled_dot_product_attention": _attention,
    "linear": _linear,
    "addmm": _addmm,
    "matmul": lambda a, b: jnp.matmul(a, b),
    "mm": lambda a, b: jnp.matmul(a, b),
    "bmm": lambda a, b: jnp.matmul(a, b),
    "relu": lambda x: jnp.maximum(x, 0),
    "relu6": lambda x: jnp.clip(x, 0, 6),
    "hardtanh": lambda x, low=-1, high=1: jnp.clip(x, low, high),
    "clamp": lambda x, low=None, high=None: jnp.clip(x, low, high),
    "clamp_min": lambda x, low: jnp.maximum(x, low),
    "leaky_relu": lambda x, slope=0.01: jnp.where(x >= 0, x, x * slope),
    "prelu": _prelu,
    "elu": lambda x, alpha=1.0: jax.nn.elu(x, alpha),
    "gelu": lambda x, *, approximate="none": jax.nn.gelu(x, approximate == "tanh"),
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "hardswish": lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1),
    "hardsigmoid": lambda x: jnp.clip(x / 6 + 0.5, 0, 1),
    "softplus": lambda x, beta=1, threshold=20: jax.nn.softplus(x * beta) / beta,
    "softmax": lambda x, axis, dtype=None: jax.nn.softmax(x, axis),
    "_softmax": lambda x, axis, half=False: jax.nn.softmax(x, axis),
    "log_softmax": lambda x, axis, dtype=None: jax.nn.log_softmax(x, axis),
    "exp": jnp.exp,
    "sqrt": jnp.sqrt,
    "rsqrt": lax.rsqrt,
    "abs": jnp.abs,
    "neg": jnp.negative,
    "pow": _pair(power),
    "add": _scaled(operator.add),
    "sub": _scaled(operator.sub),
    "mul": _pair(operator.mul),
    "div": _pair(operator.truediv),
    "maximum": _pair(jnp.maximum),
    "minimum": _pair(jnp.minimum),
    "view": lambda x, sizes: x.reshape(sizes),
    "reshape": lambda x, sizes: x.reshape(sizes),
    "_unsafe_view": lambda x, sizes: x.reshape(sizes),
    "flatten": _flatten,
    "unflatten": _unflatten,
    "permute": lambda x, axes: x.transpose(axes),
    "transpose": lambda x, a, b: jnp.swapaxes(x, a, b),
    "t": lambda x: x.T,
    "cat": lambda parts, axis=0: jnp.concatenate(parts, axis),
    "stack": lambda parts, axis=0: jnp.stack(parts, axis),
    "split": _split,
    "split_with_sizes": _split,
    "chunk": lambda x, parts, axis=0: _split(x, -(-x.shape[axis] // parts), axis),
    "unbind": lambda x, axis=0: [lax.index_in_dim(x, i, axis, False) for i in range(layers.countable(x.shape[axis]))],
    "select": lambda x, axis, index: lax.index_in_dim(x, index, axis, False),
    "slice": _slice,
    "squeeze": _squeeze,
    "unsqueeze": lambda x, axis: jnp.expand_dims(x, axis),
    "expand": _expand,
    "roll": lambda x, shifts, axes: jnp.roll(x, shifts, axes),
    "pad": _pad,
    "constant_pad_nd": _constant_pad,
    "mean": _mean,
    "sum": _sum,
    "amax": _largest,
    "to": _to,
    "_to_copy": _to,
    "dropout": _in_evaluation,
    "feature_dropout": _in_evaluation,
    "clone": _same,
    "contiguous": _same,
    "detach": _same,
    "alias": _same,
    "lift_fresh_copy": _same,
    "sym_size": lambda x, axis: x.shape[axis],
    "_operator.add": of_sizes(operator.add),
    "_operator.sub": of_sizes(operator.sub),
    "_operator.mul": of_sizes(operator.mul),
    "_operator.floordiv": of_sizes(operator.floordiv),
}
"""By ATen's names, without overloads; the last ones calculate with sizes."""
