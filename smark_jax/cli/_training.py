"""What ``smark demo`` and ``smark train`` have in common: masked training across parties, and the owner's own mark."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.console
import rich.progress

from smark_jax import _memory, aggregation, carriers, codes, data, embedding, keys, losses, parallel, tracing, training
from smark_jax._types import ApplyFn, PyTree
from smark_jax.cli import _console

OWNER_MARGIN = 1.0  # what each chip of the owner's mark must read while the base is trained


class Recipe(NamedTuple):
    """How a model is trained.

    Attributes:
      parties: data holders that train together.
      epochs: passes over the training data.
      batch: examples of one party in a round.
      learning_rate: where Adam begins; it falls to zero along a cosine.
      clip: bound on the norm of a party's gradient.
      seed: of the split between the parties, and of the shuffles.
    """

    parties: int
    epochs: int
    batch: int
    learning_rate: float
    clip: float
    seed: int


class Owner(NamedTuple):
    """The owner's own mark: what carries it, and what it aims at."""

    spec: carriers.Spec
    aim: embedding.Mark


class Training(NamedTuple):
    """A training that is ready to run.

    Attributes:
      step: its rounds' step.
      rounds: how many there are.
      batches: ``batches(start)``, those of all rounds from number ``start`` on.
    """

    step: parallel.TrainStep
    rounds: int
    batches: Callable[[int], Iterator[tuple[np.ndarray, np.ndarray]]]


def prepare(recipe: Recipe, apply_fn: ApplyFn, train: data.Dataset, owner: Owner | None) -> Training:
    """Deals the examples to the parties and sets up the rounds."""
    images, labels = training.partition(train.images, train.labels, recipe.parties, recipe.seed)

    def batches(start: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return training.batches(images, labels, recipe.batch, recipe.epochs, recipe.seed + 1, start=start)

    batches(0)  # refuses a batch that is too large before anything is compiled
    rounds = training.num_batches(labels.shape[1], recipe.batch, recipe.epochs)
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, rounds))
    if owner is not None:
        loss_fn = functools.partial(losses.sign_hinge, margin=OWNER_MARGIN)
        optimizer = optax.chain(embedding.add_fingerprint_gradient(loss_fn, owner.spec, owner.aim), optimizer)
    step = parallel.train_step(apply_fn, optimizer, aggregation.FixedPoint(recipe.clip, recipe.parties))
    return Training(step, rounds, batches)


def owner_mark(start: PyTree, key: keys.SecretKey) -> Owner:
    """The owner's own mark, read relative to the weights that training starts from."""
    spec = carriers.select(start)
    carrier = carriers.draw(keys.derive(key, "carrier"), spec)
    return Owner(spec, embedding.mark(start, spec, carrier, codes.codebook(keys.derive(key, "code"), [0])[0]))


def owner_log10_p(params: PyTree, owner: Owner) -> float:
    """How improbable the owner's mark in ``params`` is by chance; 0 where it cannot be read."""
    chips = carriers.despread(carriers.read(params, owner.spec) - owner.aim.base, owner.aim.carrier)
    verdict = tracing.trace(chips, owner.aim.code[None].astype(jnp.int8))
    return verdict.accused[0].log10_p if verdict.accused else 0.0


def before_jax(parties: int) -> None:
    """What must be said before JAX computes anything: that memory is kept, and how many virtual CPU devices there are.

    A caller who has begun to compute brings their own devices.
    """
    _memory.keep_freed()
    try:
        jax.config.update("jax_num_cpu_devices", parties)
    except RuntimeError:
        parallel.devices(parties)


def progress(console: rich.console.Console) -> rich.progress.Progress:
    """The progress display of both commands; each of its tasks has a ``note``."""
    return _console.progress(console, rich.progress.TextColumn("{task.fields[note]}", markup=False))


def say(console: rich.console.Console, text: str) -> None:
    """A line in which nothing is markup, and no path is broken in two."""
    console.print(text, markup=False, soft_wrap=True)
