"""Functions that are compiled for many shapes, each of little work: there compilation is what takes the time."""

import functools
import importlib.metadata
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from smark_jax import _validate

# Up to here a pass at the lowest level takes less time than its compilation at the highest.
_SMALL = 1 << 19
# On CPUs. XLA of before jaxlib 0.11 has older emitters of loops, which compile faster than its emitters of fusions.
_OLD_EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
_QUICK |= {"xla_cpu_use_fusion_emitters": False} if _OLD_EMITTERS else {}


def quickly(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` that on CPUs compiles at the lowest level: for what runs once or twice, and where no bits matter."""
    return jax.jit(function, compiler_options=_QUICK if jax.default_backend() == "cpu" else None)


def by_shape(function: Callable[..., Any], array: int, **options: Any) -> Callable[..., Any]:
    """``jax.jit``, which for small arrays on CPUs compiles in a tenth of the time and computes at a fifth of the speed.

    Results may differ in the last bits from those of ``jax.jit``, so nothing whose bits matter is compiled so.

    Args:
      function: pure; its arguments are given by position.
      array: the position of the array whose size decides.
      options: of ``jax.jit``.
    """
    whole = jax.jit(function, **options)
    quick = jax.jit(function, **options, compiler_options=_QUICK)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        small = math.prod(np.shape(arguments[array])) <= _SMALL and jax.default_backend() == "cpu"
        # Options are those of a whole program, so they can't be given inside another one.
        return (quick if small and not _validate.is_traced(*arguments) else whole)(*arguments)

    return call
