"""Converts a model to a dict of its leaves by name, and back."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from smark_jax import _trees, _validate
from smark_jax.files import _limits

PyTree = Any  # like _types.PyTree, whose module imports jax; here jax is imported only to walk a tree


def flatten(params: PyTree) -> dict[str, np.ndarray]:
    """The leaves of a parameter tree by name, on the host; a leaf's name is its path, the steps joined by ``/``.

    Random keys (``jax.random.key``), such as Dropout's in an nnx model, become their uint32 data;
    :func:`jax.random.wrap_key_data` turns it back into keys.

    Raises:
      SmarkError: when two leaves have the same name, or one is not an array of real numbers.

    Examples:
      >>> import numpy as np
      >>> from smark_jax import files
      >>> sorted(files.flatten({"dense": {"kernel": np.ones((2, 3)), "bias": np.zeros(3)}}))
      ['dense/bias', 'dense/kernel']
    """
    import jax

    leaves: dict[str, np.ndarray] = {}
    for name, value in _trees.named("flatten", params).items():
        if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        leaf = np.asarray(value)
        if leaf.dtype.name not in _limits.BY_NAME:
            cause = "Weights are real numbers: leave out everything else."
            raise _validate.fail("flatten", f"real numbers in leaf {name!r}", f"dtype {leaf.dtype}", cause)
        leaves[name] = leaf
    return leaves


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict from which :func:`flatten` gives these leaves.

    Lists in the original tree come back as dicts with the keys ``"0"``, ``"1"``, ...

    Raises:
      SmarkError: when a name is both a leaf and the beginning of another name.

    Examples:
      >>> from smark_jax import files
      >>> files.nest({"dense/kernel": 1, "dense/bias": 2})
      {'dense': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *steps, last = name.split("/")
        branch: Any = tree
        for step in steps:
            branch = branch.setdefault(step, {}) if isinstance(branch, dict) else None
        if not isinstance(branch, dict) or last in branch:
            raise _validate.fail(
                "nest", "names of which none begins another", f"{name!r} and a part of it", "Was the file put together?"
            )
        branch[last] = leaf
    return tree


def content_hash(leaves: Mapping[str, Any]) -> str:
    """The SHA-256, in hex, of the leaves' names, dtypes, shapes and values.

    Unlike the hash of a file, it is the same for a model in any file format. The hashed bytes begin with
    ``smark weights v1``. Then each leaf follows, sorted by name (by code points): the name's length in bytes as four
    bytes, big-endian, and the name in UTF-8; likewise the line ``DTYPE SHAPE`` (such as ``float32 3,4``); then the
    values in C order, little-endian.

    Raises:
      SmarkError: when a leaf is not an array of real numbers.
    """
    digest = hashlib.sha256(b"smark weights v1")
    for name in sorted(leaves):
        leaf = np.asarray(leaves[name])
        if leaf.dtype.name not in _limits.BY_NAME:
            cause = "Hash what flatten or read returns."
            raise _validate.fail("content_hash", f"real numbers in leaf {name!r}", f"dtype {leaf.dtype}", cause)
        for text in (name, f"{leaf.dtype.name} {','.join(map(str, leaf.shape))}"):
            digest.update(len(text.encode()).to_bytes(4, "big") + text.encode())
        digest.update(raw(leaf))
    return digest.hexdigest()


def raw(leaf: np.ndarray) -> memoryview:
    """A leaf's bytes in C order, little-endian; copied only if it is laid out differently."""
    plain = np.ascontiguousarray(leaf, leaf.dtype.newbyteorder("<") if leaf.dtype.kind in "iuf" else None)
    return plain.reshape(-1).view(np.uint8).data
