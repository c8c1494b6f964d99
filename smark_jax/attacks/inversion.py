r"""Gradient inversion: reconstructs a party's images from the gradient that it sends.

Anyone who sees a gradient g of a known network can search for images with the same gradient. With h(x) the gradient
that candidate images x would give, two objectives are minimised here:

.. math::
    \text{DLG:}\ \lVert g - h(x) \rVert_2^2
    \qquad
    \text{cosine:}\ 1 - \frac{\langle g, h(x) \rangle}{\lVert g \rVert \lVert h(x) \rVert} + \lambda\, TV(x)

L-BFGS minimises the first; signed Adam with a decaying step inside the box [0, 1] minimises the second, for networks
with ReLU. They measure what a message reveals; their failure against a message proves nothing by itself.

References:
  Zhu, Liu, Han, "Deep leakage from gradients", NeurIPS 2019 (DLG).
  Zhao, Mopuri, Bilen, "iDLG: improved deep leakage from gradients", 2020 (:func:`infer_label`).
  Geiping, Bauermeister, Dröge, Moeller, "Inverting gradients - how easy is it to break privacy in federated
  learning?", NeurIPS 2020, section 4 (cosine).
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from smark_jax import _trees, _validate
from smark_jax._types import AnyArray, ApplyFn, PyTree

InversionMethod = Literal["cosine", "dlg"]
_STEPS_PER_CHUNK = 50
# Geiping et al.: the step size starts at 0.1 and is divided by ten after 3/8, 5/8 and 7/8 of the steps.
_LEARNING_RATE, _MILESTONES = 0.1, (3 / 8, 5 / 8, 7 / 8)
_TOTAL_VARIATION = 1e-2
_LBFGS = optax.lbfgs(memory_size=20, linesearch=optax.scale_by_zoom_linesearch(max_linesearch_steps=20))
_ADAM = optax.scale_by_adam()


class Reconstruction(NamedTuple):
    """The result of an inversion.

    Attributes:
      images: in [0, 1].
      labels: the labels given, or the most likely ones under the soft labels found.
      objective: the lowest value of the objective; images and labels are those of that step.
    """

    images: Float[Array, "B H W C"]
    labels: Int[Array, " B"]
    objective: Float[Array, ""]


def invert_gradient(
    apply_fn: ApplyFn,
    params: PyTree,
    gradient: PyTree,
    key: Array,
    *,
    shape: tuple[int, int, int, int],
    labels: Int[AnyArray, " B"] | None = None,
    method: InversionMethod = "cosine",
    steps: int = 300,
    on_chunk: Callable[[int], None] = lambda done: None,
) -> Reconstruction:
    """Searches for images whose mean softmax cross-entropy has the gradient ``gradient``.

    It is compiled once for each ``apply_fn``, method and shape. The images of a batch may come back in any order.

    Args:
      apply_fn: ``apply_fn(params, images) -> logits``; hashable, such as that of :func:`smark_jax.models.apply_fn`.
      params: the weights at which the gradient was taken.
      gradient: a tree like ``params``. The method ``"cosine"`` ignores its scale.
      key: a ``jax.random`` key for the initial images.
      shape: of the images, (B, H, W, C).
      labels: shape [B], from :func:`infer_label` or known otherwise. Without them soft labels are found along with
        the images, as in DLG.
      method: ``"dlg"`` for smooth networks, ``"cosine"`` for any.
      steps: of L-BFGS or Adam.
      on_chunk: called with the number of steps just done, every 50 and at the end: a progress bar.

    Returns:
      Images, labels and objective of the best step; the images are clipped to [0, 1].

    Raises:
      SmarkError: for an unknown method, a gradient that is unlike the parameters or not finite or zero, labels that
        are not one class for each image, or steps not at least 1.

    Examples:
      >>> import jax
      >>> from smark_jax import attacks, models, parallel
      >>> model = models.CNN(num_classes=3)
      >>> apply_fn, params = models.apply_fn(model), models.init(model, jax.random.key(0), (8, 8, 1))
      >>> image, label = jax.random.uniform(jax.random.key(1), (1, 8, 8, 1)), jax.numpy.array([2])
      >>> seen = jax.grad(lambda p: parallel.cross_entropy(apply_fn(p, image), label))(params)
      >>> label = attacks.infer_label(seen["Dense_1"]["bias"])[None]
      >>> key = jax.random.key(2)
      >>> found = attacks.invert_gradient(apply_fn, params, seen, key, shape=(1, 8, 8, 1), labels=label)
      >>> bool(abs(found.images - image).mean() < 0.1)
      True
    """
    if method not in get_args(InversionMethod):
        expected = f"a method among {', '.join(get_args(InversionMethod))}"
        raise _validate.fail("invert_gradient", expected, repr(method), "Smooth network: 'dlg'; ReLU: 'cosine'.")
    if len(shape) != 4 or min(shape) < 1:
        raise _validate.fail("invert_gradient", "shape (B, H, W, C)", repr(shape), "One grey image is (1, H, W, 1).")
    _validate.positive("invert_gradient", "steps", steps)
    _check_gradient(params, gradient)
    num_classes = jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct(shape, jnp.float32)).shape[-1]

    image_key, label_key = jax.random.split(key)
    found = {"images": 0.5 + 0.1 * jax.random.normal(image_key, shape)}
    if labels is None:
        found["label_logits"] = jax.random.normal(label_key, (shape[0], num_classes))
        targets = None
    else:
        _check_labels(labels, shape[0], num_classes)
        targets = jax.nn.one_hot(labels, num_classes)

    optimizer_state = (_LBFGS if method == "dlg" else _ADAM).init(found)
    carry = (found, optimizer_state, found, jnp.float32(jnp.inf))
    for start in range(0, steps, _STEPS_PER_CHUNK):
        stop = min(start + _STEPS_PER_CHUNK, steps)
        carry = _search(apply_fn, method, params, gradient, targets, carry, start, stop, steps)
        on_chunk(stop - start)
    _, _, best, objective = carry
    best_labels = jnp.argmax(best["label_logits"], axis=-1) if labels is None else jnp.asarray(labels)
    return Reconstruction(jnp.clip(best["images"], 0, 1), best_labels, objective)


def infer_label(bias_gradient: Float[Array, " classes"]) -> Int[Array, ""]:
    r"""The label of the single image behind a gradient: the one negative entry of the last layer's bias gradient.

    Under softmax cross-entropy that gradient is :math:`p - e_y`, negative at the label y alone. (Zhao et al. 2020.) For
    a last layer that has no bias, but only non-negative inputs, pass its kernel's gradient summed over inputs.

    Args:
      bias_gradient: shape [classes].

    Raises:
      SmarkError: when it is not a vector of at least two classes.
    """
    if jnp.ndim(bias_gradient) != 1 or jnp.size(bias_gradient) < 2:
        cause = "Pass the gradient of the last layer's bias alone."
        got = f"shape {jnp.shape(bias_gradient)}"
        raise _validate.fail("infer_label", "a bias gradient of shape [classes]", got, cause)
    return jnp.argmin(bias_gradient)


def _check_gradient(params: PyTree, gradient: PyTree) -> None:
    def describe(tree: PyTree) -> dict[str, tuple[int, ...]]:
        return {name: jnp.shape(leaf) for name, leaf in _trees.named("invert", tree).items()}

    wanted, given = describe(params), describe(gradient)
    if wanted != given:
        leaf = next(name for name in sorted(wanted.keys() | given.keys()) if wanted.get(name) != given.get(name))
        raise _validate.fail(
            "invert_gradient",
            f"a gradient like the parameters (leaf {leaf!r}: {wanted.get(leaf, 'absent')})",
            str(given.get(leaf, "absent")),
            "Was it taken from another network?",
        )
    if not _validate.is_traced(gradient):
        largest = float(jnp.max(jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient)])))
        _validate.all_finite("invert_gradient", "gradient", np.isfinite(largest))
        if largest == 0:
            cause = "A zero gradient says nothing. Was the message empty?"
            raise _validate.fail("invert_gradient", "a gradient other than zero", "zeros", cause)


def _check_labels(labels: Int[AnyArray, " B"], num_images: int, num_classes: int) -> None:
    expected = f"{num_images} whole-number labels"
    if jnp.shape(labels) != (num_images,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        got = f"shape {jnp.shape(labels)}, dtype {labels.dtype}"
        raise _validate.fail("invert_gradient", expected, got, "One-hot labels need an argmax first.")
    if not _validate.is_traced(labels) and not bool(((labels >= 0) & (labels < num_classes)).all()):
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise _validate.fail("invert_gradient", f"{expected} below {num_classes}", got, "Is it another network?")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(
    apply_fn: ApplyFn,
    method: InversionMethod,
    params: PyTree,
    gradient: PyTree,
    targets: Float[Array, "B classes"] | None,
    carry: PyTree,
    start: int,
    stop: int,
    steps: int,
) -> PyTree:
    """Steps ``start`` to ``stop`` of ``steps``; the carry is (point, optimizer state, best point, its objective)."""

    def objective(found: dict[str, Array]) -> Float[Array, ""]:
        soft = jax.nn.softmax(found["label_logits"]) if targets is None else targets

        def loss(p: PyTree) -> Float[Array, ""]:
            return jnp.mean(optax.losses.softmax_cross_entropy(apply_fn(p, found["images"]), soft))

        candidate = jax.grad(loss)(params)
        if method == "dlg":
            return optax.tree.norm(optax.tree.sub(gradient, candidate), squared=True)
        product = optax.tree.norm(gradient) * optax.tree.norm(candidate)
        cosine = optax.tree.vdot(gradient, candidate) / jnp.maximum(product, 1e-30)
        return jnp.float32(1) - cosine + _TOTAL_VARIATION * _total_variation(found["images"])

    lbfgs_value_and_grad = optax.value_and_grad_from_state(objective)

    def step(number: Array, carry: PyTree) -> PyTree:
        found, state, best, lowest = carry
        if method == "dlg":
            value, slope = lbfgs_value_and_grad(found, state=state)
            updates, state = _LBFGS.update(slope, state, found, value=value, grad=slope, value_fn=objective)
            moved = optax.apply_updates(found, updates)
        else:
            value, slope = jax.value_and_grad(objective)(found)
            updates, state = _ADAM.update(jax.tree.map(jnp.sign, slope), state)
            passed = jnp.sum(number >= jnp.asarray(_MILESTONES) * steps)
            moved = optax.tree.add_scale(found, -_LEARNING_RATE * 0.1**passed, updates)
            moved["images"] = jnp.clip(moved["images"], 0, 1)
        better = value < lowest  # false for NaN, which too long a step may give
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), found, best)
        return moved, state, best, jnp.where(better, value, lowest)

    return jax.lax.fori_loop(start, stop, step, carry)


def _total_variation(images: Float[Array, "B H W C"]) -> Float[Array, ""]:
    """Anisotropic total variation: vertical and horizontal differences, divided by the number of pixels."""
    down, across = (jnp.sum(jnp.abs(jnp.diff(images, axis=axis))) for axis in (1, 2))
    return (down + across) / images.size
