"""Types of values that modules exchange."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array

PyTree = Any
"""Nested containers whose leaves are arrays: parameters, gradients, a Flax variables dict, an nnx state."""

AnyArray = Array | np.ndarray
"""An array on a device or on the host."""

ApplyFn = Callable[[PyTree, Array], Array]
"""``apply_fn(params, images [B H W C]) -> logits [B classes]``, pure."""
