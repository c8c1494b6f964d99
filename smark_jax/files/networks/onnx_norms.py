"""ONNX's operators that normalise, over JAX arrays.

References:
  https://onnx.ai/onnx/operators/
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from smark_jax.files.networks import layers
from smark_jax.files.networks.static import elementwise


def _batch_norm(
    x: Any,
    scale: Any,
    bias: Any,
    mean: Any,
    variance: Any,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    training_mode: int = 0,
) -> Any:
    """Batch norm; in training mode of its own statistics, by which PyTorch standardises kernels."""
    if training_mode:
        others = (0, *range(2, x.ndim))
        mean, variance = x.mean(others), x.var(others)
    return layers.batch_norm(x, scale, bias, mean, variance, epsilon)


def _layer_norm(
    x: Any, scale: Any, bias: Any = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Any:
    return layers.layer_norm(x, scale, bias, axis % x.ndim, epsilon)


def _group_norm(x: Any, scale: Any, bias: Any, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1) -> Any:
    each = 1 if scale.size == x.shape[1] else x.shape[1] // num_groups  # before version 21, one scale for each group
    return layers.group_norm(x, num_groups, jnp.repeat(scale, each), jnp.repeat(bias, each), epsilon)


def _instance_norm(x: Any, scale: Any, bias: Any, *, epsilon: float = 1e-5) -> Any:
    return layers.group_norm(x, x.shape[1], scale, bias, epsilon)


def _rms_norm(x: Any, scale: Any, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Any:
    axes = tuple(range(axis % x.ndim, x.ndim))
    return elementwise("multiply")(x * lax.rsqrt((x * x).mean(axes, keepdims=True) + epsilon), scale)


def _lp_norm(x: Any, *, axis: int = -1, p: int = 2) -> Any:
    length = abs(x).sum(axis, keepdims=True) if p == 1 else jnp.sqrt((x * x).sum(axis, keepdims=True))
    return jnp.where(length == 0, 0, x / jnp.where(length == 0, 1, length))


def _local_response(x: Any, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Any:
    reach = ((0, 0), ((size - 1) // 2, size // 2), *[(0, 0)] * (x.ndim - 2))
    near = lax.reduce_window(
        x * x, np.zeros((), x.dtype), lax.add, (1, size, *[1] * (x.ndim - 2)), (1,) * x.ndim, reach
    )
    return x / (bias + alpha / size * near) ** beta


OPERATORS: dict[str, Callable[..., Any]] = {
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "RMSNormalization": _rms_norm,
    "LpNormalization": _lp_norm,
    "LRN": _local_response,
}
