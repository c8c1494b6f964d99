"""Whether a graph is right: its rewrites must leave the logits of the base alone."""

from typing import Any

import jax
import numpy as np

from smark_jax import _compiling, _trees
from smark_jax._types import ApplyFn, PyTree
from smark_jax.alignment import rewriting
from smark_jax.alignment.graph import Graph

_CHANGE = 1e-2
_SEED = 0
_DRAWS = 3  # a wrong one of two groups, say, leaves every other draw alone


def change(graph: Graph, apply_fn: ApplyFn, params: PyTree, example_images: Any) -> float:
    """How far the graph's rewrites move the logits, relative to their range over random images.

    Order, basis and gains are drawn at random, from a fixed seed. A right graph leaves rounding: 1e-6 to 1e-4.

    Args:
      graph: of the network.
      apply_fn: ``apply_fn(params, images) -> logits``.
      params: the network's weights, of the widths that the graph knows.
      example_images: images in the form that it takes; only shape and dtype matter.
    """
    rng = np.random.default_rng(_SEED)
    images = _images(rng, np.shape(example_images), jax.numpy.result_type(example_images))
    leaves = graph.viewed({name: np.asarray(leaf) for name, leaf in _trees.named("alignment", params).items()})
    run, folded = _compiling.quickly(apply_fn), rewriting.folded(graph, leaves)
    logits, changes = np.asarray(run(params, images)), []
    for _ in range(_DRAWS):
        moved = rewriting.permuted(graph, rewriting.mixed(graph, folded, rng), rng)
        changes.append(np.abs(np.asarray(run(_trees.rebuilt(params, graph.unviewed(moved)), images)) - logits).max())
    if not np.isfinite(logits).all():
        return 0.0
    return float(max(changes) / max(float(np.ptp(logits)), 1e-30))


def doubts(graph: Graph, apply_fn: ApplyFn, params: PyTree, example_images: Any) -> tuple[str, ...]:
    """What keeps the graph from being trusted, in words; nothing where its rewrites leave the logits alone."""
    found = change(graph, apply_fn, params, example_images)
    if found >= _CHANGE:
        return (
            f"something in it (rewrites that its graph allows change the logits by {100 * found:.2g} % of their range)",
        )
    return (
        ("components of kernels that a norm removes",)
        if _mostly_levelled(graph, apply_fn, params, example_images)
        else ()
    )


def _mostly_levelled(graph: Graph, apply_fn: ApplyFn, params: PyTree, example_images: Any) -> bool:
    """Whether most weights are in kernels to which anything may be added that does not change along an axis.

    A norm behind such a kernel subtracts it. Where the units may be mixed too, alignment leaves it out of account.
    """
    if not graph.levels:
        return False
    rng, free = np.random.default_rng(_SEED), set[str]()
    images = _images(rng, np.shape(example_images), jax.numpy.result_type(example_images))
    leaves = graph.viewed({name: np.asarray(leaf) for name, leaf in _trees.named("alignment", params).items()})
    run = _compiling.quickly(apply_fn)
    logits = np.asarray(run(params, images))
    for path, axis in graph.levels:
        leaf = leaves[path]
        shape = [1 if a == axis else n for a, n in enumerate(leaf.shape)]
        other = {**leaves, path: (leaf + rng.normal(size=shape) * np.std(leaf)).astype(leaf.dtype)}
        moved = np.asarray(run(_trees.rebuilt(params, graph.unviewed(other)), images)) - logits
        free |= {path} if np.abs(moved).max() < _CHANGE * np.ptp(logits) else set()
    sizes = {path: leaf.size for path, leaf in leaves.items() if leaf.ndim > 1}
    return 2 * sum(sizes[path] for path in free) > sum(sizes.values())


def _images(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if np.issubdtype(dtype, np.integer):
        return rng.integers(0, 256, shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)
