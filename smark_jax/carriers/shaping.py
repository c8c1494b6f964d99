r"""Making a shape: the sensitivity of the logits to each coordinate, from unlabelled images.

With fresh random signs r for each class, the sensitivity of coordinate (i, j) is

.. math:: F_{ij} = \mathrm{E} \, \Big(\frac{\partial}{\partial w_{ij}} \sum_c r_c \tilde z_c\Big)^2
   = \mathrm{E} \sum_c \Big(\frac{\partial \tilde z_c}{\partial w_{ij}}\Big)^2

over passes of one image, where :math:`\tilde z` are the logits less their mean over classes. This is the diagonal of
the Gauss-Newton matrix by Hutchinson's estimator. Its error depends on the number of passes: on EfficientNet-Lite0, 64
passes of one image are closer to 240 than 16 passes of eight images are. Its sums by row and by column are all that is
kept of a kernel: :math:`D_{ij} = R_i C_j / \sum F + 0.03 \, \overline{F}`. A vector keeps
:math:`F + 0.3 \, \overline F` for each entry, since single entries are known from a few passes only.

Scales are :math:`a D^{-1/2}`, with a such that an independent shift of standard deviation s in each coordinate changes
the logits by their own RMS, to first order. So a mark's strength is the relative change of the logits that is
predicted. What is measured is often larger: :func:`smark_jax.embedding.calibrate` measures it.

References:
  Hutchinson (1990), "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines".
  Martens, Grosse (2015), "Optimizing neural networks with Kronecker-factored approximate curvature".
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from smark_jax import _trees, _validate
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.carriers import directions, inputs, selection
from smark_jax.carriers.selection import Leaf
from smark_jax.carriers.shapes import Scales, Shape, is_vector

_PASSES = 64
_FLOOR, _VECTOR_FLOOR = 0.03, 0.3
# At the default strength of 0.01 no coordinate moves by more than 0.3 RMS of its leaf.
_CAP = 30.0
# The same for a direction, which moves by at most half the RMS of its own coefficients.
_ROW_CAP = 50.0
# A kernel is over-parametrised if its inputs span at most this share of the directions; likewise for a network.
_RATIO = 0.25
# Kernels in PyTorch's order have their outputs first, and windows of at most this size last.
_WINDOW = 11


def shape(
    base: PyTree,
    apply_fn: ApplyFn | None = None,
    images: Num[AnyArray, "N H W C"] | None = None,
    *,
    match: str | Callable[[str], object] | None = None,
    seed: int = 0,
) -> Shape:
    """How far each coordinate of a model may move, from what the network does with it.

    With the network and a few dozen unlabelled images, scales follow from sensitivities. Without them, each leaf moves
    by a share of its RMS that grows with the square root of its size: a conservative default. The last kernel never
    carries, since a new one is easily trained: it is the last that the network multiplies by, or without the network
    the one with a number of outputs that only its own bias shares.

    The same arguments give the same shape on one platform. Other images give a slightly different one, so store it
    (:meth:`Shape.to_arrays`) and commit to it (:meth:`Shape.digest`) before the first copy.

    Args:
      base: the model that copies are made from, as ``apply_fn`` takes it.
      apply_fn: the network, pure; logits or any other output with the images as first axis.
      images: in the form that the network takes.
      match: as for :func:`smark_jax.carriers.select`: the leaves to choose from.
      seed: of the order of images and of the signs.

    Returns:
      The shape.

    Raises:
      SmarkError: when network and images are not given together, the network refuses them or gives NaN, no leaf is
        left, or as :func:`smark_jax.carriers.select`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from smark_jax import carriers
      >>> base = {"a": jnp.sin(jnp.arange(600.0)).reshape(20, 30), "b": jnp.cos(jnp.arange(90.0)).reshape(30, 3)}
      >>> carriers.shape(base, lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], jnp.ones((4, 20)))
      Shape(1 leaves, 600 coordinates)
    """
    if (apply_fn is None) != (images is None):
        cause = "Without both, the conservative default needs neither."
        raise _validate.fail("shape", "apply_fn and images together", "one of them", cause)
    spec = selection.select(base, match)
    if apply_fn is None or images is None:
        return _unseen(spec, base)
    sites = inputs.sites(apply_fn, base, images[:1])
    check_outputs("shape", apply_fn, base, images)
    head = next(reversed(sites), None)
    spec = selection.select(base, {leaf.path for leaf in spec.leaves if leaf.path != head}.__contains__)
    narrowing = {leaf.path: leaf for leaf in spec.leaves if leaf.path in sites and _narrows(leaf, sites[leaf.path])}
    others = sum(leaf.size for leaf in spec.leaves if leaf.path not in narrowing and not is_vector(leaf))
    bases = directions.of(apply_fn, base, images, narrowing, others, _RATIO, seed)
    frames = [_plain(bases.get(leaf.path), sites.get(leaf.path, _rows(leaf))) for leaf in spec.leaves]
    sums, power = _sensitivities(base, apply_fn, images, spec, frames, seed)
    return _scaled(base, spec, frames, sums, power)


def check_outputs(who: str, apply_fn: ApplyFn, params: PyTree, images: Any) -> int:
    """The number of outputs for an image.

    Raises:
      SmarkError: when the network does not return one row of real numbers for each image.
    """
    some = images[:2]
    form = jax.eval_shape(apply_fn, params, some)
    shape = getattr(form, "shape", None)
    if not shape or len(shape) < 2 or shape[0] != len(some) or not jnp.issubdtype(form.dtype, jnp.floating):
        got = f"a {type(form).__name__}" if shape is None else f"shape {shape} of type {form.dtype}"
        cause = "The network returns a row of logits for each image, and nothing else."
        raise _validate.fail(who, f"logits of shape ({len(some)}, classes) for {len(some)} images", got, cause)
    return math.prod(shape[1:])


def _narrows(leaf: Leaf, rows: tuple[int, ...]) -> bool:
    """Whether a kernel has more inputs than outputs, without which it is not over-parametrised."""
    return math.prod(leaf.shape[axis] for axis in rows) ** 2 > leaf.size


def _plain(basis: np.ndarray | None, axes: tuple[int, ...]) -> Scales:
    """The coordinates of a leaf, whose scales are not known yet."""
    one = _single(1)
    return Scales(one, one, one, one, None if basis is None else _single(basis), axes)


def _rows(leaf: Leaf) -> tuple[int, ...]:
    """The axes over which a layer presumably sums, from the shape of its kernel alone."""
    axes, sizes = range(len(leaf.shape)), leaf.shape
    outputs_first = len(sizes) > 2 and max(sizes[2:]) <= _WINDOW and max(sizes[:2]) > max(sizes[2:])
    return tuple(axes[1:] if outputs_first else axes[:-1])


def _unseen(spec: selection.Spec, base: PyTree) -> Shape:
    """A share of each leaf's RMS, proportional to the square root of its size; without the presumed head.

    The squares of the shares add up to 1: at strength s the logits change by s of their RMS, if every layer passes a
    relative change of its weights on as it is. Measured at the default of 0.01: 0.011 on EfficientNet-Lite0, whose
    norms and depthwise kernels amplify it; 0.002 on OpenNSFW and 0.001 on the CNN for MNIST
    (``python -m experiments.benchmarks --only shape_cost --config full``).
    """
    every = [Leaf(path, np.shape(leaf)) for path, leaf in _trees.named("shape", base).items()]
    vectors = {leaf.size for leaf in every if is_vector(leaf)}
    sides = {leaf.path: [n for n in leaf.shape if n > 1] for leaf in every if not is_vector(leaf)}

    def is_head(path: str) -> bool:
        """Whether a leaf is a matrix one side of which is that of a vector and of no other kernel."""
        others = {n for other, ns in sides.items() if other != path for n in ns}
        return len(sides[path]) == 2 and any(n in vectors and n not in others for n in sides[path])

    heads = [leaf.path for leaf in spec.leaves if leaf.path in sides and is_head(leaf.path)]
    pairs = list(zip(spec.leaves, spec.scales, strict=True))
    kept = [(leaf, rms) for leaf, rms in pairs if leaf.path not in heads[-1:]]
    if all(is_vector(leaf) for leaf, _ in kept):
        kept = pairs
    total = sum(leaf.size for leaf, _ in kept)
    one = lambda leaf, rms: _flat(leaf, (leaf.size / total) ** 0.5 * float(rms), _CAP * float(rms))  # noqa: E731
    return Shape(tuple(leaf for leaf, _ in kept), tuple(one(leaf, rms) for leaf, rms in kept))


def _flat(leaf: Leaf, size: float, cap: float) -> Scales:
    ones = np.ones([1] * len(leaf.shape), np.float32)
    return Scales(ones / np.float32(size) ** 2, ones, _single(0), _single(cap), None, _rows(leaf))


def _single(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32)


def _sensitivities(
    base: PyTree, apply_fn: ApplyFn, images: Any, spec: selection.Spec, frames: Sequence[Scales], seed: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], float]:
    """For each leaf the sums of F by row and by column (a vector: F and 1), and the outputs' mean sum of squares."""

    def objective(leaves: list[Any], params: PyTree, image: Any, signs: Any) -> tuple[Any, Any]:
        outputs = centred(inputs.interpret(apply_fn, selection.replace(params, spec, leaves), image))
        return jnp.sum(signs * outputs), jnp.sum(jnp.square(outputs))

    @jax.jit
    def one_pass(params: PyTree, frames: Sequence[Scales], image: Any, signs: Any) -> tuple[Any, Any]:
        leaves = [jnp.asarray(x).astype(jnp.float32) for x in selection.carrying("shape", params, spec)]
        gradients, power = jax.grad(objective, has_aux=True)(leaves, params, image, signs)
        parts = zip(frames, spec.leaves, gradients, strict=True)
        return [_margins(one, leaf, gradient) for one, leaf, gradient in parts], power

    rng, total = np.random.default_rng(seed), None
    width = math.prod(jax.eval_shape(apply_fn, base, images[:1]).shape[1:])
    order = np.concatenate([rng.permutation(len(images)) for _ in range(-(-_PASSES // len(images)))])
    for number in order[:_PASSES]:
        signs = rng.choice(np.asarray([-1, 1], np.float32), (1, width))
        found = jax.tree.map(np.float64, jax.device_get(one_pass(base, frames, images[number : number + 1], signs)))
        total = found if total is None else jax.tree.map(np.add, total, found)
    sums, power = jax.tree.map(lambda x: x / _PASSES, total)
    finite = math.isfinite(power) and all(np.isfinite(x).all() for pair in sums for x in pair)
    _validate.all_finite("shape", "outputs and gradients of the network", finite)
    return sums, power


def centred(outputs: Any) -> Any:
    """Outputs of shape [B, classes], less each image's mean where there are several classes; float32."""
    flat = outputs.reshape(outputs.shape[0], -1).astype(jnp.float32)
    return flat - flat.mean(axis=1, keepdims=True) if flat.shape[1] > 1 else flat


def _margins(one: Scales, leaf: Leaf, gradient: Any) -> tuple[Any, Any]:
    square = jnp.square(one.coefficients(gradient))
    if is_vector(leaf):
        return square, jnp.ones([1] * square.ndim)
    rows, columns = one.sides(leaf)
    return square.sum(axis=columns, keepdims=True), square.sum(axis=rows, keepdims=True)


def _scaled(
    base: PyTree,
    spec: selection.Spec,
    frames: Sequence[Scales],
    sums: Sequence[tuple[np.ndarray, np.ndarray]],
    power: float,
) -> Shape:
    """The scales of the leaves that the network uses at all."""
    found, cost = [], 0.0
    weights = selection.carrying("shape", base, spec)
    for leaf, rms, one, weight, (by_row, by_column) in zip(
        spec.leaves, spec.scales, frames, weights, sums, strict=True
    ):
        total = float(by_row.sum())
        if total == 0:
            continue
        vector = is_vector(leaf)
        by_column = by_column if vector else by_column / total
        floor = (_VECTOR_FLOOR if vector else _FLOOR) * total / math.prod(one.coordinates(leaf))
        plain = by_row * by_column
        cost += float((plain / (plain + floor)).sum())
        cap = _CAP * float(rms) if one.basis is None else _ROW_CAP * _row_rms(one, weight)
        found.append((leaf, one, by_row, by_column, floor, cap))
    if power == 0 or all(is_vector(leaf) for leaf, *_ in found):
        cause = "Does apply_fn use its parameters? The last kernel never carries: a network of one layer has no shape."
        raise _validate.fail("shape", "a kernel, besides the last, on which the outputs depend", "none", cause)
    unit = power / cost  # a^2
    scales = [
        Scales(_single(by_row / unit), _single(by_column), _single(floor / unit), _single(cap), one.basis, one.axes)
        for _, one, by_row, by_column, floor, cap in found
    ]
    return Shape(tuple(leaf for leaf, *_ in found), tuple(scales))


def _row_rms(one: Scales, weight: Any) -> np.ndarray:
    """The RMS of each direction's coefficients in the base."""
    coefficients = one.coefficients(jnp.asarray(weight).astype(jnp.float32))
    return np.asarray(jnp.sqrt(jnp.mean(jnp.square(coefficients), axis=1, keepdims=True)))
