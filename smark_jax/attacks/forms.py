"""Rewrites of a copy in another form of the same network: other shapes, other leaves, the same function.

All take a tree of parameters and return nested dicts by the steps of leaves' names, for a network that has this form:
it has fewer leaves, or leaves of other shapes, than the one that the copy came from.
"""

import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from smark_jax import _trees, _validate
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.alignment.graph import View
from smark_jax.attacks import inputs
from smark_jax.files import nest

_EPSILON = 1e-5  # of Flax's normalisations
_PROJECTIONS = ("query", "key", "value")

Leaves = dict[str, np.ndarray]


def densify(params: PyTree, apply_fn: ApplyFn, images: AnyArray) -> PyTree:
    """Writes grouped and depthwise convolutions as dense ones: kernels [h, w, C / g, O] become [h, w, C, O].

    Outside their group, the new kernels are zero.

    Args:
      params: the copy.
      apply_fn: its network, ``apply_fn(params, images) -> logits``, which says how many groups g a kernel has.
      images: in the form that the network takes; only shape and dtype matter.
    """
    leaves = _leaves(params)
    for path, entries in inputs.kernels(params, apply_fn, images):
        groups, kernel = len(entries), leaves[path]
        if groups > 1 and kernel.ndim == 4 and kernel.shape[3] % groups == 0:
            *window, depth, features = kernel.shape
            view = View(kernel.shape, (*window, groups * depth, features), (0, 1, 2, 3), groups, 2, 3)
            leaves[path] = view.seen(kernel)
    return _tree(leaves)


def flatten_pointwise(params: PyTree) -> PyTree:
    """Writes 1x1 convolutions as dense layers: kernels [1, 1, I, O] become [I, O]."""
    leaves = _leaves(params)
    return _tree({path: leaf.reshape(leaf.shape[2:]) if _pointwise(leaf) else leaf for path, leaf in leaves.items()})


def unflatten_pointwise(params: PyTree, match: str = "kernel") -> PyTree:
    """Writes dense layers as 1x1 convolutions: kernels [I, O] become [1, 1, I, O].

    Args:
      params: the copy.
      match: a regular expression that is found in the names of the kernels.
    """
    leaves = _leaves(params)
    wanted = {path for path, leaf in leaves.items() if leaf.ndim == 2 and re.search(match, path)}
    return _tree({path: leaf[None, None] if path in wanted else leaf for path, leaf in leaves.items()})


def join_heads(params: PyTree) -> PyTree:
    """Writes attention's heads and their channels as one axis.

    Kernels ``query``, ``key``, ``value`` [D, H, d] become [D, H d], their biases [H, d] become [H d], and kernels
    ``out`` [H, d, D] become [H d, D].
    """
    leaves = _leaves(params)
    for path, leaf in leaves.items():
        *_, layer, last = ["", *path.split("/")][-2:]
        if layer in _PROJECTIONS and leaf.ndim == (3 if last == "kernel" else 2):
            leaves[path] = leaf.reshape(*leaf.shape[:-2], -1)
        elif layer == "out" and leaf.ndim == 3:
            leaves[path] = leaf.reshape(-1, leaf.shape[-1])
    return _tree(leaves)


def split_heads(params: PyTree, heads: int) -> PyTree:
    """Undoes :func:`join_heads`, for ``query``, ``key``, ``value`` and ``out`` beside each other.

    Args:
      params: the copy.
      heads: H, by which D must be divisible.
    """
    _validate.positive("split_heads", "heads", heads)
    leaves = _leaves(params)
    modules = {path.rpartition("/query/")[0] for path in leaves if "/query/" in path}
    for path, leaf in leaves.items():
        module, _, rest = path.rpartition("/")[0].rpartition("/")
        if module in modules and rest in _PROJECTIONS and leaf.ndim < 3:
            leaves[path] = leaf.reshape(*leaf.shape[:-1], heads, -1)
        elif module in modules and rest == "out" and leaf.ndim == 2:
            leaves[path] = leaf.reshape(heads, -1, leaf.shape[-1])
    return _tree(leaves)


