"""Attacks that try to remove the fingerprint from one copy by further training.

Running statistics (a tree's ``"batch_stats"``) are not weights and stay as they are, and so does every leaf that is not
of a floating-point type.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from smark_jax import _batches, _trees, _validate, carriers, training
from smark_jax._types import AnyArray, ApplyFn, PyTree
from smark_jax.attacks.restarting import trained

ADAM = optax.adam(1e-3)
"""The default optimiser: one object, so that attacks with the same settings share a compiled step."""
_IMAGES_PER_PASS = 500


def fine_tune(
    params: PyTree,
    apply_fn: ApplyFn,
    images: AnyArray,
    labels: Int[AnyArray, " N"],
    *,
    epochs: int = 3,
    batch_size: int = 64,
    optimizer: optax.GradientTransformation = ADAM,
    trainable: str | None = None,
    hold_zeros: bool = False,
    label_smoothing: float = 0.0,
    sharpness: float = 0.0,
    penalty: Callable[[PyTree], Array] | None = None,
    seed: int = 0,
    on_progress: training.OnProgress | None = None,
) -> PyTree:
    """Fine-tunes the copy, by default all layers with Adam: the most obvious removal attack.

    Budget: labelled images x epochs. The usual variants are settings of this one (Adi et al., USENIX Security 2018;
    Lukas et al., IEEE S&P 2022):

    - fine-tune the last layer: ``trainable="Dense_1"``;
    - retrain the last layer, or all: :func:`reinitialise` the last layer first, then train it, or all layers;
    - with predicted labels: ``labels=predicted_labels(copy, apply_fn, images)``;
    - fine-pruning (Liu, Dolan-Gavitt, Garg, RAID 2018): :func:`prune_filters` first, then ``hold_zeros=True``;
    - label smoothing: ``label_smoothing=0.3``;
    - a burst of L2 regularisation: ``optimizer=optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-3))``;
    - large decoupled decay (Loshchilov, Hutter, ICLR 2019): ``optimizer=optax.adamw(1e-3, weight_decay=10)``;
    - sharpness-aware minimisation (SAM; Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021): ``sharpness=0.05``;
    - quantisation-aware training: ``apply_fn=quantised(apply_fn, 4)``, and :func:`quantise` the result;
    - factored layers: ``params=factorise(copy, 0.25)``, an ``apply_fn`` that calls :func:`multiply_out` first;
    - against guessed carriers: ``penalty=carrier_energy(copy, guesses)``.

    Args:
      params: the copy.
      apply_fn: ``apply_fn(params, images) -> logits``.
      images: the leaker's images, shape [N, ...].
      labels: their labels, shape [N].
      epochs: passes over the data.
      batch_size: examples per step, at most N.
      optimizer: any optax optimiser. Pass the same object again and a compiled step is reused.
      trainable: a regular expression searched in leaves' paths, such as ``"Dense_1"``; by default all are trained.
      hold_zeros: keep kernel weights that are zero now at zero.
      label_smoothing: share of the target probability that is divided evenly among all classes, at least 0, below 1.
      sharpness: if positive, each step takes the gradient at this distance from the weights, in the direction of
        steepest ascent: SAM's rho. It doubles the time, and counts as one pass over the data.
      penalty: ``penalty(params) -> scalar``, added to the loss.
      seed: of the shuffles.
      on_progress: called after each step with the steps done, the total number of steps, and the loss.

    Returns:
      The fine-tuned copy.

    Raises:
      SmarkError: when the batch is larger than the data, epochs or batch size are not at least 1, ``trainable`` is
        found in no path, or a setting is out of range.
    """
    if not 0 <= label_smoothing < 1:
        cause = "Lukas et al. take 0.3."
        raise _validate.fail("fine_tune", "label_smoothing of at least 0 and below 1", repr(label_smoothing), cause)
    if not 0 <= sharpness < np.inf:
        raise _validate.fail("fine_tune", "sharpness to be finite and at least 0", repr(sharpness), "Try 0.05.")
    loss = _moving(_classification(apply_fn, label_smoothing, penalty), sharpness)
    if hold_zeros:
        optimizer = optax.chain(optimizer, _hold_zeros())
    moving = trained(params)
    if trainable is not None:
        moving = jax.tree.map(lambda a, b: a and b, moving, _trees.matching("fine_tune", params, trainable))
    return _descend(
        "fine_tune", loss, params, moving, optimizer, (images, labels), epochs, batch_size, seed, on_progress
    )


@functools.lru_cache(maxsize=8)
def _classification(
    apply_fn: ApplyFn, label_smoothing: float, penalty: Callable[[PyTree], Array] | None
) -> Callable[[PyTree, Array, Array], Array]:
    """The loss of :func:`fine_tune`; the same function for the same settings, so that its step is compiled once."""

    def loss(params: PyTree, x: Array, y: Array) -> Array:
        logits = apply_fn(params, x).astype(jnp.float32)
        wanted = optax.smooth_labels(jax.nn.one_hot(y, logits.shape[-1]), label_smoothing)
        task = optax.softmax_cross_entropy(logits, wanted).mean()
        return task if penalty is None else task + penalty(params)

    return loss


@functools.lru_cache(maxsize=8)
def _moving(loss_fn: Callable[[PyTree, Array, Array], Array], sharpness: float = 0.0) -> Callable[..., Array]:
    """A loss of the leaves that move, given those that stay; at the top of a ball around them for SAM."""

    def loss(moves: PyTree, x: Array, y: Array, still: PyTree) -> Array:
        at = lambda moves: loss_fn(_trees.join(moves, still), x, y)  # noqa: E731
        if sharpness:
            ascent = jax.grad(at)(moves)
            step = jax.lax.stop_gradient(sharpness / (optax.tree.norm(ascent) + 1e-12))
            moves = jax.tree.map(lambda move, slope: move + step * jax.lax.stop_gradient(slope), moves, ascent)
        return at(moves)

    return loss


def distil(
    params: PyTree,
    apply_fn: ApplyFn,
    images: AnyArray,
    student: PyTree,
    student_apply_fn: ApplyFn | None = None,
    *,
    temperature: float = 3.0,
    epochs: int = 10,
    batch_size: int = 64,
    optimizer: optax.GradientTransformation = ADAM,
    seed: int = 0,
    on_progress: training.OnProgress | None = None,
) -> PyTree:
    r"""Knowledge distillation: teaches a fresh network, of any architecture, to answer like the copy.

    The loss is :math:`T^2 \, \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))`, with the teacher's
    logits t and the student's s: Hinton, Vinyals, Dean 2015 (arXiv 1503.02531), without true labels. The student's
    weights do not derive from the copy's, so no fingerprint in weights can survive. Budget: unlabelled images.

    Args:
      params: the copy.
      apply_fn: the copy's ``apply_fn(params, images) -> logits``.
      images: shape [N, ...]; labels are not needed.
      student: initial weights of the student, such as ``models.init`` draws.
      student_apply_fn: the student's; by default the copy's.
      temperature: T.
      epochs: passes over the data.
      batch_size: examples per step, at most N.
      optimizer: any optax optimiser.
      seed: of the shuffles.
      on_progress: called after each step with the steps done, the total number of steps, and the loss.

    Returns:
      The trained student.

    Raises:
      SmarkError: when the temperature is not positive, the batch is larger than the data, or epochs or batch size are
        not at least 1.
    """
    _validate.finite_number("distil", "temperature", temperature)
    loss = _moving(_imitation(apply_fn if student_apply_fn is None else student_apply_fn, temperature))
    data = (images, _logits(params, apply_fn, images))
    return _descend("distil", loss, student, trained(student), optimizer, data, epochs, batch_size, seed, on_progress)


@functools.lru_cache(maxsize=8)
def _imitation(run: ApplyFn, temperature: float) -> Callable[[PyTree, Array, Array], Array]:
    """The loss of :func:`distil`."""

    def loss(student: PyTree, x: Array, logits: Array) -> Array:
        log_s = jax.nn.log_softmax(run(student, x).astype(jnp.float32) / temperature)
        log_t = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        return temperature**2 * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1).mean()

    return loss


def predicted_labels(params: PyTree, apply_fn: ApplyFn, images: AnyArray) -> Int[np.ndarray, " N"]:
    """The copy's own answers, for a leaker who has images but no labels.

    Args:
      params: the copy.
      apply_fn: ``apply_fn(params, images) -> logits``.
      images: shape [N, ...].

    Returns:
      Class numbers, shape [N].
    """
    return _logits(params, apply_fn, images).argmax(axis=-1)


def carrier_energy(
    params: PyTree, guesses: Sequence[carriers.Mark], weight: float = 1.0
) -> Callable[[PyTree], Float[Array, ""]]:
    r"""A penalty on the components of the weights in guessed carriers, for a leaker who knows the method, not the key.

    It is :math:`\text{weight} \sum_g \|A_g^\top w\|^2 / \|A_g^\top w_0\|^2`, with w the weights in training and
    :math:`w_0` those of ``params``. The leaker lacks the base, so the penalty cannot measure relative to it.

    Args:
      params: the copy.
      guesses: marks of the copy with the leaker's own keys, as from :func:`smark_jax.carriers.mark`.
      weight: relative to the task's loss.

    Returns:
      ``penalty(params) -> scalar`` for :func:`fine_tune`.

    Raises:
      SmarkError: when there are no guesses, or one is not for these params.
    """
    if not guesses:
        raise _validate.fail("carrier_energy", "at least one mark", "none", "Draw one with carriers.mark.")

    def energy(params: PyTree) -> Array:
        chips = [carriers.despread(carriers.read(params, guess.spec), guess) for guess in guesses]
        return jnp.stack([jnp.sum(jnp.square(read)) for read in chips])

    scale = weight / energy(params)
    return lambda params: jnp.sum(scale * energy(params))


def _descend(
    who: str,
    loss_fn: Callable[..., Array],
    params: PyTree,
    moving: PyTree,
    optimizer: optax.GradientTransformation,
    data: Sequence[AnyArray],
    epochs: int,
    batch_size: int,
    seed: int,
    on_progress: training.OnProgress | None,
) -> PyTree:
    """Minimises ``loss_fn(moves, *batch, still)`` over the leaves whose entry in ``moving`` is true."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        _validate.positive(who, name, value)
    sizes = [len(array) for array in data]
    if not batch_size <= sizes[0] == sizes[1]:
        cause = "Use smaller batches, or pass images and labels of the same split."
        got = f"{sizes[0]} images and {sizes[1]} labels"
        raise _validate.fail(who, f"at least {batch_size} images with a label each", got, cause)
    moves, still = _trees.split(params, moving)
    state, _ = training.minimise(
        loss_fn,
        optimizer,
        training.begin(moves, optimizer),
        training.minibatches(data, batch_size=batch_size, epochs=epochs, seed=seed),
        arguments=(still,),
        total=training.num_batches(sizes[0], batch_size, epochs),
        on_progress=on_progress,
    )
    return _trees.join(state.params, still)


def _hold_zeros() -> optax.GradientTransformation:
    """Keeps kernel weights that start at zero there."""

    def init(params: PyTree) -> optax.OptState:
        return jax.tree.map(lambda leaf: (leaf != 0) if leaf.ndim > 1 else jnp.ones_like(leaf, bool), params)

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        return jax.tree.map(lambda update, mask: update * mask, updates, state), state

    return optax.GradientTransformation(init, update)


def _logits(params: PyTree, apply_fn: ApplyFn, images: AnyArray) -> np.ndarray:
    return _batches.apply(functools.partial(jax.jit(apply_fn), params), _IMAGES_PER_PASS, np.asarray(images))
