"""Quantised leaves as float32: ``(numbers - zero) * scale``, with scales of the file."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from smark_jax import _validate, errors
from smark_jax.files import _limits

_NARROW = frozenset(_limits.DTYPES[name] for name in ("I8", "U8", "F8_E4M3", "F8_E5M2"))


class Rule(NamedTuple):
    """What a leaf is quantised by: the names of its other leaves, and a factor."""

    scale: str
    zero: str | None
    factor: float
    unused: tuple[str, ...]


def rules(leaves: Mapping[str, np.ndarray]) -> dict[str, Rule]:
    """By the name of a quantised leaf, how its module keeps the scales.

    ``SCB`` are the largest absolute values in the rows of a ``weight`` of bitsandbytes, ``weight_scale`` and
    ``weight_zero_point`` those of compressed-tensors and of PyTorch's float8 layers.
    """
    found = {}
    for name, leaf in leaves.items():
        stem = name.removesuffix("weight")
        if stem == name or leaf.dtype not in _NARROW:
            continue
        zero = f"{name}_zero_point" if f"{name}_zero_point" in leaves else None
        if f"{stem}SCB" in leaves:
            found[name] = Rule(f"{stem}SCB", None, 1 / 127, (f"{stem}SCB", f"{stem}weight_format"))
        elif f"{name}_scale" in leaves:
            found[name] = Rule(f"{name}_scale", zero, 1.0, (f"{name}_scale", f"{name}_zero_point"))
    return found


def dequantised(
    leaves: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray], max_bytes: int
) -> dict[str, np.ndarray]:
    """The leaves, of real numbers, with quantised ones as float32 and without their scales.

    Those that the base quantises too stay as they are, and those whose scales are not finite.

    Raises:
      Undecided: when the float32 leaves take more than ``max_bytes``.
    """
    result, left = dict(leaves), max_bytes
    for name, rule in rules(leaves).items():
        if name in base and base[name].dtype in _NARROW:
            continue
        scale = leaves[rule.scale]
        if scale.size > leaves[name].size or not np.isfinite(scale.astype(np.float32)).all():
            continue  # no scales: the weights themselves can be matched
        left -= 4 * (leaves[name].size + 2 * scale.size)
        if left < 0:
            got = "quantised leaves that take more in float32"
            cause = "Ask for it in float32."
            raise _validate.fail("match_layout", f"up to {max_bytes:,} bytes", got, cause, kind=errors.Undecided)
        zero = leaves[rule.zero] if rule.zero else np.zeros((), np.float32)
        whole = apply(leaves[name], scale.astype(np.float32) * np.float32(rule.factor), zero)
        if whole is not None:
            result[name] = whole
            for unused in rule.unused:
                result.pop(unused, None)
    return result


def apply(numbers: np.ndarray, scale: Any, zero: Any) -> np.ndarray | None:
    """``(numbers - zero) * scale`` as float32; None where shapes do not fit.

    Args:
      numbers: of any shape.
      scale: of no more axes, each of which divides that of ``numbers``: one scale for each block of numbers.
      zero: likewise.
    """
    result = np.array(numbers, np.float32, order="C")
    with np.errstate(all="ignore"):
        for change, factors in ((np.subtract, zero), (np.multiply, scale)):
            blocks = np.shape(factors) + (1,) * (result.ndim - np.ndim(factors))
            if len(blocks) > result.ndim or any(
                n % m if m else True for n, m in zip(result.shape, blocks, strict=True)
            ):
                return None
            if result.size == 0:  # which any number of scales divides
                continue
            factors = np.asarray(factors, np.float32)
            split = [part for n, m in zip(result.shape, blocks, strict=True) for part in (m, n // m)]
            view = result.reshape(split)
            change(view, factors.reshape([part for m in blocks for part in (m, 1)]), out=view)
    return result
