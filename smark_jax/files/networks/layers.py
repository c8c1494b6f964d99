"""Layers that the graphs of several frameworks share, over JAX arrays.

Images have their channels on axis 1, as in ONNX and PyTorch, or on the last axis, as in TFLite and Keras. A convolution
has a function for each; a pool is told its first spatial axis, 2 or 1.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Padding = Sequence[tuple[int, int]]
_MAX_LENGTH = 2**12  # of a window, of an axis that is pooled, and of a list of pieces: these are counted in Python


class Window(NamedTuple):
    """How a kernel or a pool slides over an image, by spatial axis.

    Attributes:
      size: of the window.
      strides: of its steps.
      padding: before and after the image.
      dilations: distances between the window's entries.
    """

    size: Sequence[int]
    strides: Sequence[int]
    padding: Padding
    dilations: Sequence[int]


def aligned(*values: Any) -> list[Any]:
    """The values with as many axes as the one that has most; numbers stay numbers."""
    most = max(np.ndim(value) for value in values)
    return [v.reshape((1,) * (most - v.ndim) + v.shape) if 0 < np.ndim(v) < most else v for v in values]


def per_channel(vector: Any, ndim: int) -> Any:
    """A vector of one entry per channel, in a shape that fits images of ``ndim`` axes."""
    return vector.reshape(1, -1, *[1] * (ndim - 2))


def convolution(images: Any, kernel: Any, bias: Any, window: Window, groups: int) -> Any:
    """A convolution of images [B C ...] with a kernel [O I ...].

    It runs with the channels last: XLA's convolutions on CPUs are several times faster that way.
    """
    kernel_axes = "OI" + "DHW"[-(kernel.ndim - 2) :]
    return jnp.moveaxis(convolution_last(jnp.moveaxis(images, 1, -1), kernel, bias, window, groups, kernel_axes), -1, 1)


def convolution_last(images: Any, kernel: Any, bias: Any, window: Window, groups: int, kernel_axes: str) -> Any:
    """A convolution of images [B ... C] with a kernel whose axes are named in order, such as ``"HWIO"``."""
    space = "DHW"[-(kernel.ndim - 2) :]
    out = lax.conv_general_dilated(
        images,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilations,
        feature_group_count=groups,
        dimension_numbers=(f"N{space}C", kernel_axes, f"N{space}C"),
    )
    return out if bias is None else out + bias.reshape(*[1] * (out.ndim - 1), -1)


def transposed_convolution(images: Any, kernel: Any, bias: Any, window: Window, groups: int) -> Any:
    """What a convolution does to gradients, to images [B C ...] with a kernel [I O ...].

    ``window.padding`` is that of the convolution: so much is cut off the result.
    """
    inputs, outputs, *size = kernel.shape
    parts = kernel.reshape(groups, inputs // groups, outputs, *size).swapaxes(1, 2)
    flipped = jnp.flip(parts.reshape(groups * outputs, inputs // groups, *size), tuple(range(2, kernel.ndim)))
    reach = [dilation * (n - 1) for n, dilation in zip(window.size, window.dilations, strict=True)]
    out = lax.conv_general_dilated(
        images,
        flipped,
        (1,) * len(size),
        [(n - before, n - after) for n, (before, after) in zip(reach, window.padding, strict=True)],
        lhs_dilation=window.strides,
        rhs_dilation=window.dilations,
        feature_group_count=groups,
    )
    return out if bias is None else out + per_channel(bias, out.ndim)


def interpolated(images: Any, at: np.ndarray, axis: int) -> Any:
    """The values at positions of an axis, linear between its entries; a product, which alignment follows."""
    length = countable(images.shape[axis])
    matrix = np.maximum(0, 1 - abs(np.arange(length)[:, None] - at)).astype(np.float32)
    return jnp.moveaxis(jnp.matmul(jnp.moveaxis(images, axis, -1), matrix, precision=lax.Precision.HIGHEST), -1, axis)


def same_padding(
    lengths: Sequence[int], size: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Padding:
    """The padding that makes a result's lengths those of the image over the strides; odd ones are longer at the end."""
    padding = []
    for length, n, stride, dilation in zip(lengths, size, strides, dilations, strict=True):
        whole = max((-(-length // stride) - 1) * stride + dilation * (n - 1) + 1 - length, 0)
        padding.append((whole // 2, whole - whole // 2))
    return padding


def rounded_up(window: Window, lengths: Sequence[int]) -> Window:
    """The window with padding at the end that makes a last, partial step whole, if that begins inside the image."""
    padding = []
    for size, stride, (before, after), dilation, length in zip(*window, lengths, strict=True):
        reach = dilation * (size - 1) + 1
        steps = -(-(length + before + after - reach) // stride)
        steps -= steps * stride >= length + before
        padding.append((before, max(after, steps * stride + reach - length - before)))
    return window._replace(padding=padding)


def max_pool(images: Any, window: Window, first: int = 2) -> Any:
    """The largest value in each window; ``first`` is the first spatial axis."""
    return _pooled(images, window, -jnp.inf, lax.max, first)


def mean_pool(images: Any, window: Window, counted: Padding, first: int = 2) -> Any:
    """The mean of each window over the image and the part ``counted`` of the padding."""
    total = _pooled(images, window, 0.0, lax.add, first)
    countable(max(*window.size, *total.shape[first : first + len(window.size)]))
    counts = np.ones((), np.float32)
    for axis, (size, stride, (before, _), dilation) in enumerate(zip(*window, strict=True)):
        length, (left, right) = images.shape[first + axis], counted[axis]
        at = np.arange(total.shape[first + axis])[:, None] * stride - before + np.arange(size) * dilation
        here = ((at >= -left) & (at < length + right)).sum(1).astype(np.float32)
        counts = counts[..., None] * here
    if (counts == counts.flat[0]).all():
        return total / float(counts.flat[0])
    return total / np.expand_dims(counts, (*range(first), *range(first + counts.ndim, total.ndim)))


def countable(number: int) -> int:
    """A number of pieces or entries, unless it is more than any network has."""
    if number > _MAX_LENGTH:
        raise ValueError(f"expected at most {_MAX_LENGTH:,} entries, not {number:,}")
    return number


_NEAR = ("reflect", "symmetric", "edge", "wrap")


def padded(images: Any, widths: Padding, mode: str, value: Any) -> Any:
    """Padding before and after each axis: a number (``constant``), or what lies near, in one of NumPy's modes."""
    if mode == "constant":
        fill = np.asarray(value, images.dtype).reshape(())
        return lax.pad(images, fill, [(before, after, 0) for before, after in widths])
    if mode not in _NEAR or any(max(w) > n for w, n in zip(widths, images.shape, strict=True)):
        raise ValueError(f"padding of mode {mode} by more than the image, or of a mode that is not supported")
    return jnp.pad(images, widths, mode=mode)


def _pooled(images: Any, window: Window, start: float, combine: Any, first: int) -> Any:
    others = images.ndim - first - len(window.size)  # axes after the spatial ones
    spread = lambda numbers, fill: (*[fill] * first, *numbers, *[fill] * others)  # noqa: E731
    return lax.reduce_window(
        images,
        np.asarray(start, images.dtype),
        combine,
        spread(window.size, 1),
        spread(window.strides, 1),
        spread(window.padding, (0, 0)),
        window_dilation=spread(window.dilations, 1),
    )


def batch_norm(images: Any, scale: Any, bias: Any, mean: Any, variance: Any, epsilon: float) -> Any:
    """Normalisation by running statistics; scale and bias may be None."""
    centred = images - per_channel(mean, images.ndim)
    factor = lax.rsqrt(per_channel(variance, images.ndim) + epsilon)
    out = centred * (factor if scale is None else factor * per_channel(scale, images.ndim))
    return out if bias is None else out + per_channel(bias, images.ndim)


def standardised(values: Any, axes: Sequence[int], epsilon: float) -> Any:
    """Values less their mean, over the root of their variance plus ``epsilon``, both along ``axes``."""
    centred = values - values.mean(tuple(axes), keepdims=True)
    return centred * lax.rsqrt((centred * centred).mean(tuple(axes), keepdims=True) + epsilon)


def layer_norm(values: Any, scale: Any, bias: Any, first: int, epsilon: float) -> Any:
    """Normalisation over the axes from ``first`` on; scale and bias may be None."""
    out = standardised(values, range(first, values.ndim), epsilon)
    lead = (1,) * first
    out = out if scale is None else out * scale.reshape(*lead, *scale.shape)
    return out if bias is None else out + bias.reshape(*lead, *bias.shape)


def group_norm(images: Any, groups: int, scale: Any, bias: Any, epsilon: float) -> Any:
    """Normalisation over groups of neighbouring channels of each image; scale and bias may be None."""
    batch, channels, *space = images.shape
    grouped = images.reshape(batch, groups, channels // groups, *space)
    out = standardised(grouped, range(2, grouped.ndim), epsilon).reshape(images.shape)
    out = out if scale is None else out * per_channel(scale, images.ndim)
    return out if bias is None else out + per_channel(bias, images.ndim)


def attention(queries: Any, keys: Any, values: Any, mask: Any, scale: float | None) -> Any:
    """Softmax attention; ``mask`` is None, boolean (False is hidden), or added to the scores."""
    countable(max(queries.shape[-2], keys.shape[-2]))
    factor = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    scores = jnp.matmul(queries, jnp.swapaxes(keys, -1, -2)) * factor
    if mask is not None:
        mask = mask.reshape((1,) * (scores.ndim - mask.ndim) + mask.shape)
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == bool else scores + mask
    return jnp.matmul(jax.nn.softmax(scores, -1), values)