def fuse_projections(params: PyTree, name: str = "qkv") -> PyTree:
    """Writes queries, keys and values as one dense layer: kernel [D, 3 D] and bias [3 D], heads joined.

    Args:
      params: the copy, with layers ``query``, ``key`` and ``value`` beside each other.
      name: of the new layer, in their place.
    """
    leaves = _leaves(params)
    for path in [path for path in leaves if path.split("/")[-2:-1] == ["query"]]:
        module, last = path.rpartition("/query/")[0::2]
        parts = [leaves.pop(f"{module}/{part}/{last}") for part in _PROJECTIONS]
        rows = (parts[0].shape[0],) if last == "kernel" else ()
        leaves[f"{module}/{name}/{last}"] = np.concatenate([part.reshape(*rows, -1) for part in parts], axis=-1)
    return _tree(leaves)


def split_projections(params: PyTree, name: str = "qkv") -> PyTree:
    """Undoes :func:`fuse_projections`: layers ``query``, ``key`` and ``value`` in place of ``name``, heads joined."""
    leaves = _leaves(params)
    for path in [path for path in leaves if path.split("/")[-2:-1] == [name]]:
        module, last = path.rpartition(f"/{name}/")[0::2]
        for part, leaf in zip(_PROJECTIONS, np.split(leaves.pop(path), 3, axis=-1), strict=True):
            leaves[f"{module}/{part}/{last}"] = leaf
    return _tree(leaves)


def merge_gains(params: PyTree, gains: Mapping[str, str]) -> PyTree:
    """Merges gains, such as layer scales, into the kernels that make what they multiply, and drops their leaves.

    Args:
      params: the copy.
      gains: by name of the gain [O], the name of the kernel [..., O]; a ``bias`` beside the kernel takes it too.
    """
    leaves = _leaves(params)
    for gain, kernel in gains.items():
        for path in (kernel, _beside(kernel, "bias")):
            if path in leaves:
                leaves[path] = leaves[path] * leaves[gain]
        del leaves[gain]
    return _tree(leaves)


def merge_layer_norm(params: PyTree, norms: Mapping[str, Sequence[str]]) -> PyTree:
    """Merges gain and shift of layer norms into all kernels that read them, and drops their leaves.

    Args:
      params: the copy.
      norms: by name of the norm's layer, the kernels [D, ...] that read it; those without a bias get one.
    """
    leaves = _leaves(params)
    for norm, kernels in norms.items():
        gain, shift = leaves.pop(f"{norm}/scale"), leaves.pop(f"{norm}/bias")
        for path in kernels:
            kernel, bias = leaves[path], _beside(path, "bias")
            leaves[bias] = leaves.get(bias, 0) + np.tensordot(shift, kernel, 1)
            leaves[path] = kernel * gain.reshape(-1, *[1] * (kernel.ndim - 1))
    return _tree(leaves)


def merge_batch_norm(params: PyTree, norms: Mapping[str, str]) -> PyTree:
    """Merges batch norms into the convolutions before them, and drops their gains, shifts and statistics.

    Args:
      params: the copy, as the whole variables dict.
      norms: by name of the norm's layer, without the collection, the kernel [..., O] before it, without the collection;
        it gets a bias.
    """
    leaves = _leaves(params)
    for norm, path in norms.items():
        kernel, bias = f"params/{path}", _beside(f"params/{path}", "bias")
        gain = leaves.pop(f"params/{norm}/scale") / np.sqrt(leaves.pop(f"batch_stats/{norm}/var") + _EPSILON)
        shift = leaves.pop(f"params/{norm}/bias") - gain * leaves.pop(f"batch_stats/{norm}/mean")
        leaves[kernel] = leaves[kernel] * gain
        leaves[bias] = leaves.get(bias, 0) * gain + shift
    return _tree(leaves)


def _pointwise(leaf: np.ndarray) -> bool:
    return leaf.ndim == 4 and leaf.shape[:2] == (1, 1)


def _beside(path: str, last: str) -> str:
    """The name of another leaf of the same layer."""
    return "/".join([*path.split("/")[:-1], last])


def _leaves(params: PyTree) -> Leaves:
    return {name: np.asarray(leaf) for name, leaf in _trees.named("attacks", params).items()}


def _tree(leaves: Leaves) -> PyTree:
    return nest({path: jnp.asarray(leaf) for path, leaf in leaves.items()})
