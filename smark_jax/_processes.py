"""Between the processes of ``jax.distributed``: what all must have alike, and what each of them has found.

All processes must make the same calls in the same order. A single process talks to nobody.
"""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from smark_jax import _validate


def same(who: str, what: str, content: bytes, cause: str) -> None:
    """Refuses, in all processes together, content that is not the same in all of them.

    Raises:
      SmarkError: naming the processes that differ from the first.
    """
    if jax.process_count() == 1:
        return
    digests = multihost_utils.process_allgather(np.frombuffer(hashlib.sha256(content).digest(), np.uint32))
    different = np.flatnonzero((digests != digests[0]).any(axis=1))
    if different.size:
        got = f"others in process {different.tolist()} than in process 0"
        raise _validate.fail(who, f"the same {what} in every process", got, cause)


def gathered(array: np.ndarray) -> list[np.ndarray]:
    """Every process's array, in their order; they may differ in length. The dtype has 4 or 8 bytes."""
    if jax.process_count() == 1:
        return [array]
    words = array.view(np.uint32)  # JAX would make 32 bits of 64
    lengths = multihost_utils.process_allgather(np.uint32(words.size)).tolist()
    padded = np.zeros(max(lengths), np.uint32)
    padded[: words.size] = words
    found = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:length].copy().view(array.dtype) for row, length in zip(found, lengths, strict=True)]
