"""Rewrites that preserve a network's function, but move or rescale the weights that carry a fingerprint.

Permuted and rescaled neurons: Lukas et al. 2022, "SoK: How robust is image classification deep neural network
watermarking?", and arXiv 2205.00199; dummy neurons (NSO: zero, clique, split): arXiv 2303.09732. All take a network's
graph from :func:`smark_jax.alignment.trace_graph` and can be composed in any order, also on models already widened.

Invertible matrices between queries and keys, and between values and outputs: MergeLock, arXiv 2509.01548. Rotated
streams between normalisations whose gains are folded: Ashkboos et al. 2024, "SliceGPT", arXiv 2401.15024.

Rescaling needs activations with a(c x) = c a(x) for c > 0 (ReLU, leaky ReLU, max and average pooling), and flips need
odd ones (tanh). Normalisations are recognised by Flax's names: ``scale``, ``bias``, ``mean``, ``var``.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from smark_jax import _trees, _validate
from smark_jax._types import PyTree
from smark_jax.alignment import Graph, rewriting
from smark_jax.alignment.matching import along

Dummy = Literal["zero", "clique", "split"]
_EPSILON = 1e-5  # of Flax's normalisations


def permute(params: PyTree, graph: Graph, key: Array) -> PyTree:
    """Shuffles the channels of every space; of groups (of norms, of convolutions), the groups and the channels within.

    Args:
      params: the copy.
      graph: of its network.
      key: a ``jax.random`` key.
    """
    return _tree(params, rewriting.permuted(graph, _leaves(params, graph), _rng(key)), graph)


def rewrite(params: PyTree, graph: Graph, key: Array) -> PyTree:
    """Draws one network from all that compute the same function, as far as the graph knows them.

    Gains are folded into kernels, linear spaces mixed, heads and channels permuted, and components added that
    normalisations remove: :func:`fold_gains`, :func:`mix`, :func:`add_means`, :func:`permute`.

    Args:
      params: the copy, of the base's widths.
      graph: of its network.
      key: a ``jax.random`` key.

    Returns:
      The copy with other weights, and the same logits but for rounding.
    """
    rng = _rng(key)
    leaves = rewriting.mixed(graph, rewriting.folded(graph, _leaves(params, graph)), rng)
    leaves = rewriting.permuted(graph, rewriting.with_means(graph, leaves, rng, 1.0), rng)
    return _tree(params, leaves, graph)


def fold_gains(params: PyTree, graph: Graph) -> PyTree:
    """Folds the gains of layer norms and layer scales into kernels, where the graph says that this is possible.

    A gain between a normalisation and the kernels that read it becomes a vector of ones, the bias after it zeros: the
    kernels' biases take up what it contributes. It stays where one of these kernels has no bias.

    Args:
      params: the copy.
      graph: of its network.
    """
    return _tree(params, rewriting.folded(graph, _leaves(params, graph)), graph)


def mix(params: PyTree, graph: Graph, key: Array) -> PyTree:
    """Multiplies every linear space by a random matrix of its group, and puts blocks (heads) in another order.

    Orthogonal matrices are drawn uniformly; other invertible ones have condition numbers up to 10. A space whose gains
    are not all ones is not mixed: call :func:`fold_gains` first.

    Args:
      params: the copy.
      graph: of its network.
      key: a ``jax.random`` key.
    """
    return _tree(params, rewriting.mixed(graph, _leaves(params, graph), _rng(key)), graph)


def add_means(params: PyTree, graph: Graph, key: Array, size: float = 1.0) -> PyTree:
    """Adds random components along the vector of ones to kernels that write into streams whose mean is removed.

    Args:
      params: the copy.
      graph: of its network.
      key: a ``jax.random`` key.
      size: standard deviation of the components, relative to the RMS of a kernel's weights.

    Raises:
      SmarkError: when ``size`` is not positive and finite.
    """
    _validate.finite_number("add_means", "size", size)
    return _tree(params, rewriting.with_means(graph, _leaves(params, graph), _rng(key), size), graph)


def rescale(params: PyTree, graph: Graph, key: Array, spread: float = 1.0) -> PyTree:
    """Multiplies each channel's incoming weights by a positive factor, and divides its outgoing weights by the same.

    In normalised spaces, gain and bias of the normalisation take the factor in place of the kernel before them. That
    kernel is scaled by another factor, and the running mean and variance of batch norm are adapted to it.

    Args:
      params: the copy.
      graph: of its network.
      key: a ``jax.random`` key.
      spread: standard deviation of the factors' natural logarithm.

    Raises:
      SmarkError: when ``spread`` is not positive and finite.
    """
    _validate.finite_number("rescale", "spread", spread)
    rng = _rng(key)
    sizes = graph.widths(_leaves(params, graph))
    out = [np.exp(rng.normal(0, spread, size)).astype(np.float32) for size in sizes]
    inner = [np.exp(rng.normal(0, spread, size)).astype(np.float32) for size in sizes]
    return _multiply(params, graph, out, inner)


def flip(params: PyTree, graph: Graph, key: Array) -> PyTree:
    """Negates incoming and outgoing weights of half the channels: for odd activations such as tanh.

    Args:
      params: the copy.
      graph: of its network.
      key: a ``jax.random`` key.
    """
    rng = _rng(key)
    sizes = graph.widths(_leaves(params, graph))
    signs = [rng.choice(np.array([-1, 1], np.float32), size) for size in sizes]
    return _multiply(params, graph, signs, [np.ones(size, np.float32) for size in sizes])


def fold_batch_norm(params: PyTree, graph: Graph) -> PyTree:
    """Folds gain and variance of every batch norm into the kernel before it, and its bias into the running mean.

    Args:
      params: the copy, as the whole variables dict.
      graph: of its network.

    Raises:
      SmarkError: when there is no batch norm.
    """
    leaves = _leaves(params, graph)
    norms = _norms(leaves)
    if not norms:
        raise _validate.fail("fold_batch_norm", "a network with batch norm", "none", "Pass the whole variables dict.")
    sizes = graph.widths(leaves)
    for stem, names in norms.items():
        kernel = _kernel_before(graph, stem, leaves)
        gain = leaves[names["scale"]] / np.sqrt(leaves[names["var"]] + _EPSILON)
        entries = graph.entries(kernel, leaves[kernel].ndim - 1, sizes)
        factor = np.ones(leaves[kernel].shape[-1], np.float32)
        for where in entries.values():
            factor[where] = gain[where]
        leaves[kernel] = leaves[kernel] * factor
        leaves[names["mean"]] = leaves[names["mean"]] * gain - leaves[names["bias"]]
        leaves[names["var"]] = np.full_like(gain, 1 - _EPSILON)
        leaves[names["scale"]] = np.ones_like(gain)
        leaves[names["bias"]] = np.zeros_like(gain)
    return _tree(params, leaves, graph)


def add_neurons(params: PyTree, graph: Graph, key: Array, share: float = 0.2, kind: Dummy = "zero") -> PyTree:
    """Widens spaces by dummy neurons, which leave the network's function unchanged.

    Spaces stay as they are where new channels would change statistics (normalisation over channels, group norm) or fit
    no group (grouped convolutions, shuffles), and where channels may be mixed (streams, heads, bottlenecks).

    Args:
      params: the copy.
      graph: of its network.
      key: a ``jax.random`` key.
      share: number of new neurons relative to those of the space; at least one is added, for a clique two.
      kind: ``"zero"``: random incoming weights and zero outgoing ones. ``"clique"``: pairs with the same random
        incoming weights and opposite outgoing ones. ``"split"``: a neuron becomes two with its incoming weights, and
        random outgoing weights that add up to its own.

    Returns:
      The copy with wider leaves.

    Raises:
      SmarkError: when the share is not positive, the kind unknown, or no space can be widened.
    """
    _validate.finite_number("add_neurons", "share", share)
    if kind not in ("zero", "clique", "split"):
        raise _validate.fail("add_neurons", "kind 'zero', 'clique' or 'split'", repr(kind), "Is it misspelt?")
    free = [s for s, some in enumerate(graph.partitions) if not some and s not in graph.reduced | graph.listed]
    if not free:
        cause = "Norms would see every new channel, and groups of convolutions and shuffles have a number of their own."
        raise _validate.fail("add_neurons", "channels of which nothing takes a mean", "none", cause)
    rng = _rng(key)
    leaves = _leaves(params, graph)
    old = graph.widths(leaves)
    extra = [max(1, round(share * size)) for size in old]
    if kind == "clique":
        extra = [2 * -(-count // 2) for count in extra]
    for space, size, count in ((space, old[space], extra[space]) for space in free):
        widths = list(graph.widths(leaves))
        origin = rng.permutation(size)[:count] if kind == "split" else rng.integers(size, size=count)
        origin = np.resize(origin, count)
        for path in dict.fromkeys(path for path, _ in graph.places(space)):
            for axis in sorted(axis for p, axis in graph.places(space) if p == path):
                widths[space] = size
                leaf = np.moveaxis(leaves[path], axis, 0)
                before = graph.entries(path, axis, widths)[space]
                fixed = _others(graph, (path, axis), space, widths)
                widths[space] = size + count
                after = graph.entries(path, axis, widths)[space]
                wide = np.zeros((graph.length(path, axis, widths), *leaf.shape[1:]), leaf.dtype)
                wide[after[:size]] = leaf[before]
                wide[_others(graph, (path, axis), space, widths)] = leaf[fixed]
                wide[after[size:]] = _new(leaf[before], origin, (path, axis) in graph.consumed, kind, rng)
                if kind == "split" and (path, axis) in graph.consumed:
                    np.subtract.at(wide, after[origin], wide[after[size:]])
                leaves[path] = np.moveaxis(wide, 0, axis)
    return _tree(params, leaves, graph)


def _new(slices: np.ndarray, origin: np.ndarray, outgoing: bool, kind: Dummy, rng: np.random.Generator) -> np.ndarray:
    """Slices of new neurons, shape [new, ...], made from those of existing neurons."""
    shape = (len(origin), *slices.shape[1:])
    spread = float(np.sqrt(np.mean(np.square(slices)))) or 1.0
    if outgoing:
        noise = rng.normal(0, spread, shape).astype(np.float32)
        if kind == "zero":
            return np.zeros(shape, np.float32)
        if kind == "clique":
            noise[1::2] = -noise[::2]
        return noise
    if kind == "split" or slices.ndim == 2:  # gains and statistics are copied from an existing neuron
        chosen = slices[origin]
    else:
        chosen = rng.normal(0, spread, shape).astype(np.float32)
    if kind == "clique":
        chosen = chosen.copy()
        chosen[1::2] = chosen[::2]
    return chosen


def _multiply(params: PyTree, graph: Graph, out: list[np.ndarray], inner: list[np.ndarray]) -> PyTree:
    """Scales channels' outputs by ``out``, and by ``inner`` between a kernel and its normalisation."""
    leaves = _leaves(params, graph)
    sizes = graph.widths(leaves)
    statistics = any(path.rpartition("/")[2] == "var" for path in leaves)
    for space in range(len(sizes)):
        normalised = graph.normalised(space)
        for path, axis in graph.places(space):
            if (path, axis) in graph.consumed:
                factor = 1 / out[space]
            elif not normalised:
                factor = out[space]
            elif leaves[path].ndim > 1 or path.rpartition("/")[2] == "mean":
                factor = inner[space] if statistics else np.ones_like(inner[space])
            elif path.rpartition("/")[2] == "var":
                leaves[path] = np.square(inner[space]) * (leaves[path] + _EPSILON) - _EPSILON
                continue
            else:
                factor = out[space]
            whole = np.ones(leaves[path].shape[axis], np.float32)
            whole[graph.entries(path, axis, sizes)[space]] = factor[:, None]
            leaves[path] = leaves[path] * along(whole, axis, leaves[path].ndim)
    return _tree(params, leaves, graph)


