r"""Projection of kernels onto the directions that their inputs use, which erases the parts without effect.

Where a layer has many more inputs than directions in use, most of its weights multiply nothing. A leaker who has a few
hundred images, and needs no labels, keeps the principal components of each layer's inputs and overwrites the rest.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from smark_jax import _trees, _validate
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.attacks import inputs


def project_inputs(
    params: PyTree,
    apply_fn: ApplyFn,
    images: AnyArray,
    key: Array,
    keep: float | Mapping[str, float] = 0.999,
    noise: float = 1.0,
) -> PyTree:
    r"""Replaces kernels outside the principal components of their own inputs: PCA or null-space projection.

    With U the leading eigenvectors of :math:`\mathrm E[x x^\top]` for a kernel W's inputs x (of a convolution: its
    windows), P = U U^T and Gaussian Z,

    .. math:: W' = P W + \text{noise} \cdot \mathrm{RMS}(W) (I - P) Z.

    The first eigenvector is nearly the mean of x, so biases can stay. All layers are projected at once, with the inputs
    that they have in ``params``. Where tied weights enter several times, the first counts.

    Source: the null space of a layer's inputs is known from continual learning (Wang, Li, Yang, Xie, "Training networks
    in null space of feature covariance for continual learning", CVPR 2021); low-rank compression by principal
    components of activations from Zhang, Zou, He, Sun, "Accelerating very deep convolutional networks", TPAMI 2016.
    Budget: unlabelled images, as many as the widest layer has directions in use; no training.

    Args:
      params: the copy.
      apply_fn: ``apply_fn(params, images) -> logits``, any JAX function.
      images: unlabelled images, shape [N, ...].
      key: a ``jax.random`` key of the noise.
      keep: the number of components to keep (1 or more), or the share of their power (below 1); or by patterns which
        are searched in kernels' paths, of which the first that is found counts and the other kernels stay.
      noise: at least 0; 0 leaves zeros in the directions that are not kept.

    Returns:
      The copy with other kernels.

    Raises:
      SmarkError: when ``keep`` or ``noise`` is out of range, or a pattern is found in no path.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from smark_jax import attacks
      >>> apply_fn = lambda params, x: x @ params["kernel"]
      >>> params, x = {"kernel": jnp.ones((3, 2))}, jnp.eye(3)[:2]
      >>> projected = attacks.project_inputs(params, apply_fn, x, jax.random.key(0))
      >>> bool(jnp.allclose(apply_fn(projected, x), apply_fn(params, x))), bool((projected["kernel"][2] == 1).any())
      (True, False)
    """
    bars = dict(keep) if isinstance(keep, Mapping) else {"": keep}
    for bar in bars.values():
        if not (0 < bar < 1 or (bar >= 1 and bar == int(bar))):
            cause = "0.999 keeps as many components as hold that share of the inputs' power."
            raise _validate.fail("project_inputs", "keep below 1 or a whole number, above 0", repr(bar), cause)
    if not 0 <= noise < float("inf"):
        raise _validate.fail("project_inputs", "noise to be finite and at least 0", repr(noise), "Try 1.")
    for pattern in bars:
        _trees.matching("project_inputs", params, pattern)
    leaves = {path: np.array(leaf) for path, leaf in _trees.named("project_inputs", params).items()}
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    done = {path: np.zeros(leaf.size, bool) for path, leaf in leaves.items()}
    for entering in inputs.enter(params, apply_fn, images):
        path, entries = entering.path, entering.entries
        bar = next((bar for pattern, bar in bars.items() if re.search(pattern, path)), None)
        if bar is None or done[path][entries].any():
            continue
        done[path][entries] = True
        flat, basis = leaves[path].reshape(-1), _kept(*entering.principal(), bar)
        weights = flat[entries].astype(np.float64)
        new = noise * np.sqrt(np.mean(np.square(weights))) * rng.normal(size=weights.shape)
        flat[entries] = new + basis @ (basis.swapaxes(1, 2) @ (weights - new))
    return jax.tree.map(jnp.asarray, _trees.rebuilt(params, leaves))


def _kept(values: np.ndarray, vectors: np.ndarray, bar: float) -> np.ndarray:
    """The vectors [groups, inputs, n] of the leading components, with zeros in place of the others."""
    if bar >= 1:
        kept = np.broadcast_to(np.arange(values.shape[1]) < bar, values.shape)
    else:  # a component is kept where those before it do not suffice
        kept = np.cumsum(values, axis=1) - values < bar * values.sum(axis=1, keepdims=True)
    return vectors * kept[:, None]
