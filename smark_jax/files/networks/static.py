"""Operations on arrays that stay NumPy's as long as all of their operands are known without weights and images.

Exporters compute shapes and indices by nodes of the graph, which must be known while a function is traced: what is
static comes as an array of NumPy, and everything else as one of JAX.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from smark_jax.files.networks.layers import aligned

MAX_STATIC = 2**12
"""The most values of an array that is computed while tracing; two such arrays can make one of 2**24."""


def is_static(*values: Any) -> bool:
    """Whether all values are small arrays of NumPy, or None."""
    return all(
        value is None or (isinstance(value, np.ndarray | np.generic) and value.size <= MAX_STATIC) for value in values
    )


def library(*values: Any) -> Any:
    """The module that computes with these values: NumPy if all are static, else ``jax.numpy``."""
    return np if is_static(*values) else jnp


def integers(value: Any) -> list[int]:
    """A setting that is a list of whole numbers, whether it is given as a setting or as an input.

    Raises:
      ValueError: when it depends on an image, or is far too long.
    """
    if not isinstance(value, list | np.ndarray | np.generic) or np.size(value) > MAX_STATIC:
        raise ValueError(f"expected at most {MAX_STATIC:,} whole numbers that depend on no image")
    return [int(number) for number in np.asarray(value).reshape(-1)]


def elementwise(name: str) -> Callable[..., Any]:
    """The function of this name of NumPy or ``jax.numpy``, whose operands may have fewer axes than the result."""

    def apply(*values: Any) -> Any:
        return getattr(library(*values), name)(*aligned(*values))

    return apply


def fold(name: str) -> Callable[..., Any]:
    """The function of two operands of this name, for any number of operands."""
    pair = elementwise(name)
    return lambda *values: functools.reduce(pair, values)


def operand(value: Any) -> Any:
    """A number or an array, of which Python's operators cannot make something far larger, as of text and lists.

    Raises:
      ValueError: when it is none.
    """
    if isinstance(value, str | list | tuple | dict) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError("expected an array or a number of 64 bits")
    return value


def of_sizes(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A calculation with sizes."""
    return lambda a, b: operand(function(operand(a), operand(b)))


def power(a: Any, b: Any) -> Any:
    """A power; Python's own, of two whole numbers, has as many digits as it likes."""
    if isinstance(a, int) and isinstance(b, int):
        raise ValueError("expected an array")
    return a**b
