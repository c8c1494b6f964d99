"""Batches of examples: the shuffle and the batched loop that training and evaluation share."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np


def shuffled(rng: np.random.Generator, count: int, batch_size: int) -> Iterator[np.ndarray]:
    """One epoch: the indices of full batches in a fresh order; a short last batch is dropped."""
    order = rng.permutation(count)
    for start in range(0, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size]


def apply(run: Callable[..., Any], batch_size: int, *arrays: np.ndarray) -> np.ndarray:
    """``run`` on all examples, ``batch_size`` at a time, the results joined along the first axis.

    The last batch is padded with copies of its last example, and the results for the padding are dropped. So memory is
    bounded, and one compilation serves all batches.
    """
    count = len(arrays[0])
    size, found = min(batch_size, count), []
    for start in range(0, count, size):
        parts = [array[start : start + size] for array in arrays]
        missing = size - len(parts[0])
        parts = [np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) for part in parts]
        found.append(np.asarray(run(*parts))[: size - missing])
    return np.concatenate(found)
