"""Attacks that replace weights or mix in others: untrained ones, or those of a network of the same architecture.

The new weights cost nothing; the training that must follow does. :func:`smark_jax.attacks.fine_tune` does it.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from smark_jax import _trees, _validate, carriers
from smark_jax._types import PyTree
from smark_jax.alignment import Graph, matching


def trained(params: PyTree) -> PyTree:
    """For each leaf, whether gradients move it: floating-point, and neither a statistic nor a table."""
    roles = carriers.roles(params)
    return _trees.map_named(lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.floating) and roles[path].trains, params)


def reinitialise(params: PyTree, fresh: PyTree, match: str) -> PyTree:
    """Replaces some layers with untrained ones: the first step of retraining.

    A new head is one that replaces the last layer (Adi et al., USENIX Security 2018).

    Args:
      params: the copy.
      fresh: untrained weights of the same network, such as ``models.init`` draws.
      match: a regular expression searched in leaves' paths, such as ``"Dense_1"``.

    Raises:
      SmarkError: when the trees differ in structure, shapes or dtypes, or ``match`` is found in no path.
    """
    _trees.same("reinitialise", [params, fresh])
    chosen = _trees.matching("reinitialise", params, match)
    return jax.tree.map(lambda old, new, moved: new if moved else old, params, fresh, chosen)


def reinitialise_in_turn(
    params: PyTree, fresh: PyTree, matches: Sequence[str], tune: Callable[[PyTree], PyTree]
) -> PyTree:
    """Replaces layers with untrained ones, one after the other, and tunes the network after each.

    In the end no layer is left of the copy, but each new one was taught by the layers around it. Source: Alabdulmohsin,
    Maennel, Keysers, "The impact of reinitialization on generalization in convolutional neural networks", 2021
    (arXiv 2109.00267), who do it for accuracy. Budget: what ``tune`` takes, once for each pattern.

    Args:
      params: the copy.
      fresh: untrained weights of the same network.
      matches: regular expressions searched in leaves' paths; one for each step, in order.
      tune: ``tune(params) -> params``, such as a partial :func:`smark_jax.attacks.fine_tune`.

    Raises:
      SmarkError: as :func:`reinitialise`.
    """
    for match in matches:
        params = tune(reinitialise(params, fresh, match))
    return params


def shrink_and_perturb(params: PyTree, fresh: PyTree, shrink: float = 0.4, perturb: float = 0.1) -> PyTree:
    r"""Scales all weights down and adds untrained ones: :math:`\text{shrink} \cdot w + \text{perturb} \cdot w_0`.

    Ash, Adams, "On warm-starting neural network training", NeurIPS 2020, whose factors are the defaults. Running
    statistics and other leaves that are not trained stay as they are.

    Args:
      params: the copy.
      fresh: untrained weights of the same network.
      shrink: factor of the copy, above 0 and at most 1.
      perturb: factor of the untrained weights, at least 0.

    Raises:
      SmarkError: when a factor is out of range, or the trees differ in structure, shapes or dtypes.
    """
    if not 0 < shrink <= 1:
        raise _validate.fail("shrink_and_perturb", "shrink above 0 and at most 1", repr(shrink), "Try 0.4.")
    if not 0 <= perturb < float("inf"):
        raise _validate.fail("shrink_and_perturb", "perturb finite and at least 0", repr(perturb), "Try 0.1.")
    _trees.same("shrink_and_perturb", [params, fresh])
    return jax.tree.map(
        lambda old, new, moved: (shrink * old + perturb * new).astype(old.dtype) if moved else old,
        params,
        fresh,
        trained(params),
    )


def merge(params: PyTree, other: PyTree, graph: Graph, share: float = 0.5) -> PyTree:
    """Averages the copy with an independent network whose units are first brought into the copy's order.

    Ainsworth, Hayase, Srinivasa, "Git Re-Basin: merging models modulo permutation symmetries", ICLR 2023, by matching
    weights. Budget: the training of the other network, and of the merged one.

    Args:
      params: the copy.
      other: weights of the same network, trained by the leaker.
      graph: of the network, from :func:`smark_jax.alignment.trace_graph`.
      share: of the other network in the average, strictly between 0 and 1.

    Raises:
      SmarkError: when the share is outside (0, 1), or the trees differ in structure, shapes or dtypes.
    """
    _validate.unit_interval("merge", "share", share, "Half is 0.5.")
    _trees.same("merge", [params, other])
    ours, theirs = (
        {path: np.asarray(leaf) for path, leaf in _trees.named("merge", tree).items()} for tree in (params, other)
    )
    alive = [np.ones(size, bool) for size in graph.sizes]
    kernels = {path: matching.balanced(graph, path, ours[path], graph.sizes) for path in matching.kernels(graph)}
    match = matching.match(graph, theirs, kernels, graph.sizes, alive)
    done = dict(enumerate(zip(match.units, match.signs, strict=True)))
    merged = {}
    for path, leaf in theirs.items():
        for axis in range(leaf.ndim):
            if graph.spaces(path, axis):
                leaf = matching.reorder(graph, leaf, (path, axis), graph.sizes, done)
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        mean = (1 - share) * ours[path] + share * leaf if floating else ours[path]
        merged[path] = mean.astype(ours[path].dtype)
    return jax.tree.map(jnp.asarray, _trees.rebuilt(params, merged))
