"""Training on one device: a loss, batches, an optimiser, and the one loop over them.

::

    state = training.begin(params, optimizer)
    batches = training.minibatches((images, labels), batch_size=64, epochs=3, seed=0)
    state, info = training.minimise(loss_fn, optimizer, state, batches)
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array
from jaxtyping import Float

from smark_jax import _batches, _validate
from smark_jax._types import AnyArray, PyTree

OnProgress = Callable[[int, int, Any], None]
"""``on_progress(done, total, loss)``: the steps done, the total number, and the last step's loss, a scalar array."""


class State(NamedTuple):
    """The state that training carries from step to step; never modified.

    Attributes:
      params: the parameters.
      opt_state: the optimiser's state.
      carried: other state that the loss passes from step to step, such as running statistics; None if there is none.
      steps: how many steps were taken.
    """

    params: PyTree
    opt_state: optax.OptState
    carried: PyTree
    steps: int


class Info(NamedTuple):
    """Information that no later step needs.

    Attributes:
      losses: the loss of each step of this call, before its update, shape [steps].
    """

    losses: Float[np.ndarray, " steps"]


def begin(params: PyTree, optimizer: optax.GradientTransformation, carried: PyTree = None) -> State:
    """The state before the first step."""
    return State(params, optimizer.init(params), carried, 0)


def minibatches(
    data: Sequence[AnyArray], *, batch_size: int, epochs: int, seed: Any, start: int = 0
) -> Iterator[tuple[AnyArray, ...]]:
    """Full batches of the same examples of each array, reshuffled in each epoch; a short last batch is dropped.

    Args:
      data: arrays whose leading axis counts the same N examples, such as images and labels.
      batch_size: B, from 1 to N.
      epochs: passes over the data.
      seed: of the shuffles, as ``numpy.random.default_rng`` takes it.
      start: number of batches to skip without touching the data: :attr:`State.steps` of a training to resume.

    Yields:
      A tuple with [B, ...] of each array. There are :func:`smark_jax.training.num_batches` of them.

    Raises:
      SmarkError: when the arrays differ in length, a batch is larger than the data, or epochs are not at least 1.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        _validate.positive("minibatches", name, value)
    lengths = [len(array) for array in data]
    if not lengths or len(set(lengths)) > 1 or batch_size > lengths[0]:
        cause = "Use smaller batches, or pass images and labels of the same split."
        expected = f"arrays of the same length, {batch_size} or more"
        raise _validate.fail("minibatches", expected, f"lengths {lengths}", cause)
    return _drawn(data, batch_size, epochs, np.random.default_rng(seed), start)


def _drawn(
    data: Sequence[AnyArray], batch_size: int, epochs: int, rng: np.random.Generator, skip: int
) -> Iterator[tuple[AnyArray, ...]]:
    for _ in range(epochs):
        for index in _batches.shuffled(rng, len(data[0]), batch_size):
            if skip > 0:
                skip -= 1
                continue
            yield tuple(array[index] for array in data)


def minimise(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    state: State,
    batches: Iterable[Sequence[AnyArray]],
    *,
    arguments: Sequence[PyTree] = (),
    total: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[State, Info]:
    """Takes a step of the optimiser for each batch.

    A step is compiled once for a ``loss_fn``, an optimiser and the shapes of its arguments; later calls with the same
    two functions reuse it. Data and further arguments are passed to the compiled step, never closed over.

    Args:
      loss_fn: ``loss_fn(params, *batch, *arguments) -> loss``, a scalar; where ``state.carried`` is not None,
        ``loss_fn(params, carried, *batch, *arguments) -> (loss, carried)``.
      optimizer: any optax optimiser.
      state: from :func:`begin`, or from an earlier call.
      batches: the arrays of each step, such as :func:`minibatches` draws.
      arguments: trees that are the same at every step.
      total: the total number of steps, including those before this call; it is only passed to ``on_progress``.
      on_progress: called after each step; computation continues in the background until it reads the loss.

    Returns:
      The state after the last batch, and the loss of each step.

    Examples:
      >>> import jax.numpy as jnp, numpy as np, optax
      >>> from smark_jax import training
      >>> x = np.linspace(-1, 1, 64, dtype=np.float32)
      >>> loss_fn = lambda w, x, y: jnp.mean(jnp.square(w * x - y))
      >>> optimizer = optax.sgd(0.5)
      >>> batches = list(training.minibatches((x, 3 * x), batch_size=16, epochs=20, seed=0))
      >>> state, info = training.minimise(loss_fn, optimizer, training.begin(jnp.float32(0), optimizer), batches)
      >>> round(float(state.params), 3), state.steps, info.losses.shape
      (3.0, 80, (80,))
    """
    step, losses = _compiled(loss_fn, optimizer), []
    params, opt_state, carried, steps = state
    for batch in batches:
        params, opt_state, carried, loss = step(params, opt_state, carried, tuple(batch), tuple(arguments))
        steps += 1
        losses.append(loss)
        if on_progress is not None:
            on_progress(steps, total, loss)
    return State(params, opt_state, carried, steps), Info(np.asarray(jax.device_get(losses), np.float32))


@functools.lru_cache(maxsize=8)
def _compiled(loss_fn: Callable[..., Any], optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """The step of a loss and an optimiser. The cache is small, since a loss may hold arrays."""

    @jax.jit
    def step(
        params: PyTree, opt_state: optax.OptState, carried: PyTree, batch: tuple, arguments: tuple
    ) -> tuple[PyTree, optax.OptState, PyTree, Array]:
        if carried is None:
            loss, gradient = jax.value_and_grad(loss_fn)(params, *batch, *arguments)
        else:
            (loss, carried), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, carried, *batch, *arguments)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, carried, loss

    return step
