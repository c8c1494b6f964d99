"""Attacks that put huge weights where they do not change the outputs, to swamp the correlation with the mark."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from smark_jax import _trees, _validate
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.alignment import Graph
from smark_jax.attacks import inputs


def swamp_units(
    params: PyTree, apply_fn: ApplyFn, images: AnyArray, graph: Graph, key: Array, units: int = 20, size: float = 1e18
) -> PyTree:
    """Cuts off the units that matter least, and fills the kernels that feed them with huge weights.

    A unit that never fires costs nothing to cut off. Of the units outside group norm, those go first whose outgoing
    weights add least to the mean square of what they are summed into. Outgoing weights become zero, incoming ones
    ``size`` with random signs. Source: large values in dead units, as adversarial weights are hidden from a distance
    between models (the project's own trials). Budget: unlabelled images, a few hundred; no training.

    Args:
      params: the copy.
      apply_fn: ``apply_fn(params, images) -> logits``.
      images: unlabelled images, shape [N, ...].
      graph: of the network, from :func:`smark_jax.alignment.trace_graph`.
      key: a ``jax.random`` key of the signs.
      units: how many units, over all spaces.
      size: of the weights; sums of them must stay below 3e38.

    Raises:
      SmarkError: when ``units`` is not at least 1, ``size`` not positive and finite, or the network has fewer units.
    """
    _validate.positive("swamp_units", "units", units)
    _validate.finite_number("swamp_units", "size", size)
    leaves = {path: np.array(leaf) for path, leaf in _trees.named("swamp_units", params).items()}
    flows = {path: np.zeros(leaf.size) for path, leaf in leaves.items()}
    for entering in inputs.enter(params, apply_fn, images):
        path, entries = entering.path, entering.entries
        square = np.square(leaves[path].reshape(-1)[entries].astype(np.float64))
        np.add.at(flows[path], entries, entering.power[:, :, None] * square / entries.shape[2])
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    importance = [
        (float(value), space, unit)
        for space in range(len(graph.sizes))
        if not graph.partitions[space]
        for unit, value in enumerate(_importance(graph, space, leaves, flows))
    ]
    if len(importance) < units:
        raise _validate.fail("swamp_units", f"at least {units} units", str(len(importance)), "Choose fewer.")
    for _, space, unit in sorted(importance)[:units]:
        for path, axis in graph.places(space):
            entries = graph.entries(path, axis, graph.sizes)[space][unit]
            leaf = np.moveaxis(leaves[path], axis, 0)  # a view
            if (path, axis) in graph.consumed:
                leaf[entries] = 0
            elif leaf.ndim > 1:
                leaf[entries] = size * rng.choice([-1, 1], leaf[entries].shape)
    return jax.tree.map(jnp.asarray, _trees.rebuilt(params, leaves))


def _importance(graph: Graph, space: int, leaves: dict[str, np.ndarray], flows: dict[str, np.ndarray]) -> np.ndarray:
    """For each unit of a space, the largest share of a kernel's output power that comes from it."""
    found = np.zeros(graph.sizes[space])
    for path, axis in graph.places(space):
        if (path, axis) in graph.consumed:
            others = tuple(a for a in range(leaves[path].ndim) if a != axis)
            by_entry = flows[path].reshape(leaves[path].shape).sum(axis=others)
            entries = graph.entries(path, axis, graph.sizes)[space]
            found = np.maximum(found, by_entry[entries].sum(axis=1) / max(by_entry.sum(), 1e-30))
    return found


def fill_unused(params: PyTree, apply_fn: ApplyFn, images: AnyArray, key: Array, size: float = 100.0) -> PyTree:
    """Replaces the weights of inputs that are zero on all images, as those of dead channels are, by large noise.

    Unlike :func:`smark_jax.attacks.project_inputs` it needs no principal components, and unlike :func:`swamp_units` it
    changes no answer. Source and budget are those of the former.

    Args:
      params: the copy.
      apply_fn: ``apply_fn(params, images) -> logits``.
      images: unlabelled images, shape [N, ...].
      key: a ``jax.random`` key.
      size: standard deviation of the noise, in units of the leaf's RMS.

    Raises:
      SmarkError: when ``size`` is not positive and finite.
    """
    _validate.finite_number("fill_unused", "size", size)
    leaves = {path: np.array(leaf) for path, leaf in _trees.named("fill_unused", params).items()}
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    for entering in inputs.enter(params, apply_fn, images):
        path, entries = entering.path, entering.entries
        dead = entries[entering.power == 0]  # [dead inputs, outputs]
        flat = leaves[path].reshape(-1)
        flat[dead] = size * np.sqrt(np.mean(np.square(leaves[path], dtype=np.float64))) * rng.normal(size=dead.shape)
    return jax.tree.map(jnp.asarray, _trees.rebuilt(params, leaves))


def shift_logits(params: PyTree, apply_fn: ApplyFn, images: AnyArray, key: Array, size: float = 1.0) -> PyTree:
    """Adds one random vector to the last layer's weights of every class.

    All logits of an image move by the same amount, so probabilities and answers stay. Source: the softmax's invariance
    to a common shift. Budget: nothing; of the images, only shape and dtype are used.

    Args:
      params: the copy.
      apply_fn: ``apply_fn(params, images) -> logits``, whose last product with a leaf gives the logits.
      images: in the form that the network takes.
      key: a ``jax.random`` key.
      size: RMS of what is added, in units of the leaf's RMS.

    Raises:
      SmarkError: when ``size`` is not positive and finite, or the last product does not give a number for each class.
    """
    _validate.finite_number("shift_logits", "size", size)
    found = inputs.kernels(params, apply_fn, images)
    classes = jax.eval_shape(apply_fn, params, images[:1]).shape[-1]
    if not found or found[-1][1].shape[::2] != (1, classes):
        expected = f"a last layer with an output for each of the {classes} classes"
        raise _validate.fail("shift_logits", expected, "another", "Does apply_fn return logits?")
    leaves = {path: np.array(leaf) for path, leaf in _trees.named("shift_logits", params).items()}
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    path, entries = found[-1][0], found[-1][1][0]
    flat = leaves[path].reshape(-1)
    added = size * np.sqrt(np.mean(np.square(flat, dtype=np.float64))) * rng.normal(size=(len(entries), 1))
    flat[entries] = flat[entries] + added
    return jax.tree.map(jnp.asarray, _trees.rebuilt(params, leaves))