def _norms(leaves: dict[str, np.ndarray]) -> dict[str, dict[str, str]]:
    """By module, the paths of a batch norm's four vectors."""
    found: dict[str, dict[str, str]] = {}
    for path in leaves:
        if path.startswith("batch_stats/") and path.endswith("/var"):
            stem = path.removeprefix("batch_stats/").removesuffix("/var")
            found[stem] = {
                "mean": f"batch_stats/{stem}/mean",
                "var": path,
                "scale": f"params/{stem}/scale",
                "bias": f"params/{stem}/bias",
            }
    return found


def _kernel_before(graph: Graph, stem: str, leaves: dict[str, np.ndarray]) -> str:
    """The kernel before a batch norm: Flax numbers both in the order of creation."""
    number = stem.rpartition("_")[2]
    path = next((p for p in leaves if p.endswith(f"Conv_{number}/kernel")), None)
    if path is None:
        raise _validate.fail("fold_batch_norm", f"a kernel Conv_{number}", "none", "Are modules named by Flax?")
    return path


def _others(graph: Graph, place: tuple[str, int], space: int, sizes: list[int]) -> np.ndarray:
    """Entries of an axis that do not belong to a space; their order does not depend on its width."""
    path, axis = place
    keep = np.ones(graph.length(path, axis, sizes), bool)
    keep[graph.entries(path, axis, sizes)[space]] = False
    return np.flatnonzero(keep)


def _leaves(params: PyTree, graph: Graph) -> dict[str, np.ndarray]:
    """Leaves by path, as the graph sees them."""
    return graph.viewed({name: np.asarray(leaf) for name, leaf in _trees.named("attacks", params).items()})


def _tree(params: PyTree, leaves: dict[str, np.ndarray], graph: Graph) -> PyTree:
    """Leaves in the form of ``params`` again."""
    return jax.tree.map(jnp.asarray, _trees.rebuilt(params, graph.unviewed(leaves)))


def _rng(key: Array) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
