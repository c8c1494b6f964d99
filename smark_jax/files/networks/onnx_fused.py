"""ONNX's quantisers and attention, and the operators into which onnxruntime fuses several of ONNX's.

Quantised values stay real numbers that are whole: what follows computes with reals (see ``onnx_quantised``).

References:
  https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smark_jax.files.networks import layers
from smark_jax.files.networks.onnx_model import DTYPES
from smark_jax.files.networks.static import elementwise


def _along(x: Any, numbers: Any, axis: int) -> Any:
    """Scales or zero points in a shape that fits: one for all, or one for each entry of an axis."""
    numbers = numbers.astype(np.float32)
    if numbers.size == 1:
        return numbers.reshape(())
    return numbers.reshape(*[1] * (axis % x.ndim), -1, *[1] * (x.ndim - 1 - axis % x.ndim))


def _dequantize(x: Any, scale: Any, zero: Any = None, *, axis: int = 1, **said: Any) -> Any:
    """Whole numbers as real ones; a list of scales stands for their product."""
    scale = math.prod(scale) if isinstance(scale, list) else scale
    x = x.astype(np.float32)
    return (x if zero is None else x - _along(x, zero, axis)) * _along(x, scale, axis)


def _quantize(x: Any, scale: Any, zero: Any = None, *, axis: int = 1, output_dtype: int = 0, **said: Any) -> Any:
    """Real numbers in the steps and within the range of whole ones, which the zero point's type decides."""
    kind = zero.dtype if zero is not None else DTYPES[output_dtype or 2]
    steps = x / _along(x, scale, axis)
    if not np.issubdtype(kind, np.integer):
        return steps.astype(kind).astype(np.float32)
    steps = jnp.round(steps) if zero is None else jnp.round(steps) + _along(x, zero, axis)
    return jnp.clip(steps, np.iinfo(kind).min, np.iinfo(kind).max)


def _dynamic_quantize(x: Any) -> list[Any]:
    """Whole numbers from 0 to 255 over the range of the values and zero, the scale and the zero point."""
    low, high = jnp.minimum(x.min(), 0), jnp.maximum(x.max(), 0)
    scale = jnp.where(high > low, (high - low) / 255, 1)
    zero = jnp.clip(jnp.round(-low / scale), 0, 255)
    return [jnp.clip(jnp.round(x / scale) + zero, 0, 255), scale, zero]


_ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "Relu": lambda x: jnp.maximum(x, 0),
    "Sigmoid": jax.nn.sigmoid,
    "Tanh": jnp.tanh,
    "LeakyRelu": lambda x, alpha: jnp.where(x >= 0, x, x * alpha),
    "Clip": jnp.clip,
    "HardSigmoid": lambda x, alpha, beta: jnp.clip(alpha * x + beta, 0, 1),
}


def activated(x: Any, activation: str, parameters: Sequence[float] = ()) -> Any:
    """What a fused activation, one of :data:`_ACTIVATIONS`, makes of a result."""
    if activation not in _ACTIVATIONS:
        raise NotImplementedError(f"the activation {activation} is not supported")
    return _ACTIVATIONS[activation](x, *parameters)


def _fused_matmul(
    a: Any,
    b: Any,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Any:
    if transBatchA or transBatchB:
        raise NotImplementedError("transposed batches are not supported")
    out = jnp.matmul(jnp.swapaxes(a, -1, -2) if transA else a, jnp.swapaxes(b, -1, -2) if transB else b)
    return out if alpha == 1 else out * alpha


def _gelu(x: Any, bias: Any = None) -> Any:
    return jax.nn.gelu(x if bias is None else elementwise("add")(x, bias), approximate=False)


def _fast_gelu(x: Any, bias: Any = None) -> Any:
    return jax.nn.gelu(x if bias is None else elementwise("add")(x, bias), approximate=True)


def _skip_layer_norm(x: Any, skip: Any, scale: Any, bias: Any = None, more: Any = None, *, epsilon: float) -> list[Any]:
    """Layer norm of a sum, which is the last result; the middle ones are for training."""
    total = elementwise("add")(x, skip)
    total = total if more is None else elementwise("add")(total, more)
    return [layers.layer_norm(total, scale, bias, total.ndim - 1, epsilon), None, None, total]


def _split_heads(x: Any, heads: int) -> Any:
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def _attention(
    queries: Any,
    keys: Any,
    values: Any,
    mask: Any = None,
    *,
    is_causal: int = 0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    scale: float | None = None,
    softmax_precision: int = 1,
    qk_matmul_output_mode: int = 0,
) -> Any:
    """Attention of [B H N D], or of [B N H D] with the last two axes in one."""
    q, k, v = _split_heads(queries, q_num_heads), *(_split_heads(x, kv_num_heads) for x in (keys, values))
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    if is_causal:
        seen = jnp.tri(layers.countable(q.shape[-2]), layers.countable(k.shape[-2]), dtype=bool)
        hidden = jnp.where(seen, 0.0, -jnp.inf)
        mask = seen if mask is None else mask & seen if mask.dtype == bool else mask + hidden
    out = layers.attention(q, k, v, mask, scale)
    return out if queries.ndim == 4 else out.swapaxes(1, 2).reshape(*queries.shape[:2], -1)


def _packed_attention(
    x: Any, weight: Any, bias: Any, mask: Any = None, *, num_heads: int, scale: float | None = None, **said: Any
) -> Any:
    """Self-attention of [B N C], whose projections are the parts of one matrix [C 3C]."""
    if mask is not None or any(said.values()):
        raise NotImplementedError("masks and other settings of this attention are not supported")
    parts = jnp.split(jnp.matmul(x, weight) + bias[None, None], 3, -1)
    return _attention(*parts, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale)


def _multi_head_attention(
    queries: Any, keys: Any, values: Any, bias: Any = None, *, num_heads: int, scale: float | None = None, **said: Any
) -> Any:
    """Attention of [B N C], with one bias for queries, keys and values end to end."""
    if any(said.values()):
        raise NotImplementedError("masks and other settings of this attention are not supported")
    parts = [queries, keys, values]
    if bias is not None:
        ends = np.cumsum([part.shape[-1] for part in parts])[:-1].tolist()
        parts = [part + piece[None, None] for part, piece in zip(parts, jnp.split(bias, ends), strict=True)]
    return _attention(*parts, q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale)


_FUSED: dict[str, Callable[..., Any]] = {
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _fast_gelu,
    "QuickGelu": lambda x, *, alpha=1.702: x * jax.nn.sigmoid(alpha * x),
    "FusedMatMul": _fused_matmul,
    "SkipLayerNormalization": _skip_layer_norm,
    "Attention": _packed_attention,
    "MultiHeadAttention": _multi_head_attention,
}

OPERATORS: dict[str, Callable[..., Any]] = {
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "Attention": _attention,
    **{f"com.microsoft.{name}": function for name, function in _FUSED.items()},
}
"""By ONNX's names, with the domain where that is not its own."""
