"""ONNX's operators that make images of another size, over JAX arrays.

References:
  https://onnx.ai/onnx/operators/onnx__Resize.html
  https://onnx.ai/onnx/operators/onnx__ConvTranspose.html
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from smark_jax.files.networks import layers
from smark_jax.files.networks.layers import Window

_POSITIONS: dict[str, Callable[[Any, Any, int, int], Any]] = {
    "asymmetric": lambda at, scale, before, after: at / scale,
    "half_pixel": lambda at, scale, before, after: (at + 0.5) / scale - 0.5,
    "pytorch_half_pixel": lambda at, scale, before, after: ((at + 0.5) / scale - 0.5) * (after > 1),
    "align_corners": lambda at, scale, before, after: at * ((before - 1) / max(after - 1, 1)),
}
"""Where entries ``at`` of a longer or shorter axis lie on the one before."""
_NEAREST: dict[str, Callable[[Any], Any]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}


def _resize(
    x: Any,
    roi: Any = None,
    scales: Any = None,
    sizes: Any = None,
    *,
    mode: str = "nearest",
    coordinate_transformation_mode: str = "half_pixel",
    nearest_mode: str = "round_prefer_floor",
    axes: Sequence[int] | None = None,
    antialias: int = 0,
    keep_aspect_ratio_policy: str = "stretch",
    **said: Any,
) -> Any:
    """An image of other ``sizes``, or of its own times ``scales``; settings of other modes are not used."""
    found = (mode, coordinate_transformation_mode, nearest_mode, keep_aspect_ratio_policy)
    for value, known in zip(found, (("nearest", "linear"), _POSITIONS, _NEAREST, ("stretch",)), strict=True):
        if value not in known:
            raise NotImplementedError(f"resizing with {value} is not supported")
    if antialias:
        raise NotImplementedError("resizing with antialias is not supported")
    places = range(x.ndim) if axes is None else axes
    lengths, factors = ([] if value is None else np.asarray(value).tolist() for value in (sizes, scales))
    for number, axis in enumerate(places):
        before = x.shape[axis]
        factor = factors[number] if factors else lengths[number] / before
        after = int(np.floor(before * factor)) if factors else int(lengths[number])
        if after == before and factor == 1:
            continue
        at = np.arange(layers.countable(after), dtype=np.float32)
        at = _POSITIONS[coordinate_transformation_mode](at, np.float32(factor), before, after)
        at = np.clip(_NEAREST[nearest_mode](at) if mode == "nearest" else at, 0, before - 1)
        x = layers.interpolated(x, at, axis)
    return x


def _upsample(
    x: Any, scales: Any = None, *, mode: str = "nearest", coordinate_transformation_mode: str = "asymmetric"
) -> Any:
    """Resizing before its version 11, when positions were asymmetric."""
    positions = coordinate_transformation_mode  # which onnxruntime tells its own operator
    return _resize(x, None, scales, mode=mode, coordinate_transformation_mode=positions, nearest_mode="floor")


def _conv_transpose(
    x: Any,
    w: Any,
    b: Any = None,
    *,
    group: int = 1,
    strides: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    dilations: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    auto_pad: str = "NOTSET",
    kernel_shape: Any = None,
) -> Any:
    """A convolution's transpose with a kernel [I O ...]; automatic padding makes the result the image times strides."""
    axes = x.ndim - 2
    steps, spread, more = strides or [1] * axes, dilations or [1] * axes, output_padding or [0] * axes
    cuts = list(zip(pads[:axes], pads[axes:], strict=True)) if pads else [(0, 0)] * axes
    if auto_pad in ("SAME_UPPER", "SAME_LOWER") and output_shape is None:
        output_shape = [n * step for n, step in zip(x.shape[2:], steps, strict=True)]
    if output_shape is not None:
        sizes = zip(x.shape[2:], steps, more, w.shape[2:], spread, output_shape[-axes:], strict=True)
        whole = [step * (n - 1) + extra + gap * (size - 1) + 1 - out for n, step, extra, size, gap, out in sizes]
        cuts = [(n // 2, n - n // 2) if auto_pad == "SAME_UPPER" else (n - n // 2, n // 2) for n in whole]
    ends = [(before, after - extra) for (before, after), extra in zip(cuts, more, strict=True)]
    return layers.transposed_convolution(x, w, b, Window(w.shape[2:], steps, ends, spread), group)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Resize": _resize,
    "Resize before version 11": _upsample,
    "Upsample": _upsample,
    "ConvTranspose": _conv_transpose,
}
"""By ONNX's names; "before version 11" is an operator whose meaning has changed."""
